"""How a module's call finds its tower: through its class, by the module that is called.

A ``forward`` among a module's own attributes would go along with every copy of them (``copy.copy``,
functional clones, replicas) and call the module that it was made for. Here ``forward`` stays where
Python looks it up for whatever module is called, and that module is handed on.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

Forward = Callable[..., Any]

_KEY = "_optimize_nested_towers"


class Towers:
    """What a decorated module carries: its towers by the function that each of them is.

    A tower takes the module as an argument, so copies of a module have the same ones; what is
    pickled gets its own.

    Args:
        make: Makes a tower of a function of a module and its arguments.
        how: What ``make`` takes beside the function.
    """

    def __init__(self, make: Callable[..., Forward], *how: Any) -> None:
        self._make, self._how = make, how
        self._made: dict[Forward, Forward] = {}

    def of(self, function: Forward) -> Forward:
        """Return the tower of a function."""
        return self._made.get(function) or self._made.setdefault(
            function, self._make(function, *self._how)
        )

    def __copy__(self) -> Towers:
        return self

    def __deepcopy__(self, memo: Any) -> Towers:
        return self

    def __reduce__(self) -> Any:
        return Towers, (self._make, *self._how)


class TowerOf:
    """A class's ``forward``: the tower of the module that is called, if it carries any.

    Args:
        function: The ``forward`` of the user's class.
    """

    def __init__(self, function: Forward) -> None:
        self.function = function

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self.function
        if torch.compiler.is_compiling():  # first: Dynamo knows the answer, and reads no further
            return functools.partial(self.function, module)
        towers: Towers | None = module.__dict__.get(_KEY)
        function = self.function if towers is None else towers.of(self.function)
        return types.MethodType(function, module)


def bind(module: nn.Module, towers: Towers) -> None:
    """Let a module's calls go to towers from now on.

    Its class becomes a subclass with the same name that is made for this, as parametrizations do
    it; a class that was made for this module alone is changed itself.
    """
    cls: Any = type(module)
    if not isinstance(inspect.getattr_static(cls, "forward"), TowerOf):
        if parametrize.is_parametrized(module):
            cls.forward = TowerOf(cls.forward)
        else:
            module.__class__ = _towered(cls)
    module.__dict__[_KEY] = towers


def is_bound(module: nn.Module) -> bool:
    """Whether a module's calls go to towers that it carries."""
    found = inspect.getattr_static(type(module), "forward", None)
    return isinstance(found, TowerOf) and _KEY in module.__dict__


# Class → the subclass that was made of it, for as long as somebody has both.
_made: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def _towered(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a class whose instances' calls go to the towers that they carry."""
    known = _made.get(cls)
    made: Any = None if known is None else known()
    if made is not None:
        return made

    def reduce(self: Any, protocol: Any) -> Any:
        """Say how to make an instance again by the class that can be found by its name."""
        function, arguments, *state = super(made, self).__reduce_ex__(protocol)
        arguments = tuple(cls if argument is made else argument for argument in arguments)
        return _remade, (function, arguments), *state

    space = {
        name: vars(cls)[name]
        for name in ("__module__", "__qualname__", "__doc__")
        if name in vars(cls)
    }
    space |= {"__reduce_ex__": reduce, "forward": TowerOf(cls.forward)}
    kind: Any = type(cls)
    made = kind(cls.__name__, (nn.Module,), space)
    made.__bases__ = (cls,)  # only now: it is none of the subclasses that the class is told of
    _made[cls] = weakref.ref(made)
    return made


def _remade(function: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = function(*arguments)
    module.__class__ = _towered(type(module))
    return module


_active: contextvars.ContextVar[Mapping[int, Any]] = contextvars.ContextVar("active")
_no_towers: Mapping[int, Any] = {}
# Class → how many blocks in all threads have patched it, and its own ``forward`` if it has one.
_patched: dict[type, list[Any]] = {}
_patching = threading.Lock()


class Binding:
    """Modules and their towers.

    Args:
        towers: Module → tower; its attribute ``as_written`` is the ``forward`` of the module's
            class, see `forward_of`.
    """

    def __init__(self, towers: Mapping[nn.Module, Any]) -> None:
        self._towers = {id(module): tower for module, tower in towers.items()}
        self._classes = {type(module): tower.as_written for module, tower in towers.items()}

    @property
    def is_of_use(self) -> bool:
        """Whether one of the towers was built."""
        return any(tower.steps for tower in self._towers.values())


@contextlib.contextmanager
def bound(binding: Binding) -> Iterator[None]:
    """Let the calls of modules go to their towers inside the block, in this thread.

    The classes of the modules are changed for the time being: a module keeps its type, and one that
    has no tower runs as written.
    """
    token = _active.set({**_active.get(_no_towers), **binding._towers})
    try:
        with _patching:
            for cls, function in binding._classes.items():
                _patch(cls, function)
        yield
    finally:
        with _patching:
            for cls in binding._classes:
                _unpatch(cls)
        _active.reset(token)


def is_active(module: nn.Module) -> bool:
    """Whether the calls of a module go to a tower in a block around this call."""
    return id(module) in _active.get(_no_towers)


def forward_of(module: nn.Module) -> Forward | None:
    """Return the ``forward`` of a module's class; None where that is no plain function, or one of
    the module's own stands before it."""
    found = inspect.getattr_static(type(module), "forward", None)
    if not inspect.isfunction(found) or "forward" in module.__dict__:
        return None
    return _function_of(found) if found.__code__ is _DISPATCH else found


def _patch(cls: Any, function: Forward) -> None:
    known = _patched.setdefault(cls, [0, vars(cls).get("forward")])
    known[0] += 1
    if known[0] == 1:
        cls.forward = _dispatch_of(function)


def _unpatch(cls: Any) -> None:
    known = _patched.get(cls)
    if known is None:
        return
    known[0] -= 1
    if known[0]:
        return
    del _patched[cls]
    found = vars(cls).get("forward")
    if not inspect.isfunction(found) or found.__code__ is not _DISPATCH:
        return  # somebody else has changed it in the meantime
    if known[1] is None:
        del cls.forward
    else:
        cls.forward = known[1]


def _dispatch_of(function: Forward) -> Forward:
    """Return what stands in for a class's ``forward``; the same each time, as guards ask."""
    known = function.__dict__.get(_KEY)
    if known is None or _function_of(known) is not function:  # a wrapper's, that took it along
        known = function.__dict__[_KEY] = _make_dispatch(function)
    return known


def _function_of(dispatch: Any) -> Forward:
    return dispatch.__wrapped__


def _make_dispatch(function: Forward) -> Forward:
    @functools.wraps(function)
    def forward(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        tower = _active.get(_no_towers).get(id(self))
        if tower is None or tower.as_written is not function:  # a `super().forward` of its own
            return function(self, *args, **kwargs)
        return tower(self, *args, **kwargs)

    return forward


_DISPATCH = _make_dispatch(nn.Module.forward).__code__
