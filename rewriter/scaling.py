"""`torch.amp.GradScaler` inside a loss, written so that Dynamo can trace it.

The recipe for a gradient penalty under automatic mixed precision differentiates
``scaler.scale(loss)`` and divides by ``scaler.get_scale()``. Dynamo traces nothing of the module
that defines the class; its names are asked for here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


def scale(self: Any, outputs: Any) -> Any:
    """Do what `GradScaler.scale` does."""
    if not self._enabled:
        return outputs
    if isinstance(outputs, Tensor):
        if self._scale is None:
            device = outputs.device
            start: Any = self._init_growth_tracker
            self._scale = torch.full((), self._init_scale, dtype=torch.float32, device=device)
            self._growth_tracker = torch.full((), start, dtype=torch.int32, device=device)
        return outputs * self._scale.to(device=outputs.device, non_blocking=True)
    if isinstance(outputs, tuple):
        return tuple([scale(self, value) for value in outputs])
    return [scale(self, value) for value in outputs]


def get_scale(self: Any) -> float:
    """Do what `GradScaler.get_scale` does."""
    if not self._enabled:
        return 1.0
    return self._init_scale if self._scale is None else self._scale.item()


def is_enabled(self: Any) -> bool:
    """Do what `GradScaler.is_enabled` does."""
    return self._enabled


METHODS: dict[Callable[..., Any], Callable[..., Any]] = {
    GradScaler.scale: scale,
    GradScaler.get_scale: get_scale,
    GradScaler.is_enabled: is_enabled,
}
