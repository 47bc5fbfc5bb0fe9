"""Timing side by side: turns, medians, noise, and what is left unchanged."""

from __future__ import annotations

import time

import torch

from rewriter.race import fastest, race


def test_contenders_take_turns() -> None:
    turns: list[str] = []

    def run(name: str, seconds: float) -> None:
        turns.append(name)
        torch.rand(3)
        time.sleep(seconds)

    before = torch.get_rng_state()
    slow, quick = race([lambda: run("a", 0.06), lambda: run("b", 0.03)], [torch.ones(1)])
    assert slow > quick >= 0.03
    assert turns == ["a", "b"] * (len(turns) // 2) and len(turns) >= 2 * (2 + 3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_first_of_those_that_noise_does_not_part_is_kept() -> None:
    assert fastest([1.02, 1.0, 1.5]) == 0
    assert fastest([1.04, 1.0, 1.5]) == 1
    assert fastest([2.0, 1.02, 1.0]) == 1
