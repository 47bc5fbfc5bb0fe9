"""Undo what a call that failed has changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rewriter.naming import modules_in


@contextlib.contextmanager
def restored_on_error(function: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[None]:
    """Put buffers, ``.grad``s and random generators back if the block raises.

    Args:
        function: The loss; the modules it closes over count.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    modules = modules_in(function, args, kwargs)
    buffers = {b: b.detach().clone() for module in modules for b in module.buffers()}
    parameters = [p for module in modules for p in module.parameters()]
    grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]
    generator = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
            for parameter, grad, value in grads:
                parameter.grad = grad
                if grad is not None and value is not None:
                    grad.copy_(value)
        torch.set_rng_state(generator)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        raise
