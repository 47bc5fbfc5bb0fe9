"""Artifacts that were compiled before, in a folder.

An artifact's name there is the digest of everything it is made from: this project's own source,
the versions and the machine (in the manifest), graphs, sizes and constants. Files come into being
whole, so any number of processes may share a folder.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import passes
from rewriter.ahead.archive import canonical, digest, unpack
from rewriter.errors import ArtifactError
from rewriter.files import write_whole


@functools.cache
def source_digest() -> str:
    """Return the digest of this project's source files."""
    roots = [Path(__file__).parents[1], Path(str(passes.__file__)).parent]
    files = sorted(
        (f"{root.name}/{file.relative_to(root).as_posix()}", file)
        for root in roots
        for file in root.rglob("*.py")
    )
    return digest(canonical([[name, digest(file.read_bytes())] for name, file in files]))


def cached(folder: Path, key: Any, make: Callable[[], bytes]) -> bytes:
    """Return an artifact from a folder; make it, and put it there, if it is not or is damaged.

    Args:
        folder: Is created if it does not exist.
        key: What the artifact is made from, beside this project and Python.
        make: Makes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = digest(canonical([key, source_digest(), platform.python_version()]))
    file = folder / f"{name}.pt2"
    if file.is_file():
        data = file.read_bytes()
        try:
            unpack(data, str(file))
        except ArtifactError:
            pass  # damaged: made again below
        else:
            return data
    data = make()
    write_whole(file, data)
    return data
