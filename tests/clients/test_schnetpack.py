"""SchNetPack trains a tower: forces by its `Forces` module, steps by Lightning's `Trainer`."""

from __future__ import annotations

import pytest

from rewriter import NestedGradientWarning
from tests.clients.common import check, check_captured, check_float32, example

clients = example("schnetpack", "client_schnetpack")

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn.t accept a copy keyword:DeprecationWarning",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:Trying to infer the `batch_size` from an ambiguous collection",
)

SIZES = {"width": 8, "interactions": 1, "systems": 3, "cells": 1}


def test_float64() -> None:
    check_captured(check(clients.painn, **SIZES))


def test_float32() -> None:
    check_float32(clients.painn, **SIZES)


def test_the_whole_model() -> None:
    """It reads a number from a tensor, so its parts are captured, and a warning says so."""
    said = r"NeuralNetworkPotential runs as written: an integer .*; captured by layer: PaiNN"
    with pytest.warns(NestedGradientWarning, match=said):
        check(clients.painn, **SIZES, whole=True)
