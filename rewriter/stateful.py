"""Stateful layers under `torch.func` transforms, where PyTorch refuses to write their state.

A transform wraps the tensors it differentiates and forbids in-place writes to all others, so
BatchNorm in train mode is an error inside one. Its statistics are not part of what is
differentiated; they are written outside of the transform, as often as the layer is called.
Normalisation is written out, because its forward mode fails on the fake tensors of a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import (
    GradInterpreter,
    JvpInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
    temporarily_restore_interpreter_stack,
)
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from passes.factorised import FUNCTIONS
from rewriter import nesting

_C: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_A: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


MIXES = (
    "a derivative per sample (vmap) of a layer that mixes the batch and updates its state, such as "
    "BatchNorm in train mode"
)


def is_inside_transform() -> bool:
    """Whether a `torch.func` transform is running around this call."""
    return _C.peek_interpreter_stack() is not None


def is_inside_forward_mode() -> bool:
    """Whether a forward-mode transform or a dual level is open around this call."""
    levels = _C.get_interpreter_stack() or ()
    inside = any(level.key() == _C.TransformType.Jvp for level in levels)
    return inside or forward_ad._current_level >= 0


def is_inside_vmap() -> bool:
    """Whether a vmap is open around this call."""
    levels = _C.get_interpreter_stack() or ()
    return any(level.key() == _C.TransformType.Vmap for level in levels)


def loses_no_grad() -> bool:
    """Whether gradients are off in a transform around this call that would turn them on for an
    `autograd.Function`: PyTorch does so below each transform but those entered under `no_grad`."""
    is_on = torch.is_grad_enabled()
    for level in reversed(retrieve_all_functorch_interpreters()):
        if isinstance(level, GradInterpreter) and not level.prev_grad_mode():
            is_on = False
        elif isinstance(level, (GradInterpreter, JvpInterpreter)) and not is_on:
            return True
    return False


def is_inside_level() -> bool:
    """Whether a transform or a dual level is open around this call."""
    return _C.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def outside_transforms() -> contextlib.AbstractContextManager[list[Any]]:
    """Close all transforms for the time of the ``with`` block, and open them again; gives them."""
    return temporarily_clear_interpreter_stack()


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Leave transforms, hooks on saved tensors (checkpoints) and `detect_anomaly`, which looks at
    values that fake tensors do not have, inside the ``with`` block: what is traced there is none of
    the user's."""
    anomalies = torch.autograd.set_detect_anomaly(False)
    with anomalies, without_saved_tensor_hooks(), outside_transforms():
        yield


def inside_transforms(levels: list[Any]) -> contextlib.AbstractContextManager[None]:
    """Open transforms that are closed for the time being, inside of `outside_transforms`."""
    return temporarily_restore_interpreter_stack(levels)


def unwrap_dead(values: Sequence[Any]) -> Sequence[Any]:
    """Take values out of the wrappers of transforms that have ended, as any operator does."""
    return unwrap_dead_wrappers(tuple(values))


@contextlib.contextmanager
def levels_restored() -> Iterator[None]:
    """Close the transforms and the dual level that the block has opened, if it raises.

    A captured graph opens and closes them as steps of its own; what it leaves open would make every
    later use of forward mode, or of hooks on saved tensors (checkpoints), an error in this process.
    """
    depth, was_open = _C.get_dynamic_layer_stack_depth(), _is_dual_level_open()
    forward, hooks = torch._C._is_fwd_grad_enabled(), _A._saved_tensors_hooks_is_enabled()
    try:
        yield
    except BaseException:
        nesting.close_to_depth(depth)
        if not was_open and _is_dual_level_open():
            nesting.exit_dual_level(level=0)
        torch._C._set_fwd_grad_enabled(forward)
        if hooks:
            _A._saved_tensors_hooks_enable()
        raise


def _is_dual_level_open() -> bool:
    """Whether a dual level is open, by PyTorch's own count; there can be but one."""
    try:
        level = nesting.enter_dual_level()
    except RuntimeError:
        return True
    nesting.exit_dual_level(level=level)
    return False


def has_saved_tensor_hooks() -> bool:
    """Whether hooks on saved tensors are in force. A checkpoint's end the forward pass that it runs
    again with an error of theirs, as soon as all is saved that it needs."""
    return _A._top_saved_tensors_default_hooks(True) is not None


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Keep a checkpoint from counting, or unpacking, what fake tensors save."""
    hooks = []
    if _A._saved_tensors_hooks_is_enabled():
        while (top := _A._top_saved_tensors_default_hooks(True)) is not None:
            hooks.append(top)
            _A._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            _A._push_saved_tensors_default_hooks(pack, unpack)


def modes() -> Any:
    """Return the modes of PyTorch, beside transforms, by which a function is computed or traced."""
    functions = torch._C._len_torch_function_stack()
    hooks = _A._saved_tensors_hooks_is_enabled() and _A._top_saved_tensors_default_hooks(True)
    return (
        _casts() if torch._C._is_any_autocast_enabled() else None,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch._C._get_deterministic_algorithms(),
        torch.get_default_dtype(),
        # A default device is a mode of these; to ask for it is dear.
        (functions, torch.get_default_device()) if functions else None,
        bool(hooks),
    )


def _casts() -> Any:
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


def is_wrapped(x: Any) -> bool:
    """Whether a transform has wrapped this value."""
    return isinstance(x, Tensor) and _C.is_functorch_wrapped_tensor(x)


def any_wrapped(tensors: Sequence[Tensor]) -> bool:
    """Whether a transform has wrapped one of these tensors."""
    return any(map(_C.is_functorch_wrapped_tensor, tensors))


def write_outside(name: str, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Call the in-place method ``name`` of ``x`` outside of every transform; return a zero."""
    if any(isinstance(item, Tensor) and _is_batched(item) for item in arguments):
        raise RuntimeError(MIXES)
    plain = [unwrapped(item) for item in arguments]
    with (
        temporarily_clear_interpreter_stack(),
        torch.no_grad(),
        # As in PyTorch's own kernel: a layer called outside keeps the statistics for its pullback,
        # does not read them in train mode, and would find them changed.
        torch.autograd._unsafe_preserve_version_counter(x),
    ):
        getattr(x, name)(*plain, **options)
        return x.new_zeros(())


def _is_batched(x: Tensor) -> bool:
    while is_wrapped(x):
        if _C.is_batchedtensor(x):
            return True
        x = _C.get_unwrapped(x)
    return False


def unwrapped(item: Any) -> Any:
    """Return what the transforms around this call have wrapped, as a constant."""
    while is_wrapped(item):
        item = _C.get_unwrapped(item)
    return item.detach() if isinstance(item, Tensor) else item


def _normalized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    return (x - mean) * (variance + eps).rsqrt(), mean, variance


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    if weight is not None:
        x = x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Do what `torch.nn.functional.batch_norm` does, statistics written outside."""
    shape = [1, -1, *[1] * (input.dim() - 2)]
    if not training and running_mean is not None and running_var is not None:
        normal = (input - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
        return _scaled(normal, weight, bias, shape)
    dims = [0, *range(2, input.dim())]
    normal, mean, variance = _normalized(input, dims, eps)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        n = input.numel() // input.shape[1]
        if n == 1:
            raise ValueError(f"Expected more than 1 value per channel, got {tuple(input.shape)}")
        unbiased = variance.flatten() * (n / (n - 1))
        write_outside("lerp_", running_mean, mean.flatten(), momentum)
        write_outside("lerp_", running_var, unbiased, momentum)
    return _scaled(normal, weight, bias, shape)


def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Do what `torch.nn.functional.layer_norm` does."""
    shape = list(normalized_shape)
    normal, _, _ = _normalized(input, list(range(-len(shape), 0)), eps)
    return _scaled(normal, weight, bias, shape)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Do what `torch.nn.functional.group_norm` does."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    normal, _, _ = _normalized(grouped, [-1], eps)
    shape = [1, -1, *[1] * (input.dim() - 2)]
    return _scaled(normal.reshape(input.shape), weight, bias, shape)


WRITTEN_OUT = {
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    **FUNCTIONS,
}
