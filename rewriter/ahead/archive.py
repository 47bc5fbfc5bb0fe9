"""The byte form of an artifact: one zip file, of which every bit is accounted for.

Members are stored, not compressed, so that nothing is larger than the file says. The zip comment,
the file's last bytes, is the SHA-256 of everything before it: no bit of the file can change
unnoticed. That is against accidents; against malice there is the digest of the manifest, which
lists the digests of all other members, and which `load` compares with the one the user gives it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rewriter.errors import ArtifactError

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
_DIGEST_BYTES = 64  # in hexadecimal
_EPOCH = (1980, 1, 1, 0, 0, 0)


def digest(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical(record: Any) -> bytes:
    """Return the one JSON text of a record: keys sorted, no spaces, ASCII."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def parsed(data: bytes, what: str) -> Any:
    """Parse JSON.

    Raises:
        ArtifactError: It is none, or not in its canonical form.
    """
    try:
        record = json.loads(data.decode("ascii"))
        same = canonical(record) == data
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is not JSON: {error}") from error
    if not same:
        raise ArtifactError(f"{what} is not canonical JSON")
    return record


def pack(members: Mapping[str, bytes]) -> bytes:
    """Return an archive's bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name, _EPOCH), data)
        file.comment = b"0" * _DIGEST_BYTES
    body = buffer.getvalue()[:-_DIGEST_BYTES]
    return body + digest(body).encode("ascii")


def unpack(data: bytes, what: str) -> dict[str, bytes]:
    """Return the members of an archive.

    Raises:
        ArtifactError: The bytes are not those that were written, or a member has a name or a size
            that an artifact's cannot have.
    """
    body, ending = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if digest(body).encode("ascii") != ending:
        raise ArtifactError(
            f"{what} is no artifact, or is damaged: its bytes do not match the digest at its end. "
            "Fetch or compile it again"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = file.infolist()
            _check_entries(entries, len(data), what)
            members = {entry.filename: file.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{what} is not a zip file: {error}") from error
    if len(members.get(MANIFEST, b"")) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{what}: {MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    return members


def _check_entries(entries: list[zipfile.ZipInfo], size: int, what: str) -> None:
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise ArtifactError(f"{what} has two members of one name")
    if MANIFEST not in names:
        raise ArtifactError(f"{what} has no {MANIFEST}")
    if sum(entry.file_size for entry in entries) > size:
        raise ArtifactError(f"{what}: its members are said to be larger than the file")
    for entry in entries:
        if not is_plain_path(entry.filename):
            raise ArtifactError(f"{what}: {entry.filename!r} is no path inside of an archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ArtifactError(f"{what}: {entry.filename} is compressed; members must be stored")
        if entry.flag_bits & 0x1:
            raise ArtifactError(f"{what}: {entry.filename} is encrypted")


def is_plain_path(name: str) -> bool:
    """Whether a member's name is a relative path that stays inside the archive."""
    parts = name.split("/")
    odd = "\\" in name or ":" in name or "\0" in name or not name.isascii()
    return not odd and all(part not in ("", ".", "..") for part in parts)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a file whole: what is checked and what is used are the same bytes.

    Raises:
        ArtifactError: It is no file that can be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{os.fspath(path)} cannot be read: {error.strerror}") from error


def extract(members: Mapping[str, bytes], folder: str | os.PathLike[str]) -> None:
    """Write members below a folder; their names were checked."""
    for name, data in members.items():
        target = Path(folder, *PurePosixPath(name).parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
