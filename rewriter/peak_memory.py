"""Measure how much memory a call takes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that a call has allocated at once, beyond what was there before.

    On a GPU in use it is the GPU's memory; otherwise what PyTorch's allocator of the processor has
    handed out. Compiled code counts; scratch memory that a library takes for itself does not.

    Args:
        call: Is called once, many times slower than otherwise.

    >>> peak_bytes(lambda: torch.ones(256, 1024))
    1048576
    """
    if torch.cuda.is_initialized():
        return _peak_on_gpu(call)
    # The profiler announces each start on standard error.
    with patch.dict(os.environ, KINETO_LOG_LEVEL="99"), tempfile.TemporaryDirectory() as folder:
        # Without the last option torch 2.11 warns that events of earlier cycles are dropped.
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            call()
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return max(accumulate(_allocations(path)), default=0)


def _peak_on_gpu(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _allocations(trace: Path) -> Iterator[int]:
    """Yield the bytes taken (positive) and given back (negative) in the order of time; memory that
    was taken before the trace began is not in it."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [event for event in events if event.get("name") == "[memory]"]
    for event in sorted(found, key=lambda event: event["ts"]):
        yield event["args"]["Bytes"]
