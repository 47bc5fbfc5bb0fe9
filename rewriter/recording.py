"""Run a loss once and record every call of PyTorch that it makes: the form in which Dynamo would
have captured it, without a look at its Python.

Real tensors are computed, so that host code has values to work on. Beside each there is a fake one,
on which the same call is made: a call that reads a value shows itself there, because a fake tensor
has none. What may be read, and thereby become part of the graph, are values that depend on nothing
that can change without notice (`Recording._read`).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.convolutions import any_size_differentiable
from rewriter import stateful
from rewriter.as_written import gradients_of
from rewriter.errors import CaptureError
from rewriter.flags import set_requires_grad
from rewriter.generators import Generators
from rewriter.host_calls import (
    CONSTANTS,
    FROM_DATA,
    METHODS,
    READERS,
    REFUSED,
    any_wrapped,
    is_in_place,
    is_same_plain,
    line_of,
    mapped,
    name_of,
    stack_trace,
    storage_of,
    tensors_in,
    users_frames,
)
from rewriter.sizes import Sizes, enlarged, fix, folded, has_symbolic, numbers
from rewriter.stateful import without_saved_tensor_hooks, write_outside

_C: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_AUTOGRAD: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]

MAX_READ = 2**20  # elements of an input whose value may be part of what is recorded


@dataclass(eq=False)
class Input:
    """A tensor that a loss reads and has not made.

    Attributes:
        tensor: The user's tensor.
        node: Its placeholder.
        name: What to call it.
        is_argument: Whether it was passed to the loss.
        is_constant: Whether it is no one's: a value that was burnt in.
        value: What it holds.
        requires_grad: Whether it requires grad.
        version: How often it had been written to when it was found.
        start: What it held in this run.
        final: What it held in the end of this run.
        was_read: Whether host code has read it, so that the recording holds for this value only.
        written: Whether the loss has written to it.
    """

    tensor: Tensor
    node: Node
    name: str
    is_argument: bool
    is_constant: bool
    value: Tensor
    requires_grad: bool
    version: int
    start: Tensor
    final: Tensor
    was_read: bool = False
    written: bool = False

    @property
    def has_any_size(self) -> bool:
        """Whether the recording need not fix its sizes."""
        is_data = self.is_argument and not isinstance(self.tensor, nn.Parameter)
        return is_data and self.value.is_contiguous()


class Recording(TorchFunctionMode):
    """Record the calls of PyTorch that are made inside of the ``with`` block.

    Args:
        known: Tensors that were there before, by id: their names, and whether they are arguments.
        fixed: Ids of tensors that keep their values, of those that the recording may change.
        shake: Whether inputs get other values than they have.
        sizes: What sizes arguments get, in the order in which they are met (those they have if
            nothing is said), if the recording may hold for any; None if it holds for one.
    """

    def __init__(
        self,
        known: Mapping[int, tuple[str, bool]],
        fixed: set[int],
        *,
        shake: bool,
        sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.known, self.fixed, self.shake = known, fixed, shake
        self.graph = Graph()
        self.sizes = None if sizes is None else Sizes(self.graph, sizes)
        env = None if self.sizes is None else self.sizes.env
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
        self.inputs: list[Input] = []
        self.input_of: dict[Node, Input] = {}
        self.entries: dict[int, tuple[Any, Node]] = {}  # id → the object, kept alive, and its node
        self.sources: dict[int, frozenset[Any]] = {}  # storage → inputs its content depends on
        self.refused: CaptureError | None = None
        self.hooked: set[int] = set()
        self.is_busy = False
        self.cleanup = contextlib.ExitStack()
        self.noise = torch.Generator().manual_seed(17)
        self.last_placeholder: Node | None = None
        self.modules: list[tuple[str, type]] = []  # whose forward runs, innermost last

    # what is known of a tensor

    def node_of(self, x: Tensor) -> Node:
        """Return the node that stands for a tensor; a new input if it was made elsewhere."""
        found = self.entries.get(id(x))
        return found[1] if found is not None else self._found(x)

    def shadow_of(self, x: Tensor) -> Tensor:
        """Return the fake tensor beside a tensor."""
        return self.node_of(x).meta["example_value"]

    def depends_on(self, tensors: Any) -> frozenset[Any]:
        """Return the inputs, and ``"draw"``, that the values of ``tensors`` depend on."""
        found: set[Any] = set()
        for x in tensors:
            self.node_of(x)
            found.update(self.sources.get(storage_of(x), ()))
        return frozenset(found)

    def _enter(self, x: Any, node: Node, shadow: Any, sources: frozenset[Any]) -> None:
        node.meta["example_value"] = shadow
        if isinstance(x, Tensor):
            self.entries[id(x)] = (x, node)
            at = storage_of(x)
            self.sources[at] = self.sources.get(at, frozenset()) | sources

    def _placeholder(self, name: str) -> Node:
        last = self.last_placeholder
        with self.graph.inserting_after(last) if last else self.graph.inserting_before():
            node = self.graph.placeholder(f"input_{len(self.inputs)}")
        self.last_placeholder = node
        node.meta["grapharg"] = SimpleNamespace(source=SimpleNamespace(name=name))
        return node

    def _found(self, x: Tensor) -> Node:
        with stateful.outside_transforms():
            return self._taken(x)

    def _taken(self, x: Tensor) -> Node:
        """Take a tensor that was made elsewhere as an input, and give it memory of its own until
        the recording is over."""
        if type(x) not in (Tensor, nn.Parameter, nn.Buffer):
            raise CaptureError(f"a tensor of type {type(x).__name__}", self.here())
        if stateful.is_wrapped(x):
            raise CaptureError("a tensor made by a transform without notice", self.here())
        if x.layout is not torch.strided:
            raise CaptureError("a tensor that is not strided", self.here())
        name, is_argument = self.known.get(id(x), ("", False))
        node = self._placeholder(name or "a tensor found by the loss")
        entry = Input(
            tensor=x,
            node=node,
            name=name,
            is_argument=is_argument,
            is_constant=False,
            value=x.detach().clone(),
            requires_grad=x.requires_grad,
            version=x._version,
            start=x,
            final=x,
        )
        shape: Any = list(x.shape)
        strides: Any = x.stride()
        if self.sizes is not None and entry.has_any_size:
            shape = self.sizes.shape_of(entry, node)
            strides = make_contiguous_strides_for(shape)
        self._swap(entry, numbers(shape))
        with self.mode:
            shadow = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
        shadow.requires_grad_(x.requires_grad)
        self.inputs.append(entry)
        self.input_of[node] = entry
        self._enter(x, node, shadow, frozenset([entry]))
        return node

    def _swap(self, entry: Input, shape: list[int]) -> None:
        x, original = entry.tensor, entry.tensor.data
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        extent = extent if x.numel() else 0
        own = original.as_strided((extent,), (1,), x.storage_offset()).clone()
        if self.shake and id(x) not in self.fixed and own.is_floating_point():
            noise = torch.rand(own.shape, generator=self.noise)
            own.mul_(1 + 0.05 * noise.to(own.device, own.dtype))
        own = own.as_strided(x.shape, x.stride())
        if shape != list(x.shape):
            own = enlarged(own, shape)
        entry.start = own.clone()
        is_leaf = x.is_leaf

        def restore() -> None:
            entry.final = x.detach()
            entry.written = x._version != entry.version
            x.data = original
            if is_leaf and x.requires_grad != entry.requires_grad:
                x.requires_grad_(entry.requires_grad)

        self.cleanup.enter_context(torch.autograd._unsafe_preserve_version_counter(x))
        self.cleanup.callback(restore)
        if x._backward_hooks:
            # They are run when the caller differentiates the loss.
            self.hooked.add(id(x))
            self.cleanup.callback(x._backward_hooks.update, dict(x._backward_hooks))
            x._backward_hooks.clear()
        x.data = own

    def refuse(self, reason: str) -> CaptureError:
        """Return the error to raise; the user's code may catch it, and is refused all the same."""
        self.refused = self.refused or CaptureError(reason, self.here())
        return self.refused

    def here(self) -> str:
        """Return ``file:line: code`` of the user's innermost line."""
        return line_of(users_frames())

    # recording

    @contextlib.contextmanager
    def busily(self, is_busy: bool = True) -> Iterator[None]:
        """Say whether calls in the block are part of one that is recorded."""
        before, self.is_busy = self.is_busy, is_busy
        try:
            yield
        except CaptureError as error:
            self.refused = self.refused or error  # the user's code may catch it
            raise
        finally:
            self.is_busy = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.busily():
            return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = name_of(func)
        if func is torch._C._set_grad_enabled:
            self.step(func, args, {})
            return func(*args)
        if name.startswith("__get__"):
            return self._property(name.removeprefix("__get__ "), func, args)
        if name.startswith("__set__"):
            return self._set_property(name.removeprefix("__set__ "), *args)
        if func is Tensor.requires_grad_:
            flag = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
            return self._switch(args[0], flag)
        if func is torch.autograd.grad:
            hooked = [
                x for x in tensors_in((args, kwargs)) if self.node_of(x) and id(x) in self.hooked
            ]
            if hooked or any(
                not i.tensor.is_leaf for i in self.inputs if id(i.tensor) in self.hooked
            ):
                raise CaptureError("an inner derivative that runs a hook on a tensor", self.here())
        if name in REFUSED:
            raise CaptureError(REFUSED[name], self.here())
        if name == "__deepcopy__":
            return self._deepcopy(*args)
        if name in READERS:
            return self._read(func, args, kwargs)
        if func in stateful.WRITTEN_OUT and stateful.is_inside_transform():
            with self.busily(False), self:
                return stateful.WRITTEN_OUT[func](*args, **kwargs)
        if func in FROM_DATA or name == "new_tensor":
            return self.burn(func, args, kwargs)
        if kwargs.get("requires_grad"):
            made = self._call(func, args, {**kwargs, "requires_grad": False})
            return self._switch(made, True)
        if is_in_place(name) and stateful.is_inside_transform() and not any_wrapped(args):
            self.operator(write_outside, (name, *args), kwargs)
            return args[0]
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._index(args[1]), *args[2:])
        return self.operator(func, args, kwargs, name)

    def _index(self, index: Any) -> Any:
        """Write arrays of NumPy in an index as tensors, and masks as the positions they select."""
        items = index if isinstance(index, tuple) else (index,)
        found: list[Any] = []
        for item in items:
            if isinstance(item, numpy.ndarray):
                item = self.burn(torch.from_numpy, (item,), {})
            is_mask = isinstance(item, Tensor) and item.dtype == torch.bool and item.dim()
            if not is_mask or any(_unreadable(source) for source in self.depends_on([item])):
                found.append(item)
                continue
            self._may_read("a mask", [item])
            positions = item.nonzero(as_tuple=True)
            for each in positions:
                self.constant(each)
            found.extend(positions)
        return tuple(found) if isinstance(index, tuple) or len(found) != 1 else found[0]

    def operator(self, func: Any, args: Any, kwargs: Any, name: str = "") -> Any:
        """Call an operator and record it as one node."""
        tensors = tensors_in((args, kwargs))
        if any(isinstance(x, torch.Generator) for x in pytree.tree_leaves((args, kwargs))):
            # Before it moves, in a run that is not to be noticed.
            raise CaptureError(f"{name or func} takes a Generator", self.here())
        for x in tensors:
            self.node_of(x)
        shadow, failed = self._on_shadows(func, args, kwargs)
        draws, versions = Generators.now(), [x._version for x in tensors]
        sources = self.depends_on(tensors)
        try:
            out = func(*numbers(args), **numbers(kwargs))
        except Exception as error:
            text = (str(error).splitlines() or [""])[0]
            self.refused = self.refused or CaptureError(f"{name or func}: {text}", self.here())
            raise
        if failed is not None:
            return self._hidden_read(func, failed, tensors, out)
        made = tensors_in(out)
        if not made and out is not None and not is_in_place(name):
            if is_same_plain(out, numbers(shadow)):
                return folded(shadow)
            self._may_read(name or str(func), tensors)
            return out
        if draws != Generators.now():
            sources |= {"draw"}
        for x, version in zip(tensors, versions, strict=True):
            if x._version != version:
                at = storage_of(x)
                self.sources[at] = self.sources.get(at, frozenset()) | sources
        node = self._node(func, args, kwargs, name)
        self._results(out, shadow, node, sources)
        return out

    def _on_shadows(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Exception | None]:
        """Make the call on fake tensors, first: what must not happen to an input is seen there."""
        own = [self._shadowed(args), self._shadowed(kwargs)]
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.mode)
                stack.enter_context(without_saved_tensor_hooks())
                if self.sizes is not None:
                    stack.enter_context(any_size_differentiable())
                shadow = func(*own[0], **own[1])
        except Exception as error:
            return None, error
        for x in tensors_in((args, kwargs)):
            entry = self.input_of.get(self.node_of(x))
            fake = self.shadow_of(x)
            if entry is not None and (not fake.is_leaf or fake.requires_grad > x.requires_grad):
                raise CaptureError(
                    "the loss writes a value that carries a gradient to one of its inputs",
                    self.here(),
                )
        return shadow, None

    def _shadowed(self, arguments: Any) -> Any:
        return mapped(arguments, lambda x: self.shadow_of(x) if isinstance(x, Tensor) else x)

    def step(self, func: Any, args: Any, kwargs: Any) -> Node:
        """Record a call that is made for its effect on what follows."""
        given = mapped(tuple(args), self._argument)
        node = self.graph.call_function(func, given, dict(kwargs))
        node.meta["stack_trace"] = stack_trace()
        return node

    def _node(self, func: Any, args: Any, kwargs: Any, name: str = "") -> Node:
        args, kwargs = mapped(args, self._argument), mapped(kwargs, self._argument)
        for leaf in pytree.tree_leaves((args, kwargs)):
            if not isinstance(leaf, (Node, slice, *CONSTANTS)):
                raise CaptureError(f"{name or func} takes a {type(leaf).__name__}", self.here())
        method = METHODS.get(func)
        if method == "__setitem__":
            node = self.graph.call_function(operator.setitem, tuple(args))
        elif method is not None:
            node = self.graph.call_method(method, tuple(args), dict(kwargs))
        else:
            node = self.graph.call_function(func, tuple(args), dict(kwargs))
        node.meta["stack_trace"] = stack_trace()
        if self.modules:
            node.meta["nn_module_stack"] = {str(k): m for k, m in enumerate(self.modules)}
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        assert self.sizes is not None
        return self.sizes.node_of(value)

    def _results(self, out: Any, shadow: Any, node: Node, sources: frozenset[Any]) -> None:
        """Take note of what a node has computed, the parts of a tuple as nodes of their own."""
        node.meta["example_value"] = shadow
        if isinstance(out, Tensor):
            if id(out) not in self.entries:
                self._compare(out, shadow)
                self._enter(out, node, shadow, sources)
        elif isinstance(out, (tuple, list)):
            for index, (item, fake) in enumerate(zip(out, shadow, strict=True)):
                if tensors_in(item) and id(item) not in self.entries:
                    part = self.graph.call_function(operator.getitem, (node, index))
                    part.meta["stack_trace"] = node.meta["stack_trace"]
                    self._results(item, fake, part, sources)
        elif tensors_in(out):
            raise CaptureError(f"{node.target} returns a {type(out).__name__}", self.here())

    def _compare(self, out: Tensor, shadow: Any) -> None:
        alike = isinstance(shadow, Tensor) and (out.shape, out.dtype, out.requires_grad) == (
            numbers(shadow.shape),
            shadow.dtype,
            shadow.requires_grad,
        )
        if not alike:
            raise CaptureError(
                f"a result that requires_grad={out.requires_grad}, shape {tuple(out.shape)}: an "
                "input of the loss has a history that the loss looks into, or PyTorch's fake "
                "tensors differ from its real ones",
                self.here(),
            )

    # properties

    def _property(self, name: str, func: Any, args: Any) -> Any:
        if name == "data":
            return self.operator(_AUTOGRAD._get_data_attr, args, {})
        if name == "grad" and self.node_of(args[0]) in self.input_of:
            raise CaptureError("the loss reads .grad of one of its inputs", self.here())
        if name in ("_base", "_backward_hooks"):
            raise CaptureError(f"the loss reads Tensor.{name}", self.here())
        out = func(*args)
        if isinstance(out, Tensor) and name != "grad":
            return self.operator(getattr, (args[0], name), {})
        if self.sizes is not None and isinstance(out, (int, torch.Size)):
            return folded(func(self.shadow_of(args[0])))
        return out

    def _set_property(self, name: str, x: Tensor, value: Any) -> None:
        if name != "requires_grad":
            raise CaptureError(f"the loss assigns Tensor.{name}", self.here())
        self._switch(x, value)

    def _switch(self, x: Tensor, flag: bool) -> Tensor:
        """Record a change of ``requires_grad``."""
        node, shadow = self.node_of(x), self.shadow_of(x)
        if x.requires_grad != flag:
            mark = self.graph.call_function(set_requires_grad, (node, flag))
            mark.meta["stack_trace"] = stack_trace()
            mark.meta["example_value"] = shadow.requires_grad_(flag)
        return x.requires_grad_(flag)

    def _deepcopy(self, x: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(x) in memo:
            return memo[id(x)]
        with self.busily(False), self:
            if not x.is_leaf:
                raise CaptureError("deepcopy of a tensor that has a history", self.here())
            copied = x.detach().clone().requires_grad_(x.requires_grad)
        if isinstance(x, nn.Parameter):
            copied = self.parameter(nn.Parameter, copied, x.requires_grad)
        memo[id(x)] = copied
        return copied

    def parameter(self, kind: Any, data: Tensor, requires_grad: bool) -> nn.Parameter:
        """Make a parameter of a tensor, as the constructor does."""
        detached = self.operator(Tensor.detach, (data,), {}, "detach")
        made = Tensor._make_subclass(kind, detached, False)
        node, shadow = self.node_of(detached), self.shadow_of(detached)
        self._enter(made, node, shadow, self.depends_on([detached]))
        self._switch(made, requires_grad)
        return made

    # values

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Let host code have a value."""
        self._may_read(name_of(func), tensors_in((args, kwargs)))
        return func(*self._fix(args), **self._fix(kwargs))

    def _may_read(self, what: str, tensors: list[Tensor]) -> None:
        """Check that a value can be part of the recording: it depends on nothing, or on tensors
        whose values each later call can be compared with.

        Raises:
            CaptureError: It cannot.
        """
        for source in self.depends_on(tensors):
            why = _unreadable(source)
            if why:
                read = self.node_of(tensors[0])
                raise CaptureError(
                    f"{what} reads the value of node {read.name} ({read.target}), {why}",
                    self.here(),
                )
        for source in self.depends_on(tensors):
            source.was_read = True
        for x in tensors:
            self._fix(self.shadow_of(x).shape)

    def _fix(self, values: Any) -> Any:
        """Replace symbolic numbers by what they are; the recording holds for that only."""
        if self.sizes is not None and has_symbolic(folded(values)):
            self.sizes.asked_at.append(self.here())
        return fix(values)

    def _hidden_read(self, func: Any, failed: Exception, tensors: list[Tensor], out: Any) -> Any:
        """Burn in what was computed by a call that cannot be made without values, if it may read
        them."""
        text = (str(failed).splitlines() or [type(failed).__name__])[0]
        made = tensors_in(out)
        if any(x.requires_grad for x in [*made, *tensors]):
            raise CaptureError(f"{name_of(func)}: {text}", self.here()) from failed
        try:
            self._may_read(name_of(func), tensors)
        except CaptureError as error:
            raise CaptureError(f"{error.reason}: {text}", error.where) from failed
        for x in made:
            if id(x) not in self.entries:
                self.constant(x)
        return out

    def burn(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a tensor from data on the host."""
        tensors = tensors_in((args, kwargs))
        if func in (torch.as_tensor, torch.asarray) and args and isinstance(args[0], Tensor):
            return self.operator(func, args, kwargs, name_of(func))
        if name_of(func) == "new_tensor":
            tensors = tensors[1:]  # of the first one, dtype and device count
        if tensors:
            self._may_read(name_of(func), tensors)
        args, kwargs = self._fix(args), self._fix(kwargs)
        flag = kwargs.get("requires_grad", False)
        made = func(*args, **{**kwargs, "requires_grad": False} if flag else kwargs)
        self.constant(made)
        return self._switch(made, True) if flag else made

    def constant(self, x: Tensor) -> Node:
        """Burn in a tensor: an input that no one else has; the graph works on a copy."""
        node = self._placeholder("a constant of the loss")
        with stateful.outside_transforms():
            value = stateful.unwrapped(x).clone()
            entry = Input(value, node, "", False, True, value, False, 0, value, value)
            with self.mode:
                shadow = torch.empty_strided(
                    value.shape, value.stride(), dtype=x.dtype, device=x.device
                )
        self.inputs.append(entry)
        self.input_of[node] = entry
        node.meta["example_value"] = shadow
        with self.mode:
            copied = shadow.clone()
        copy = self.graph.call_method("clone", (node,))
        copy.meta["stack_trace"] = stack_trace()
        self._enter(x, copy, copied, frozenset())
        return copy

    # the end

    def outputs_of(self, outputs: Any) -> tuple[list[Tensor], list[tuple[str, Any]], list[Input]]:
        """End the graph; return the tensors it computes, what each leaf of the loss's result is,
        and the inputs that the graph takes."""
        leaves = pytree.tree_leaves(outputs)
        tensors: dict[Node, Tensor] = {}
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                tensors[self.node_of(leaf)] = leaf
            elif not isinstance(leaf, CONSTANTS):
                # A symbolic number too: such a loss is recorded for each size.
                raise CaptureError(f"the loss returns a {type(leaf).__name__}")
        used = [i for i in self.inputs if i.node.users or i.node in tensors]
        order = {entry.node: index for index, entry in enumerate(used)}
        for entry in self.inputs:
            if entry.node not in order:
                self.graph.erase_node(entry.node)
        if self.sizes is not None:
            self.sizes.drop_unused()
        computed = [node for node in tensors if node not in order]
        if not computed:
            raise CaptureError("the loss computes no tensors")
        places: list[tuple[str, Any]] = []
        for leaf in leaves:
            node = self.node_of(leaf) if isinstance(leaf, Tensor) else None
            if node is None:
                places.append(("value", leaf))
            elif node in order:
                places.append(("input", order[node]))
            else:
                places.append(("output", computed.index(node)))
        self.graph.output(tuple(computed))
        self.graph.lint()
        return [tensors[node] for node in computed], places, used

    def gradients(self, tensors: list[Tensor]) -> dict[Input, Tensor | None] | None:
        """Return the gradients of the sum of ``tensors``."""
        leaves = [i for i in self.inputs if i.requires_grad or i.tensor.requires_grad]
        try:
            found = gradients_of(tensors, [i.tensor for i in leaves])
        except RuntimeError as error:
            if "not implemented" in str(error):
                return None  # another form stands in for the operator later
            raise CaptureError(f"its backward: {str(error).splitlines()[0]}") from error
        return dict(zip(leaves, found, strict=True))


def _unreadable(source: Any) -> str:
    """Return why host code must not have a value that depends on this; nothing if it may."""
    if source == "draw":
        return "a random draw"
    name = source.name or "a tensor of the loss"
    if source.requires_grad or source.tensor.requires_grad:
        return f"which depends on {name}"
    if source.tensor._version != source.version:
        return f"which depends on {name}, and the loss writes to that"
    if source.tensor.dtype.is_floating_point and source.is_argument:
        return f"which depends on {name}"
    if source.tensor.numel() > MAX_READ:
        return f"which depends on {name}, too large to be compared at each call"
    return ""
