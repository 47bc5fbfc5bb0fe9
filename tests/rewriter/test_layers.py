"""Every layer under every loss: value, gradients, buffers and generator as written."""

from __future__ import annotations

import pytest

from tests.cases import LOSSES, NETWORKS, make, with_written_norms
from tests.oracle import check, outcome, relative_error

# Eager refuses BatchNorm in train mode under `torch.func`, so there is nothing to compare with.
REFUSED_BY_EAGER = {("batch_norm_train", "func_gradient"), ("batch_norm_2d", "func_gradient")}


# Each network under one or two losses and each loss around ten networks in every run; the others
# are slow tests. Towers (test_layer.py) have other pairs.
PAIRS = [
    pytest.param(n, f, marks=[pytest.mark.slow] if (i + j) % 4 else [])
    for i, n in enumerate(NETWORKS)
    for j, f in enumerate(LOSSES)
    if (n, f) not in REFUSED_BY_EAGER
]


@pytest.mark.parametrize(("network", "loss"), PAIRS)
def test_layer(network: str, loss: str) -> None:
    net, x = make(network)
    reference = [with_written_norms(make(network)[0])] if loss == "second_order" else None
    decorated = check(LOSSES[loss], [net], x, reference=reference)
    report = decorated.explain(net, x.detach())
    assert report.flops <= report.flops_as_written


@pytest.mark.parametrize(
    ("strategy", "network"),
    [
        ("as written", "group_norm"),
        ("reverse", "layer_norm"),
        ("reverse", "batch_norm_train"),
        ("jvp_over_gradient", "layer_norm"),
        ("jvp_over_gradient", "group_norm"),
    ],
)
def test_third_order_in_every_form(network: str, strategy: str) -> None:
    net, x = make(network)
    reference = [with_written_norms(make(network)[0])]
    check(LOSSES["second_order"], [net], x, reference=reference, strategy=strategy)


def test_pytorch_is_wrong_at_third_order() -> None:
    """Why norms are taken apart: if this fails PyTorch was mended, and `WrittenNorm` can go."""
    net, x = make("layer_norm")
    loss = LOSSES["second_order"]
    stock = outcome(loss, [net], (x,), {})
    exact = outcome(loss, [with_written_norms(make("layer_norm")[0])], (x,), {})
    assert relative_error(stock.value, exact.value) < 1e-12
    assert relative_error(stock.grads["0.0.weight"], exact.grads["0.0.weight"]) > 1e-2
