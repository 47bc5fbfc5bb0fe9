"""Convolutions as products: of the weight, and of what each of its windows sees.

    y[n, o, l] = Σ_k w[o, k] u[n, k, l],    ∂w[o, k] = Σ_l δ[n, o, l] u[n, k, l],    u = unfold(x)

with k over channels and positions in the window, and l over the places of the window. The gradient
in x is ``fold(Σₒ w[o, k] δ[n, o, l])``. Of a transposed convolution the two sides change places:
what is unfolded is always the one with a value wherever the window has been.

Where the gradient of each sample in w is asked for, samples are the groups of one convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.graph import arguments, elements, hint, value_of
from passes.simplify.factors.moves import Moves, Read
from passes.simplify.factors.terms import Expression, NotAProduct, leaf, reshaped, summed

aten = torch.ops.aten

# `im2col` and `col2im` are for images; a row is one of height 1.
_MOST_DIMS = 2


@dataclass(frozen=True)
class _Convolution:
    """A convolution, or one of its pullbacks.

    Attributes:
        weight: Of the shape [G·O, C, *kernel].
        places: The shape of what has a value for each place of the window: [B, G·O, *places].
        seen: The shape of what the window sees: [B, G·C, *sizes].
        groups: G.
        window: Kernel, dilation, padding and stride.
    """

    weight: tuple[int, ...]
    places: tuple[int, ...]
    seen: tuple[int, ...]
    groups: int
    window: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        every = (*self.weight, *self.places, *self.seen, *sum(self.window, ()), self.groups)
        if not all(isinstance(size, int) for size in every):
            raise NotAProduct("a convolution of symbolic size")
        if not 1 <= len(self.places) - 2 <= _MOST_DIMS or len(self.weight) != len(self.places):
            raise NotAProduct("a convolution in other dimensions than one or two")
        if len(set(map(len, self.window))) != 1:
            raise NotAProduct("a convolution whose settings are numbers")
        number = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, d, p, s in zip(self.seen[2:], *self.window, strict=True)
        )
        if tuple(number) != self.places[2:]:
            raise NotAProduct("places that the window has not been at")

    @property
    def grouped(self) -> list[int]:
        """G, O, C, and positions in the window."""
        out, channels, *kernel = self.weight
        return [self.groups, out // self.groups, channels, math.prod(kernel)]

    @property
    def for_images(self) -> list[tuple[int, ...]]:
        """The window in two dimensions."""
        missing = _MOST_DIMS - len(self.places) + 2
        return [(fill,) * missing + of for fill, of in zip((1, 1, 0, 1), self.window, strict=True)]

    def weights(self, x: Expression) -> Expression:
        """Return the weight over B, G, O, C, kernel and places."""
        g, o, c, k = self.grouped
        return reshaped(x, [1, g, o, c, k, 1])

    def at_places(self, x: Expression) -> Expression:
        """Return what has a value for each place over B, G, O, C, kernel and places."""
        g, o, _, _ = self.grouped
        return reshaped(x, [self.places[0], g, o, 1, 1, math.prod(self.places[2:])])

    def unfolded(self, moves: Moves, node: Any, read: Read) -> Expression:
        """Return what the window sees over B, G, O, C, kernel and places."""
        if sum(elements(value_of(x)) for x in read(node).leaves()) != elements(value_of(node)):
            raise NotAProduct("a convolution of a product")  # it has to be there to be unfolded
        g, _, c, k = self.grouped
        if len(self.places) < _MOST_DIMS + 2:
            node = moves.make(aten.unsqueeze.default, (node, 2), node)
        unfolded = moves.make(aten.im2col.default, (node, *self.for_images), node)
        return reshaped(leaf(unfolded), [self.places[0], g, 1, c, k, math.prod(self.places[2:])])


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(value_of(node).shape)


def _window(weight: Any, args: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    stride, padding, dilation = (tuple(arg) for arg in args[:3])
    return _shape(weight)[2:], dilation, padding, stride


def _forward(node: Node) -> _Convolution:
    x, weight, _, *settings, groups = arguments(node)
    small, large = (x, node) if settings[3] else (node, x)
    window = _window(weight, settings)
    return _Convolution(_shape(weight), _shape(small), _shape(large), groups, window)


def _backward(node: Node) -> _Convolution:
    grad, x, weight, _, *settings, groups, _ = arguments(node)
    small, large = (x, grad) if settings[3] else (grad, x)
    window = _window(weight, settings)
    return _Convolution(_shape(weight), _shape(small), _shape(large), groups, window)


def _shaped_like(x: Expression, node: Node) -> Expression:
    return reshaped(x, _shape(node))


def applied(moves: Moves, node: Node, read: Read) -> Expression:
    """Return a convolution; of a transposed one what is to be folded."""
    x, weight, bias, *settings, _ = arguments(node)
    if bias is not None:
        raise NotAProduct("a convolution with a bias")
    by = _forward(node)
    if settings[3]:
        return _to_be_folded(moves, by, read(weight), read(x))
    products = moves.times(by.weights(read(weight)), by.unfolded(moves, x, read))
    return _shaped_like(summed(products, [3, 4]), node)


def pulled_back(moves: Moves, node: Node, read: Read) -> Expression:
    """Return one result of the pullback of a convolution that has no other."""
    pullback, number = arguments(node)
    grad, x, weight, _, *settings, _, mask = arguments(pullback)
    if list(mask) != [at == number for at in range(3)] or number == 2:
        raise NotAProduct("a pullback with several results")
    by, is_transposed = _backward(pullback), settings[3]
    small, large = (x, grad) if is_transposed else (grad, x)
    if number == 1:
        products = moves.times(by.at_places(read(small)), by.unfolded(moves, large, read))
        return _shaped_like(summed(products, [0, 5]), node)
    if not is_transposed:
        return _to_be_folded(moves, by, read(weight), read(grad))
    products = moves.times(by.weights(read(weight)), by.unfolded(moves, grad, read))
    return _shaped_like(summed(products, [3, 4]), node)


def _to_be_folded(
    moves: Moves, by: _Convolution, weight: Expression, small: Expression
) -> Expression:
    return summed(moves.times(by.weights(weight), by.at_places(small)), [2])


def folding(node: Node) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    """Return the operators that follow on what is to be folded."""
    if node.target is aten.convolution.default and arguments(node)[6]:
        by = _forward(node)
    elif _is_gradient_in_x(node):
        by = _backward(arguments(node)[0])
    else:
        return []
    rows, channels, *sizes = by.seen
    g, _, c, k = by.grouped
    size = (1,) * (_MOST_DIMS - len(sizes)) + tuple(sizes)
    return [
        (aten.reshape.default, ((rows, g * c * k, math.prod(by.places[2:])),)),
        (aten.col2im.default, (size, *by.for_images)),
        (aten.reshape.default, ((rows, channels, *sizes),)),
    ]


def _is_gradient_in_x(node: Node) -> bool:
    if not is_pulled_back(node):
        return False
    pullback, number = arguments(node)
    return number == 0 and not arguments(pullback)[7]


def is_pulled_back(node: Node) -> bool:
    """Whether a node is a result of the pullback of a convolution."""
    source = node.args[0] if node.args else None
    return (
        isinstance(source, Node)
        and source.target is aten.convolution_backward.default
        and isinstance(value_of(node), Tensor)
    )


def pulls_back(node: Node) -> Sequence[Node]:
    """Return the tensors whose values a result of a pullback is computed from: of the point, or the
    weight, itself only the shape is read."""
    pullback, number = arguments(node)
    grad, x, weight = arguments(pullback)[:3]
    return [grad, (weight, x, grad)[number]]


def flops(node: Node) -> int:
    """Return the multiplications and additions of a convolution, or of one result of a pullback; 0
    for anything else."""
    if node.target is aten.convolution.default:
        x, weight, *_, is_transposed, _, _ = arguments(node)
        small = x if is_transposed else node
    elif is_pulled_back(node):
        grad, x, weight, *_, is_transposed, _, _, _ = arguments(arguments(node)[0])
        small = x if is_transposed else grad
    else:
        return 0
    return 2 * elements(value_of(small)) * math.prod(map(hint, value_of(weight).shape[1:]))
