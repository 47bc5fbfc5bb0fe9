"""Random programs: the rewritten loss is the loss as written, or it says why it is not rewritten.

`make fuzz N=5000` runs more of them, others each time; a failure prints as a script to paste.
"""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, note, reject, settings
from hypothesis import strategies as st

from tests.host_programs import HOST_FAMILIES, host_programs
from tests.host_programs import run as run_host_program
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
    "no_grad inside of forward mode": "forward mode does not stop at no_grad",
    "no_grad and a torch.func transform": "PyTorch turns gradients on below a transform",
    "at a hidden value of another derivative": "a derivative at a value inside of a derivative",
    "updates its state, inside of a vmap": "a vmap over BatchNorm in train mode",
}

# Families of host code most of whose programs are captured whole; the others are made to fall back.
CAPTURED = {"recordings", "types", "complex"}

# The operator database, which other tests import, loads a profile of its own.
PROFILE = settings()
IS_FUZZING = Phase.shrink in PROFILE.phases


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


@pytest.mark.parametrize("family", HOST_FAMILIES)
@pytest.mark.parametrize("times", [1, pytest.param(3, marks=[pytest.mark.slow])])
# A network of another dtype under PyTorch's averaging, and what else PyTorch says of programs.
@pytest.mark.filterwarnings("ignore")
def test_programs_around_host_code(family: str, times: int) -> None:
    tally = Tally(family)

    @given(st.data())
    def each(data: st.DataObject) -> None:
        program = data.draw(host_programs(family))
        note(repr(program))
        torch._dynamo.reset()
        try:
            is_captured = run_host_program(program)
        except Discarded as why:
            tally.add(f"discarded: {why}")
            reject()
        tally.add("compared" if is_captured else "as written or by layer")

    each_time = PROFILE.max_examples if IS_FUZZING else 2
    settings(PROFILE, max_examples=times * each_time)(each)()
    print(tally)
    if family in CAPTURED and tally.counts.total() > 10:
        assert tally.compared >= 0.4 * tally.counts.total(), f"most are not captured:\n{tally}"


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
