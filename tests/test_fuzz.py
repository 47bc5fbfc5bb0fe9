"""Random programs: the rewritten loss is the loss as written, or it says why it is not rewritten.

`make fuzz N=5000` runs more of them, others each time; a failure prints as a script to paste.
"""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, note, reject, settings
from hypothesis import strategies as st

from tests.programs import FAMILIES, Discarded, Fallback, Program, programs, run

# Reasons for which a program may run as written: PyTorch's own limits, while Dynamo runs it on fake
# tensors, and what docs/limits.md names.
ACCEPTED = {
    r"isIntList\(\) INTERNAL ASSERT": "a sum pulled back for a batch of seeds, at a symbolic size",
    "TensorIterator does not support symbolic": "softshrink pulled back, at a symbolic size",
    "NO overloaded args that actually": "nn.Bilinear pulled back, at a symbolic size",
    r"Cannot call \w+\(\) on tensor with symbolic": "PReLU or dropout in place, at a symbolic size",
    "float division by zero": "the mean of nothing pulled back",
    r"self.is_inference\(\) INTERNAL ASSERT": "fused attention pulled back and pushed forward",
    "NoRule.*log_sigmoid_forward": "log_sigmoid, for directions in a batch",
    r"attempting to call Tensor.requires_grad_\(\)": "functional.* inside of functional.jvp",
    "forward mode under no_grad": "forward mode does not stop at no_grad",
    "no_grad and a torch.func transform": "PyTorch turns gradients on below a transform",
    "at a hidden value of another derivative": "a derivative at a value inside of a derivative",
    "updates its state, inside of a vmap": "a vmap over BatchNorm in train mode",
}

# The operator database, which other tests import, loads a profile of its own.
PROFILE = settings()


class Tally:
    """What became of the programs of a family."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.counts: Counter[str] = Counter()
        self.start = time.perf_counter()

    def add(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.counts.total() % 50 == 0:
            print(self)

    @property
    def compared(self) -> int:
        return self.counts["compared"]

    @property
    def discarded(self) -> int:
        return sum(n for kind, n in self.counts.items() if kind.startswith("discarded"))

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        rows = [f"{self.family}: {self.counts.total()} programs in {seconds:.0f} s"]
        return "\n".join(rows + [f"  {n:5} {kind}" for kind, n in self.counts.most_common()])


def check(program: Program, tally: Tally) -> None:
    """Run one program, and count what became of it."""
    torch._dynamo.reset()
    try:
        run(program)
    except Discarded as why:
        tally.add(f"discarded: {why}")
        reject()
    except Fallback as why:
        accepted = [reason for reason in ACCEPTED if re.search(reason, str(why))]
        assert accepted, f"not captured: {why}"
        tally.add(f"as written: {ACCEPTED[accepted[0]]}")
    else:
        tally.add("compared")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=[pytest.mark.slow])])
# PyTorch says so of `nn.Bilinear` under a vmap.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_programs(family: str, times: int) -> None:
    tally = Tally(family)

    @given(st.data())
    def each(data: st.DataObject) -> None:
        program = data.draw(programs(family))
        note(repr(program))
        check(program, tally)

    settings(PROFILE, max_examples=times * PROFILE.max_examples)(each)()
    print(tally)
    assert tally.discarded <= 0.5 * tally.counts.total(), f"most programs say nothing:\n{tally}"
    assert tally.compared >= 0.5 * tally.counts.total(), f"most programs are not compared:\n{tally}"
