"""What machine an artifact's code runs on, and whether this is one."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from rewriter.ahead.manifest import Machine
from rewriter.errors import ArtifactError

# Flags of a processor that a compiler asked for the machine's own instructions may use.
_COMPUTES = re.compile(
    r"sse|ssse|avx|amx|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|adx|aes|vaes|v?pclmul|gfni|sha|xop"
    r"|neon|asimd|sve|sme\d?$|fphp|crc32|atomics|bf16|i8mm|dotprod"
)


def instructions() -> tuple[str, ...]:
    """Return the instruction sets of this processor: as the system lists them, or where it does not
    the one that PyTorch found."""
    listed = Path("/proc/cpuinfo")
    lines: list[str] = []
    if listed.exists():
        lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", listed.read_text(), re.MULTILINE)
    if not lines:
        return (f"torch:{torch.backends.cpu.get_cpu_capability()}",)
    return tuple(sorted({flag for flag in lines[0].split() if _COMPUTES.match(flag)}))


def system() -> str:
    """Return operating system and processor family, such as ``Linux x86_64``."""
    return f"{platform.system()} {platform.machine()}"


def capability() -> str:
    """Return the compute capability of the current GPU, such as ``9.0``."""
    major, minor = torch.cuda.get_device_capability()
    kind = "hip" if torch.version.hip else "cuda"
    return f"{kind} {major}.{minor}"


def machine_for(devices: Iterable[str], *, is_native: bool) -> Machine:
    """Return what code compiled here for some devices runs on."""
    kinds = tuple(sorted({torch.device(device).type for device in devices} | {"cpu"}))
    if not is_native:
        return Machine(kinds, "", (), "")
    gpu = capability() if "cuda" in kinds else ""
    return Machine(kinds, system(), instructions(), gpu)


def check_machine(machine: Machine) -> None:
    """Check that code for a machine runs on this one.

    Raises:
        ArtifactError: Another system, a missing device or instruction set; names both.
    """
    for device in machine.devices:
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise ArtifactError(f"compiled for the device {device!r}, which is not here")
    if not machine.system:
        return
    if machine.system != system():
        raise ArtifactError(f"compiled for {machine.system}, and this is {system()}")
    missing = sorted(set(machine.instructions) - set(instructions()))
    if missing:
        raise ArtifactError(
            f"compiled for a processor with {', '.join(missing)}, which this one lacks: compile it "
            "here, or with portable=True"
        )
    if machine.capability and machine.capability != capability():
        raise ArtifactError(
            f"compiled for a GPU of capability {machine.capability}, and this one has "
            f"{capability()}: compile it here, or with portable=True"
        )
