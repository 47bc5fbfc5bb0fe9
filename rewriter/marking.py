"""Interpret a captured graph; derivatives are marked, all else is run."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import eager_transforms, predispatch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import set_current_meta
from torch.utils import _pytree as pytree

from passes.decompositions import scaled_mask
from passes.everywhere import select_scatter
from passes.graph import reaches, where
from passes.markers import (
    NeedsBatchedPoint,
    function_mark,
    gradient_mark,
    leaf_mark,
    point_mark,
    stop_mark,
    tangent_mark,
)
from passes.tracing import values_unknown
from rewriter import nesting
from rewriter.as_written import is_checkpoint
from rewriter.capture import FROM_DATA, example_of
from rewriter.data import set_data
from rewriter.errors import CaptureError, NeedsNumber
from rewriter.flags import left_on, set_requires_grad
from rewriter.memory import Memory, requires_grad, storages, written_by
from rewriter.numbers import is_number
from rewriter.recurrent import KINDS, layer_by_layer
from rewriter.stateful import MIXES, write_outside
from rewriter.writes import SHARES, Writes, is_part, same_place, with_part

_C: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_AUTOGRAD: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
aten = torch.ops.aten


@dataclass(frozen=True)
class UserFunction:
    """A `torch.autograd.Function` in a captured graph.

    Attributes:
        forward: ``inputs → ((*outputs), (*saved values))``.
        backward: ``(*cotangents, *saved values) → (*gradients)``.
        constant: Positions of the outputs marked as not differentiable.
        is_symbol: For each input, whether it is a symbolic size.
    """

    forward: GraphModule
    backward: GraphModule
    constant: tuple[int, ...]
    is_symbol: tuple[bool, ...]


class Marking(Interpreter):
    """Interpret a captured graph; derivatives are marked, all else is run."""

    def __init__(self, captured: GraphModule, *, expand_points: bool) -> None:
        super().__init__(captured, garbage_collect_values=False)
        self.expand_points = expand_points
        self.functions: list[UserFunction] = []
        self.depth = 0
        self.grad_enabled = True
        self.vmaps: list[tuple[int, int]] = []
        self.level_at: dict[int, int] = {}
        self.duals: list[list[tuple[Tensor, Tensor]]] = []
        self.own_dual_level = False
        self.enabled_outside = True
        self.inside: set[Node] = set()
        self.constants: dict[Node, Any] = {}
        self.memory = Memory(captured.graph)
        self.writes = Writes(captured.graph, self.memory)
        switches = captured.graph.find_nodes(op="call_function", target=set_requires_grad)
        # What a node requires at present, if that changes; an example has the flag of the end.
        self.flags: dict[Node, bool] = {node.args[0]: False for node in switches}
        self.promoted = left_on(captured)
        self.leaves: dict[Node, Any] = {}
        self.renormalised: set[Node] = set()
        self.handlers: dict[Any, Callable[..., Any]] = {
            torch.autograd.grad: self._autograd_grad,
            eager_transforms._autograd_grad: self._func_grad,
            eager_transforms._set_tensor_requires_grad: lambda x: x,
            _C._wrap_for_grad: lambda x, level: self._point(x),
            nesting.unwrap_for_grad: lambda x, level: x,
            _C._grad_increment_nesting: self._enter,
            _C._grad_decrement_nesting: self._leave,
            _C.set_inplace_requires_grad_allowed: lambda allowed: None,
            _AUTOGRAD._saved_tensors_hooks_disable: lambda message: None,
            _AUTOGRAD._saved_tensors_hooks_enable: lambda: None,
            torch._C._set_grad_enabled: self._set_grad_enabled,
            _AUTOGRAD._get_data_attr: self._data,
            torch.nn.functional.batch_norm: self._batch_norm,
            torch.nn.functional.instance_norm: self._instance_norm,
            torch.nn.functional.embedding: self._embedding,
            torch.nn.functional.embedding_bag: self._embedding_bag,
            write_outside: self._write_outside,
            torch.select_scatter: select_scatter,
            torch.nn.functional.dropout: self._dropout,
            torch.nn.functional.rrelu: self._rrelu,
            torch.rrelu: self._rrelu,
            **{
                kind: partial(layer_by_layer, name, dropout=self._dropout)
                for kind, name in KINDS.items()
            },
            nesting.jvp_increment_nesting: self._enter_jvp,
            nesting.jvp_decrement_nesting: self._leave_jvp,
            nesting.enter_dual_level: self._enter_dual_level,
            nesting.exit_dual_level: self._leave_dual_level,
            nesting.make_dual: self._make_dual,
            nesting.unpack_dual: self._unpack_dual,
            torch.autograd.forward_ad._maybe_load_decompositions: lambda: None,
            torch._C._set_fwd_grad_enabled: lambda enabled: None,
            predispatch.lazy_load_decompositions: lambda: None,
            predispatch._vmap_increment_nesting: self._enter_vmap,
            predispatch._vmap_decrement_nesting: self._leave_vmap,
            predispatch._add_batch_dim: self._add_batch_dim,
            predispatch._remove_batch_dim: self._remove_batch_dim,
        }

    # nodes

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        node = self.node_running
        if node in self.flags:
            # What is computed from the input before `requires_grad_()` does not carry its gradient.
            value = self.writes.leaf(node, value)
            self.leaves[node] = value
            return stop_mark(value)
        example = example_of(node)
        if isinstance(example, Tensor) and example.requires_grad:
            return self.writes.leaf(node, value)
        return value

    def run_node(self, n: Node) -> Any:
        self.node_running = n
        if n.target is set_requires_grad or (
            n.op == "call_method" and n.target == "requires_grad_"
        ):
            with set_current_meta(n):
                return self._set_requires_grad(n)
        if self._stops_one_mode(n):
            raise CaptureError("no_grad inside of forward mode", where(n))
        self._stop_what_a_transform_returns(n)
        if n.op == "output":
            self.writes.finish()
        targets = self.writes.targets(n)
        if targets:
            return self._write(n, targets)
        out = self._executed(n)
        if n.op == "output":
            return out
        stops = n.op not in ("placeholder", "get_attr") and self._stops(n)
        self.memory.add(n, copied=stops or n.target in _COPIES)
        return pytree.tree_map_only(Tensor, _stopped, out) if stops else out

    def _executed(self, n: Node) -> Any:
        try:
            with self._constants_read(n):
                return super().run_node(n)
        except (CaptureError, NeedsBatchedPoint):
            raise
        except Exception as error:
            if any(map(is_number, n.all_input_nodes)):
                raise NeedsNumber("a Python number is needed", where(n)) from error
            raise CaptureError(f"{n.target}: {str(error).splitlines()[0]}", where(n)) from error

    def _write(self, n: Node, targets: list[Node]) -> Any:
        """Write, and let all that has the same memory as written have the new values."""
        parted = self.memory.parted(n)
        if n.target is set_data:
            return self._set_data(n, *n.args)
        constant = [w for w in targets if not self.grad_enabled and self._requires_grad(w)]
        if self.depth and (constant or parted):
            raise CaptureError(SHARES if parted else _UNDER_NO_GRAD, where(n))
        self.writes.check_joined(n)
        own = {w: self.env[w] for w in constant}
        for w in constant:
            self.env[w] = stop_mark(own[w])
        out = self._executed(n)
        for w in constant:
            new, self.env[w] = self.env[w], own[w]
            self.writes.set(own[w], new)
        for w in targets:
            self.writes.note(w)
            self._keep_while_off(w)
        self._pass_on(n, parted)
        returned = [w for w in targets if example_of(w) is example_of(n)]
        self.memory.add(n, copied=False)
        return self.env[returned[0]] if returned else out

    def _keep_while_off(self, node: Node) -> None:
        """Let a leaf whose flag is off at present hold what was written to it when it is on
        again."""
        if node in self.leaves and not self.flags[node]:
            self.writes.set(self.leaves[node], self.env[node])

    def _pass_on(self, n: Node, parted: list[tuple[Node, Node]]) -> None:
        """Let what shares memory with what was written to as written, but not here, have the new
        values; a derivative stops on the way.

        Raises:
            CaptureError: It is another part of the memory.
        """
        done: set[Node] = set()
        for target, other in parted:
            owner = self.memory.owner[other]
            if owner in done:
                continue
            done.add(owner)
            news, olds = (self._sharing(target, one) for one in (self.memory.owner[target], owner))
            whole = next(((a, b) for a in news for b in olds if same_place(a, b)), None)
            part = next((b for b in olds if is_part(target, b)), None)
            if whole is not None:
                new, old = self.env[whole[0]], whole[1]
            elif part is not None:
                new, old = with_part(self.env[part], self.env[target], target, part), part
            else:
                raise CaptureError(SHARES, where(n))
            self.writes.note(old)
            if self._requires_grad(old):
                if self.memory.owner[target].target is _AUTOGRAD._get_data_attr:
                    self.writes.check_behind(n, [old])
                self.writes.set(self.env[old], new)
            else:
                self.env[old].copy_(stop_mark(new))
                self._keep_while_off(old)

    def _sharing(self, target: Node, owner: Node) -> list[Node]:
        """Return the values that have the same memory as ``target`` as written, and here that of
        ``owner``."""
        known = {n for storage in storages(target) for n in self.memory.at.get(storage, ())}
        return [
            n
            for n in sorted(known, key=self.memory.position.__getitem__)
            if self.memory.owner[n] is owner and isinstance(example_of(n), Tensor) and n in self.env
        ]

    def _set_data(self, n: Node, x: Any, value: Any) -> Any:
        """Do what ``x.data = value`` does: other names of the memory keep the old values."""
        if self.depth:
            raise CaptureError("x.data is assigned inside of a transform", where(n))
        here = {other for storage in storages(x) for other in self.memory.at.get(storage, ())}
        shared = {o for o in here - {x} if self.memory.owner[o] is self.memory.owner[x]}
        if any(self.memory.position[u] > self.memory.position[n] for o in shared for u in o.users):
            raise CaptureError(SHARES, where(n))
        self.writes.check_joined(n)
        self.writes.note(x)
        if self._requires_grad(x):
            self.writes.check_behind(n, [x])
            self.writes.set(self.env[x], self.env[value])
        else:
            self.env[x].copy_(stop_mark(self.env[value]))
            self._keep_while_off(x)
        self.writes.join(x, value)
        self.memory.add(n, copied=False)
        return self.env[x]

    def _stop_what_a_transform_returns(self, node: Node) -> None:
        """Stop, where it is read outside, what a transform under `no_grad` has computed: inside of
        it gradients are on, so that nothing was stopped there."""
        if self.depth:
            if not self.enabled_outside:
                self.inside.add(node)
            return
        self.enabled_outside = self.grad_enabled
        for read in self.inside.intersection(node.all_input_nodes):
            if not self._requires_grad(read):
                self.env[read] = pytree.tree_map_only(Tensor, _stopped, self.env[read])
                self.memory.add(read, copied=True)
            self.inside.discard(read)

    def _stops(self, node: Node) -> bool:
        """Whether a gradient that comes into a node does not leave it."""
        if self.grad_enabled:
            return self.depth == 0 and self._is_cut(node)
        if self.duals:
            # Forward mode does not stop at no_grad; what leaves it is stopped outside.
            return False
        # A stop is a copy: where nothing comes in, the memory is better shared as it is as written.
        return any(map(self._requires_grad, node.all_input_nodes))

    def _requires_grad(self, node: Node) -> bool:
        """Whether the value of a node carries a gradient at present."""
        flag = self.flags.get(node)
        return requires_grad(example_of(node)) if flag is None else flag

    def _is_cut(self, node: Node) -> bool:
        """Whether autograd, run by Dynamo on fake tensors, found no gradient to pass where one
        comes in."""
        out = example_of(node)
        if not isinstance(out, Tensor) or out.requires_grad or not out.dtype.is_floating_point:
            return False
        return any(
            getattr(example_of(read), "requires_grad", False)
            if read not in self.flags
            else self.flags[read]
            for read in node.all_input_nodes
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in FROM_DATA and not self.node_running.all_input_nodes:
            # Else it is a view, and a stop, of a constant: what is added to it would stop there.
            return super().call_function(target, args, kwargs).clone()
        handler = self.handlers.get(target)
        if handler is not None:
            return handler(*args, **kwargs)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._higher_order(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "select_scatter":
            return select_scatter(*args, **kwargs)
        if target == "fill_diagonal_":
            return _fill_diagonal(*args, **kwargs)
        return super().call_method(target, args, kwargs)

    def _higher_order(self, target: Any, args: Any, kwargs: Any) -> Any:
        if is_checkpoint(target):
            body, *inputs = args
            return self._inlined(body, inputs)
        if target.name() == "autograd_function_apply":
            return self._user_function(*args, **kwargs)
        raise CaptureError(f"{target.name()} is not understood yet", where(self.node_running))

    def _inlined(self, body: GraphModule, inputs: list[Any]) -> Any:
        """Interpret a graph that the captured graph calls, with all that is open around it."""
        inner = Marking(body, expand_points=self.expand_points)
        for shared in (
            "depth",
            "grad_enabled",
            "vmaps",
            "level_at",
            "duals",
            "functions",
        ):
            setattr(inner, shared, getattr(self, shared))
        return inner.run(*inputs, enable_io_processing=False)

    def _user_function(
        self, forward: GraphModule, backward: GraphModule, *inputs: Any, **options: Any
    ) -> Any:
        here = where(self.node_running)
        written = [w for node in forward.graph.nodes for w in written_by(node)]
        if options.get("dirty_idx") or any(w.op == "placeholder" for w in written):
            raise CaptureError("a user-defined autograd.Function that writes to its inputs", here)
        if self.duals:
            raise CaptureError("forward mode through a user-defined autograd.Function", here)
        outputs, _ = forward(*inputs)
        like = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        if not all(isinstance(u, Tensor) for u in like):
            raise CaptureError("a user-defined autograd.Function that returns no tensor", here)
        is_symbol = tuple(not isinstance(x, Tensor) for x in inputs)
        constant = tuple(options["non_differentiable_idx"])
        self.functions.append(UserFunction(forward, backward, constant, is_symbol))
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        sizes = [x for x in inputs if not isinstance(x, Tensor)]
        results = function_mark(tensors, sizes, list(like), len(self.functions) - 1)
        return results if isinstance(outputs, (tuple, list)) else results[0]

    def _set_requires_grad(self, node: Node) -> Any:
        source = node.args[0]
        assert isinstance(source, Node)
        flag = node.args[1] if len(node.args) > 1 else node.kwargs.get("requires_grad", True)
        self.flags[source] = bool(flag)
        if source in self.leaves and flag:
            # The same leaf as before: what was computed from it leads to it still.
            self.env[source] = self.leaves[source]
        else:
            with values_unknown():
                self.env[source] = (leaf_mark if flag else stop_mark)(self.env[source])
            self.memory.add(source, copied=True)
        if flag and source not in self.leaves:
            self.env[source] = self.writes.leaf(source, self.env[source])
            self.leaves[source] = self.env[source]
        self.memory.add(node, copied=True)
        self.memory.owner[source] = node  # names from before are apart from now on
        return self.env[source]

    def _data(self, x: Tensor) -> Tensor:
        """Stop gradients; ``detach()`` does so at each level of the transforms around it, ``data``
        at the innermost only."""
        (read,) = self.node_running.all_input_nodes
        if self.depth and requires_grad(example_of(read)):
            raise CaptureError(
                "x.data inside of a transform, where x.detach() is meant", where(self.node_running)
            )
        return stop_mark(x)

    def _set_grad_enabled(self, enabled: bool) -> None:
        if self.duals and not enabled and self.enabled_outside:
            # Forward mode does not stop at no_grad, reverse mode does.
            raise CaptureError("no_grad inside of forward mode", where(self.node_running))
        self.grad_enabled = enabled

    def _pullbacks(self) -> int:
        """Return how many transforms in reverse mode are open."""
        return self.depth - len(self.vmaps) - len(self.duals)

    @contextlib.contextmanager
    def _constants_read(self, node: Node) -> Iterator[None]:
        """Let a node inside of forward mode under `no_grad` read constants, for the time being:
        nothing there has a pullback, so that the tangents are all that is computed."""
        read: dict[Node, Any] = {}
        if self.duals and not self.enabled_outside:
            outside = set(node.all_input_nodes) - self.inside
            read = {x: self.env[x] for x in outside if self._requires_grad(x)}
        for each, value in read.items():
            if each not in self.constants:
                self.constants[each] = pytree.tree_map_only(Tensor, _stopped, value)
            self.env[each] = self.constants[each]
        yield
        for each in set(read) & set(self.env):
            self.env[each] = read[each]

    def _stops_one_mode(self, node: Node) -> bool:
        """Whether a node, under `no_grad`, would stop a derivative in reverse mode that is taken
        inside of one in forward mode, which goes on."""
        if self.grad_enabled or not self.duals or not self._pullbacks():
            return False
        if node.target in self.handlers:  # a transform that is being closed
            return False
        return any(map(self._requires_grad, node.all_input_nodes))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Normalise; in train mode write the running statistics as a step of its own, so that it
        becomes functional."""
        # Nothing has no statistics: PyTorch leaves the running ones as they are.
        if not training or running_mean is None or running_var is None or x.numel() == 0:
            return torch.nn.functional.batch_norm(
                x, running_mean, running_var, weight, bias, training, momentum, eps
            )
        normal, _, _, mean, var = aten._native_batch_norm_legit_functional(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        running_mean.copy_(stop_mark(mean))
        running_var.copy_(stop_mark(var))
        return normal

    def _instance_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Normalise each sample by itself; the running statistics take the mean over samples."""
        if not use_input_stats or running_mean is None or running_var is None:
            return torch.nn.functional.instance_norm(
                x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
            )
        n, channels = x.shape[:2]
        one = x.reshape(1, n * channels, *x.shape[2:])
        repeated = [
            None if p is None else p.repeat(n) for p in (weight, bias, running_mean, running_var)
        ]
        normal, _, _, mean, var = aten._native_batch_norm_legit_functional(
            one, *repeated, True, momentum, eps
        )
        running_mean.copy_(stop_mark(mean.reshape(n, channels).mean(0)))
        running_var.copy_(stop_mark(var.reshape(n, channels).mean(0)))
        return normal.reshape(x.shape)

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        *options: Any,
        **named: Any,
    ) -> Tensor:
        self._renormalise(weight, input, max_norm, norm_type)
        return F.embedding(input, weight, padding_idx, None, norm_type, *options, **named)

    def _embedding_bag(
        self,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        *options: Any,
        **named: Any,
    ) -> Tensor:
        self._renormalise(weight, input, max_norm, norm_type)
        return F.embedding_bag(input, weight, offsets, None, norm_type, *options, **named)

    def _renormalise(
        self, table: Tensor, rows: Tensor, max_norm: float | None, norm_type: float
    ) -> None:
        """Write the rows that are looked up, made shorter, to the table, as its new value: a
        derivative with respect to the table is one at that value."""
        if max_norm is None:
            return
        if self.vmaps:
            raise CaptureError("max_norm of an embedding under vmap", where(self.node_running))
        self.renormalised.update(written_by(self.node_running))
        old = stop_mark(table)
        new = aten.embedding_renorm.default(old, rows.contiguous(), max_norm, norm_type)
        table.copy_(stop_mark(new) + (table - old))

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Do what `dropout` does, with a draw that does not depend on the value of ``x``."""
        if not training or p in (0, 1):
            return torch.nn.functional.dropout(x, p, training, inplace)
        mask = scaled_mask(x, p, in_memory_order=self.depth == 0)
        return x.mul_(mask) if inplace else x * mask

    def _rrelu(
        self,
        x: Tensor,
        lower: float = 1 / 8,
        upper: float = 1 / 3,
        training: bool = False,
        inplace: bool = False,
    ) -> Tensor:
        """``x`` times a slope that was drawn; PyTorch's functional form has a wrong derivative."""
        if not training:
            return torch.nn.functional.rrelu(x, lower, upper, training, inplace)
        drawn = aten.rrelu_with_noise_functional(
            stop_mark(x), torch.empty_like(x), lower, upper, training
        )
        return x.mul_(drawn[1]) if inplace else x * drawn[1]

    def _write_outside(self, name: str, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        stopped = [stop_mark(a) if _is_float_tensor(a) else a for a in arguments]
        try:
            getattr(x, name)(*stopped, **options)
        except RuntimeError as error:
            raise CaptureError(MIXES, where(self.node_running)) from error
        return torch.zeros((), dtype=x.dtype)

    # transforms

    def _enter(self) -> None:
        self.depth += 1

    def _leave(self) -> None:
        self.depth -= 1

    def _enter_jvp(self) -> None:
        if not self.grad_enabled and self._pullbacks():
            raise CaptureError(
                "forward mode under no_grad inside of reverse mode", where(self.node_running)
            )
        self.depth += 1
        self.duals.append([])

    def _leave_jvp(self) -> None:
        self.depth -= 1
        self.duals.pop()
        if not self.duals:
            self.constants.clear()

    def _enter_dual_level(self) -> None:
        """A level of its own if the user opened it; `torch.func.jvp` opens one for all of its
        nested levels."""
        self.own_dual_level = not self.duals
        if self.own_dual_level:
            self._enter_jvp()

    def _leave_dual_level(self, level: int) -> None:
        if self.own_dual_level:
            self._leave_jvp()

    def _enter_vmap(self, batch_size: Any, randomness: str) -> None:
        self.depth += 1
        level = predispatch._vmap_increment_nesting(batch_size, randomness)
        self.level_at[self.depth] = level
        self.vmaps.append((level, batch_size))

    def _leave_vmap(self) -> None:
        self.depth -= 1
        self.vmaps.pop()
        predispatch._vmap_decrement_nesting()

    def unwind(self) -> None:
        """Leave the transforms that an error left open."""
        while self.vmaps:
            self._leave_vmap()
        self.duals.clear()

    def _add_batch_dim(self, x: Tensor, dim: int, level: int) -> Tensor:
        return predispatch._add_batch_dim(x, dim, self.level_at[level])

    def _remove_batch_dim(self, x: Tensor, level: int, batch_size: Any, dim: int) -> Tensor:
        return predispatch._remove_batch_dim(x, self.level_at[level], batch_size, dim)

    def _point(self, x: Tensor) -> Tensor:
        anchors = [
            predispatch._add_batch_dim(torch.zeros(size), 0, level)
            for level, size in (self.vmaps if self.expand_points else ())
        ]
        with values_unknown():
            return point_mark(x, anchors)

    # derivatives

    def _make_dual(self, x: Tensor, direction: Tensor, level: int = 0) -> Tensor:
        point = self._point(x)
        self.duals[-1].append((point, direction))
        return point

    def _unpack_dual(self, y: Tensor, level: int = 0) -> tuple[Tensor, Any]:
        node = self.node_running
        if self.own_dual_level and _is_unpacked_again(node):
            raise CaptureError(
                "the primal of an unpacked dual tensor enters another one", where(node)
            )
        if example_of(node)[1] is None:
            return y, None
        points, directions = zip(*self.duals[-1], strict=True)
        (moved,) = tangent_mark([y], list(points), list(directions), 0)
        return y, moved

    def _autograd_grad(
        self,
        outputs: Any,
        inputs: Any,
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        only_inputs: bool = True,
        allow_unused: bool | None = None,
        is_grads_batched: bool = False,
        materialize_grads: bool = False,
    ) -> tuple[Any, ...]:
        grads = self._marked(outputs, inputs, grad_outputs, int(is_grads_batched))
        return grads if create_graph else tuple(g if g is None else stop_mark(g) for g in grads)

    def _func_grad(
        self,
        outputs: Any,
        inputs: Any,
        grad_outputs: Any = None,
        retain_graph: bool = False,
        create_graph: bool = True,
    ) -> tuple[Any, ...]:
        return self._marked(outputs, inputs, grad_outputs, 0)

    def _marked(
        self, outputs: Any, inputs: Any, grad_outputs: Any, seed_dims: int
    ) -> tuple[Any, ...]:
        """Mark the derivatives that are not None; Dynamo ran autograd on fake tensors and knows
        which are."""
        outputs, inputs = _as_list(outputs), list(map(self.writes.point, _as_list(inputs)))
        seeds = [None] * len(outputs) if grad_outputs is None else _as_list(grad_outputs)
        seeds = [
            torch.ones_like(u) if seed is None else seed
            for u, seed in zip(outputs, seeds, strict=True)
        ]
        examples = example_of(self.node_running)
        reached = [i for i, example in enumerate(examples) if example is not None]
        if not reached:
            return (None,) * len(inputs)
        marked = gradient_mark(outputs, [inputs[i] for i in reached], seeds, seed_dims)
        found = dict(zip(reached, marked, strict=True))
        for i in reached:
            if examples[i].dim() != found[i].dim():
                # `materialize_grads` makes one zero, also where the seeds are a batch.
                found[i] = torch.zeros_like(inputs[i])
        return tuple(found.get(i) for i in range(len(inputs)))


def refuse_no_grad_in_transforms(captured: GraphModule) -> None:
    """Check a capture with pullbacks in place of forward mode: `no_grad` stops only pullbacks.

    Raises:
        CaptureError: A transform's body computes with gradients switched off.
    """
    depth, enabled = 0, True
    for node in captured.graph.nodes:
        if node.target is _C._grad_increment_nesting:
            depth += 1
        elif node.target is _C._grad_decrement_nesting:
            depth -= 1
        elif node.target is torch._C._set_grad_enabled:
            enabled = node.args[0]
        elif depth and not enabled and node.target not in _CLOSING and _reads_gradients(node):
            raise CaptureError("no_grad inside of forward mode", where(node))


def _reads_gradients(node: Node) -> bool:
    return any(requires_grad(example_of(n)) for n in node.all_input_nodes)


def _is_unpacked_again(node: Node) -> bool:
    """Whether the primal that this node unpacks, which moves no more, takes part in what a later
    node unpacks."""
    primals = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    return any(user.target is node.target for user in reaches(primals))


def _as_list(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _is_float_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def _fill_diagonal(x: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    """Do what ``x.fill_diagonal_`` does through views, which can be made functional."""
    tall = x.dim() == 2 and wrap
    for start in range(0, x.shape[0], x.shape[1] + 1) if tall else (0,):
        along = x[start:].diagonal() if tall else x.diagonal()
        while along.dim() > 1:
            along = along.diagonal(dim1=0, dim2=-1)
        along.fill_(fill_value)
    return x


def _stopped(x: Tensor) -> Tensor:
    return stop_mark(x) if _is_float_tensor(x) else x


# What a transform does with the results of its body.
_CLOSING = {_C._unwrap_for_grad, nesting.unwrap_for_grad, eager_transforms._autograd_grad}

_UNDER_NO_GRAD = "an in-place write under no_grad to a tensor that requires grad"

# What returns a copy here, and as written the tensor itself or a part of it.
_COPIES = {_AUTOGRAD._get_data_attr}
