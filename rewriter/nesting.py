"""The steps by which PyTorch opens and closes transforms and dual levels, and takes tensors in and
out of them: the one file that knows where a version keeps them.

They moved between torch 2.11 and 2.13: what a dual level and forward mode are made of was C++ that
is called directly, and became Python in `torch._functorch.predispatch`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._functorch import predispatch

from passes.versions import IS_BEFORE_2_13

_functorch_c: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def _owner(name: str, before: Any) -> Any:
    """Return what PyTorch looks a step up in; ``before`` did until it became Python."""
    return predispatch if hasattr(predispatch, name) else before


LEVELS: Any = _owner("_enter_dual_level", torch._C)
"""What `torch.autograd.forward_ad` calls to enter and exit a dual level."""

DUALS: Any = _owner("_make_dual", torch._VF)
"""What `torch.autograd.forward_ad` calls to make and unpack a dual tensor."""

enter_dual_level: Any = LEVELS._enter_dual_level
exit_dual_level: Any = LEVELS._exit_dual_level
make_dual: Any = DUALS._make_dual
unpack_dual: Any = DUALS._unpack_dual

_forward: Any = _owner("_jvp_increment_nesting", _functorch_c)
jvp_increment_nesting: Any = _forward._jvp_increment_nesting
jvp_decrement_nesting: Any = _forward._jvp_decrement_nesting

unwrap_for_grad: Any = _owner("_unwrap_for_grad", _functorch_c)._unwrap_for_grad


def close_to_depth(depth: int) -> None:
    """Close the innermost transforms until so many are open.

    PyTorch's own function for that takes two away at a time before 2.13, and fails.
    """
    kinds = _functorch_c.TransformType
    close = {
        kinds.Grad: _functorch_c._grad_decrement_nesting,
        kinds.Jvp: _functorch_c._jvp_decrement_nesting,
        kinds.Vmap: _functorch_c._vmap_decrement_nesting,
        kinds.Functionalize: _functorch_c._func_decrement_nesting,
    }
    while _functorch_c.get_dynamic_layer_stack_depth() > depth:
        close[_functorch_c.peek_interpreter_stack().key()]()


@functools.cache
def mend_closing() -> None:
    """Let Dynamo too close transforms rightly after a trace that has failed inside of them."""
    if IS_BEFORE_2_13:
        _functorch_c.pop_dynamic_layer_stack_and_undo_to_depth = close_to_depth
