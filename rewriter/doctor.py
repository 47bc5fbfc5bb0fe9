"""What this machine has, what would break on it, and how to mend that."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from packaging.requirements import Requirement

from rewriter.codegen import cache_folder, cpp_compiler
from rewriter.options import is_disabled

MIN_FREE = 2**30  # bytes on the disk that compiled code is kept on

GOOD, WARNING, BAD = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        status: ``"ok"``, ``"warning"`` or ``"error"``.
        found: What there is.
        mend: What to do if it is not fine.
    """

    what: str
    status: str
    found: str
    mend: str = ""


def examine() -> Iterator[Finding]:
    """Yield what there is to know about this machine, one thing at a time."""
    yield Finding("python", GOOD, f"{platform.python_version()} on {platform.platform()}")
    yield from _versions()
    yield _compiler()
    yield _compiled_code()
    yield from _cache()
    yield _gpu()
    yield _threads()
    yield from _environment()


def _versions() -> Iterator[Finding]:
    try:
        lines = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        mend = "pip install --editable . in the project's folder"
        yield Finding(_PACKAGE, WARNING, "imported from a folder, not installed", mend)
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is not None:  # of an extra
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            mend = f"pip install '{requirement}'"
            yield Finding(requirement.name, BAD, "not installed", mend)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        status = GOOD if fits else WARNING
        mend = "" if fits else f"tested with {requirement.specifier}: pip install '{requirement}'"
        yield Finding(requirement.name, status, version, mend)


_PACKAGE = "optimize-nested"


def _compiler() -> Finding:
    found = cpp_compiler()
    if found is not None:
        return Finding("C++ compiler", GOOD, found)
    return Finding(
        "C++ compiler",
        BAD,
        "none: rewritten losses run op by op on a CPU",
        "install one (Debian, Ubuntu: apt-get install g++; conda: gxx; macOS: xcode-select "
        "--install) or set the environment variable CXX",
    )


def _compiled_code() -> Finding:
    """Compile something, with nothing compiled before."""
    x = torch.linspace(0.0, 1.0, 64)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            found = torch.compile(lambda x: x.sin() * 2)(x)
        # Any error of a broken tool chain is what this is here to find.
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            mend = "backend='eager' runs rewritten losses op by op meanwhile"
            return Finding("Inductor", BAD, text, mend)
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    if not torch.allclose(found, x.sin() * 2):
        return Finding("Inductor", BAD, "compiled code is wrong", "use backend='eager'")
    return Finding("Inductor", GOOD, "compiles, and what it compiles is right")


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    if not os.access(folder, os.W_OK):
        mend = "set TORCHINDUCTOR_CACHE_DIR to a folder that you may write to"
        yield Finding("compiled code", BAD, f"{folder} cannot be written to", mend)
        return
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free / 2**30:.1f} GiB free"
    mend = "delete the folder, or set TORCHINDUCTOR_CACHE_DIR to one on another disk"
    if free < MIN_FREE:
        yield Finding("compiled code", WARNING, text, mend)
    else:
        yield Finding("compiled code", GOOD, text)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        text = f"none is seen (PyTorch is built for {built})" if built else "none: PyTorch for CPUs"
        return Finding("GPU", GOOD, text)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    major, minor = torch.cuda.get_device_capability()
    text = f"{', '.join(names)}; compute capability {major}.{minor}"
    if find_spec("triton") is None:
        return Finding("GPU", BAD, f"{text}; no Triton", "pip install triton")
    if major < 7:
        return Finding("GPU", WARNING, text, "Triton needs 7.0 or more: use backend='eager' there")
    return Finding("GPU", GOOD, text)


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0)) if _HAS_AFFINITY else 0
    text = f"{threads} of PyTorch" + (f", {cores} cores" if cores else "")
    if cores and threads > cores:
        return Finding("threads", WARNING, text, f"set OMP_NUM_THREADS={cores}")
    return Finding("threads", GOOD, text)


_HAS_AFFINITY = hasattr(os, "sched_getaffinity")


def _environment() -> Iterator[Finding]:
    if is_disabled():
        mend = "unset it, or set it to 1"
        found = f"OPTIMIZE_NESTED={os.environ.get('OPTIMIZE_NESTED')}: losses run as written"
        yield Finding("environment", WARNING, found, mend)
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(name, "0") not in ("", "0"):
            found = f"{name}={os.environ[name]}: nothing is captured or compiled"
            yield Finding("environment", BAD, found, f"unset {name}")
