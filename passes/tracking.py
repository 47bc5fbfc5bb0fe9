"""Let a trace know where each node comes from, through reverse passes of any order.

PyTorch's interpreter hands a node's metadata to what is recorded while the node runs. A reverse
pass runs no nodes; but every operator of autograd's graph can carry a hook, which puts the metadata
of the node that made the operator in force while it runs backwards, and hangs itself on what that
makes in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import get_current_meta, has_preserved_node_meta, set_current_meta
from torch.utils import _pytree as pytree

from passes.inlining import can_record, record_call
from passes.origin import KEY, Mark
from passes.tracing import wrapped_by

_CARRIED = ("stack_trace", "nn_module_stack", "custom")
_reverse = [Mark(role="gradient")]


class Tracked(Interpreter):
    """Run a graph; a trace of it knows of each node, and of its reverse passes, where it is
    from.

    Args:
        module: The graph.
        like: The role and the site of all of it; where empty, each node's own.
        derivatives: Functions that the graph calls to run a reverse pass over what it has computed.
    """

    def __init__(
        self, module: GraphModule, like: Mark | None = None, derivatives: Collection[Any] = ()
    ) -> None:
        super().__init__(module)
        self.like, self.derivatives = like or Mark(), derivatives

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if n.op not in ("placeholder", "get_attr", "output"):
            with set_current_meta(n):
                follow(pytree.tree_leaves(out))
        return out

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.like.role or self.like.site:
            _put_in_force(dict(get_current_meta()), self.like.role)
        if target not in self.derivatives:
            return super().call_function(target, args, kwargs)
        ends = pytree.tree_leaves(args[0] if args else kwargs["outputs"])
        with reverse_pass("cotangent", ends):
            return super().call_function(target, args, kwargs)


def run(module: GraphModule, inputs: Sequence[Any], derivatives: Collection[Any] = ()) -> Any:
    """Run a graph; a trace of it knows of each node where it is from. See `Tracked`."""
    if not has_preserved_node_meta():
        return module(*inputs)
    return Tracked(module, derivatives=derivatives).run(*inputs)


def run_flat(module: GraphModule, inputs: Sequence[Any]) -> Any:
    """Run a graph whose own operators nothing differentiates, as `run` does; a trace copies it
    where it can."""
    return record_call(module, inputs) if can_record(module, inputs) else run(module, inputs)


def run_reverse(module: GraphModule, inputs: Sequence[Any], *, keep_role: bool = False) -> Any:
    """Run a graph that stands for a part of the reverse pass which is running, as `run` does.

    Args:
        module: The graph.
        inputs: What it takes.
        keep_role: Whether its nodes keep their own roles.
    """
    if not has_preserved_node_meta():
        return module(*inputs)
    now = _reverse[-1]
    if keep_role and not now.site and can_record(module, inputs):
        return record_call(module, inputs)
    return Tracked(module, Mark(role="" if keep_role else now.role, site=now.site)).run(*inputs)


@contextlib.contextmanager
def reverse_pass(role: str, ends: Sequence[Any], site: str = "") -> Iterator[None]:
    """Note of what a trace records inside the ``with`` block that it is a reverse pass.

    Args:
        role: What it computes, see `passes.origin.ROLES`.
        ends: What is differentiated.
        site: The site that it computes; that of the node which is running, if none is given.
    """
    if not has_preserved_node_meta():
        yield
        return
    before = dict(get_current_meta())
    _reverse.append(Mark(role=role, site=site or _running().site))
    try:
        for end in ends:
            if isinstance(end, Tensor) and end.grad_fn is not None:
                known: Any = end.grad_fn.metadata
                _put_in_force(known.get(KEY, {}), role)
                break
        yield
    finally:
        _reverse.pop()
        now = get_current_meta()
        now.clear()
        now.update(before)


@contextlib.contextmanager
def acting(node: Node, role: str) -> Iterator[None]:
    """Note of what a trace records inside the ``with`` block that it comes from a node, in another
    role."""
    running = _running()
    with set_current_meta(node):
        if has_preserved_node_meta():
            _put_in_force(node.meta, role, running.site)
        yield


def _running() -> Mark:
    """Return what is noted of the node whose metadata are in force."""
    return (get_current_meta().get("custom") or {}).get(KEY) or Mark()


def _put_in_force(meta: dict[str, Any], role: str, site: str = "") -> None:
    now = get_current_meta()
    for key in _CARRIED:
        now.pop(key, None)
        if key in meta:
            now[key] = meta[key]
    custom = meta.get("custom") or {}
    mark: Mark = custom.get(KEY) or Mark()
    mark = Mark(role=role or mark.role, site=_reverse[-1].site or site or mark.site)
    now["custom"] = {**custom, KEY: mark}


def follow(values: Sequence[Any]) -> None:
    """Let a trace know where reverse passes over ``values`` are from: hang hooks on the operators
    of autograd's graph that lead to them and have none.

    Args:
        values: What the node whose metadata are in force has computed.
    """
    if not has_preserved_node_meta():
        return
    meta = {key: value for key, value in get_current_meta().items() if key in _CARRIED}
    tensors = [inner for x in values if isinstance(x, Tensor) for inner in wrapped_by(x)]
    stack: list[Any] = [x.grad_fn for x in tensors]
    while stack:
        operator = stack.pop()
        if operator is None or KEY in operator.metadata:
            continue
        operator.metadata[KEY] = meta
        operator.register_prehook(_entering(meta))
        operator.register_hook(_leave)
        stack.extend(following for following, _ in operator.next_functions)


def _entering(meta: dict[str, Any]) -> Callable[..., None]:
    def enter(cotangents: Any) -> None:
        if has_preserved_node_meta():
            _put_in_force(meta, _reverse[-1].role)

    return enter


def _leave(gradients: Any, cotangents: Any) -> None:
    # What stays in force serves the sum of this gradient with others of the same tensor.
    if torch.is_grad_enabled():
        follow(gradients)
