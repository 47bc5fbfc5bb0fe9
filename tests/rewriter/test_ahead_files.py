"""What `load` refuses: every altered bit, every other machine, every hostile file."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import ArtifactError, load, optimize_nested
from rewriter.ahead import machine, validate
from rewriter.ahead.archive import MANIFEST, canonical, digest, pack, unpack
from rewriter.ahead.load import read_manifest, unpack_to
from rewriter.ahead.operators import operator_named
from rewriter.ahead.portable import read_graph
from rewriter.ahead.sizes import evaluated

Members = dict[str, bytes]


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = grad(net(p).sum(), p, create_graph=True)
    return (g * torch.tensor([1.0, 2.0])).square().sum()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable artifact with a constant, three graphs' worth of members and an open size."""
    path = tmp_path_factory.mktemp("files") / "penalty"
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    optimize_nested(penalty).compile_ahead(
        path, net, torch.ones(4, 2), portable=True, modes=["train"], dynamic={"x": {0: "batch"}}
    )
    return path


@pytest.fixture
def members(file: Path) -> Members:
    return unpack(file.read_bytes(), "file")


def sealed(members: Members) -> bytes:
    """Return an archive whose every digest is right: what somebody who means harm would write."""
    record = json.loads(members[MANIFEST])
    record["members"] = {
        name: {"sha256": digest(data), "size": len(data)}
        for name, data in members.items()
        if name != MANIFEST
    }
    return pack({**members, MANIFEST: canonical(record)})


def refused(tmp_path: Path, data: bytes, match: str, **options: Any) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ArtifactError, match=match):
        load(tmp_path / "file", backend="eager", **options)


def test_every_bit_counts(file: Path) -> None:
    """Members, manifest, headers, the digest itself: one bit of any byte is noticed."""
    data = bytearray(file.read_bytes())
    for position in range(len(data)):
        data[position] ^= 1 << (position % 8)
        with pytest.raises(ArtifactError, match="do not match the digest at its end"):
            unpack(bytes(data), "file")
        data[position] ^= 1 << (position % 8)
    unpack(bytes(data), "file")


def test_one_bit_of_each_member(tmp_path: Path, file: Path, members: Members) -> None:
    """Also where the archive's own digest was made to fit."""
    assert len(members) >= 4
    for name in members:
        data = bytearray(members[name])
        data[len(data) // 2] ^= 4
        altered = pack({**members, name: bytes(data)})
        match = "file: " if name == MANIFEST else f"{name} is not what the manifest says"
        refused(tmp_path, altered, match)
    _, known = read_manifest(file)
    other = json.loads(members[MANIFEST])
    other["loss"] = "another"
    altered = pack({**members, MANIFEST: canonical(other)})
    refused(tmp_path, altered, f"SHA-256 is .*, and not {known}", sha256=known)


def test_truncated(tmp_path: Path, file: Path) -> None:
    data = file.read_bytes()
    for length in (0, 1, 63, 64, 65, len(data) // 2, len(data) - 1):
        refused(tmp_path, data[:length], "no artifact, or is damaged")
    refused(tmp_path, b"x" + data, "no artifact, or is damaged")


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
        archive.comment = b"0" * 64
    body = buffer.getvalue()[:-64]
    return body + digest(body).encode()


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../up", "a//b", "C:\\x", "a\\b", "./a"]
)
def test_member_paths(tmp_path: Path, members: Members, name: str) -> None:
    data = zipped([*members.items(), (name, b"")])
    refused(tmp_path, data, "is no path inside of an archive")
    with pytest.raises(ArtifactError):
        unpack_to(tmp_path / "file", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_archives(tmp_path: Path, members: Members) -> None:
    items = list(members.items())
    refused(tmp_path, zipped([*items, items[1]]), "two members of one name")
    refused(tmp_path, zipped(items[1:]), "has no manifest.json")
    refused(tmp_path, zipped(items, zipfile.ZIP_DEFLATED), "larger than the file")
    noise = [("noise", random.Random(0).randbytes(10**5))]
    refused(tmp_path, zipped([*items, *noise], zipfile.ZIP_DEFLATED), "compressed|larger")
    refused(tmp_path, pack(dict(items[:-1])), "is missing")
    refused(tmp_path, pack({**members, "more": b""}), "more is not in the manifest")
    refused(tmp_path, zipped([])[:-64] + b"0" * 64, "no artifact")
    body = b"PK, but no zip file"
    refused(tmp_path, body + digest(body).encode(), "is not a zip file")


def with_manifest(members: Members, **changes: Any) -> bytes:
    record = json.loads(members[MANIFEST])
    return sealed({**members, MANIFEST: canonical({**record, **changes})})


def test_other_versions_and_machines(
    tmp_path: Path, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(tmp_path, with_manifest(members, format=2), "format 2; this version reads format 1")
    native = {"form": "native"}
    refused(tmp_path, with_manifest(members, **native, torch="1.0"), "native code for torch '1.0'")
    refused(tmp_path, with_manifest(members, **native, project="9"), "native code for project '9'")
    refused(tmp_path, with_manifest(members, form="python"), "native code for|unknown form")
    here = dataclasses.asdict(machine.machine_for(["cpu"], is_native=True))
    for changes, match in (
        ({"system": "Plan9 sparc"}, "compiled for Plan9 sparc, and this is"),
        ({"instructions": [*here["instructions"], "avx1024"]}, "processor with avx1024"),
        ({"devices": ["cpu", "tpu"]}, "for the device 'tpu', which is not here"),
    ):
        refused(tmp_path, with_manifest(members, machine={**here, **changes}), match)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "capability", lambda: "cuda 8.0")
    gpu = {**here, "devices": ["cpu", "cuda"], "capability": "cuda 9.0"}
    refused(tmp_path, with_manifest(members, machine=gpu), "capability cuda 9.0, and this one has")
    # The portable form is for any version.
    (tmp_path / "file").write_bytes(with_manifest(members, torch="1.0", project="9"))
    load(tmp_path / "file", backend="eager")


HOSTILE_OPERATORS = [
    "os.system", "builtins.eval", "aten.from_file.default", "aten.add_.Tensor", "aten.mm.out",
    "optimize_nested.bernoulli.default", "prims.device_put.default", "aten.__class__.mro",
    "aten.mm.__init__", "aten.mm", "size.__import__", "size.eval", "aten._print.default",
    "aten.set_.source_Storage", "quantized.add.default", "aten.record_stream.default", "",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_OPERATORS)
def test_operators_that_are_not_on_the_list(name: str) -> None:
    assert operator_named(name) is None
    node = {"op": name, "args": [{"node": 0}], "kwargs": {}}
    data = canonical({"inputs": 1, "nodes": [node], "results": [1]})
    with pytest.raises(ArtifactError, match=r"is not on the list|is not an operation on sizes"):
        read_graph(data, "graph")


@pytest.mark.parametrize(
    ("node", "match"),
    [
        ({"op": "aten.mm.default", "args": [{"node": 0}], "kwargs": {}}, "needs 'mat2'"),
        ({"op": "aten.mm.default", "args": [{"node": 9}], "kwargs": {}}, "is no earlier node"),
        ({"op": "aten.tanh.default", "args": ["x"], "kwargs": {}}, "takes Tensor as 'self', got x"),
        ({"op": "aten.tanh.default", "args": [{"node": 0}, 1], "kwargs": {}}, "takes 1 arguments"),
        ({"op": "aten.tanh.default", "args": [], "kwargs": {"z": 1}}, "takes no argument 'z'"),
        ({"op": "aten.tanh.default", "args": [{"eval": "1"}], "kwargs": {}}, "is no argument"),
        ({"op": "aten.sum.dim_IntList", "args": [{"node": 0}, [2**70]], "kwargs": {}}, "64-bit"),
        ({"op": "getitem", "args": [{"node": 0}, "x"], "kwargs": {}}, "a node and an index"),
        ({"op": "aten.tanh.default", "args": []}, "expected op, args and kwargs"),
    ],
)
def test_hostile_arguments(node: dict[str, Any], match: str) -> None:
    data = canonical({"inputs": 1, "nodes": [node], "results": [1]})
    with pytest.raises(ArtifactError, match=match):
        read_graph(data, "graph")
    with pytest.raises(ArtifactError, match="not canonical JSON"):
        read_graph(b" " + data, "graph")


def test_shapes_are_checked_before_anything_runs(tmp_path: Path, members: Members) -> None:
    name = next(n for n in members if n.endswith("step.json"))
    graph = json.loads(members[name])
    product = next(n for n in graph["nodes"] if n["op"] == "aten.mm.default")
    product["args"][1] = product["args"][0]
    refused(tmp_path, sealed({**members, name: canonical(graph)}), "step.json: RuntimeError")


DEEP: Any = 1
for _ in range(250):
    DEEP = ["+", DEEP, 1]


@pytest.mark.parametrize(
    "size", [["eval", "x"], ["+"], "m", None, DEEP, ["//", 1, 0], ["**", 9, 10**9], ["-"], 1.5]
)
def test_hostile_sizes(size: Any) -> None:
    with pytest.raises(ArtifactError, match="is not a size"):
        evaluated(size, {"n": 4})


def mutations(record: Any, choose: random.Random) -> Any:
    """Return a JSON record with one place in it changed."""
    record = copy.deepcopy(record)
    holders = [h for h in walk(record) if h]
    holder = choose.choice(holders)
    key = choose.choice(list(holder)) if isinstance(holder, dict) else choose.randrange(len(holder))
    values: list[Any] = [
        None, True, -1, 0, 1, 2, 7, 2**31, 2**63, -(2**70), 1.5, "", "x", "../x", "aten.mm.default",
        "float32", [], {}, [["+", "batch", 1]], {"node": 0}, {"tensor": 5}, {"value": 1},
        {"output": 0}, {"float": "nan"}, "batch", "cuda:7", "complex64",
    ]  # fmt: skip
    if choose.random() < 0.2:
        del holder[key]
    elif choose.random() < 0.3:
        holder[key] = copy.deepcopy(choose.choice(holders))
    else:
        holder[key] = choose.choice(values)
    return record


def walk(record: Any) -> list[Any]:
    if isinstance(record, dict):
        return [record, *(h for item in record.values() for h in walk(item))]
    if isinstance(record, list):
        return [record, *(h for item in record for h in walk(item))]
    return []


@pytest.mark.parametrize("what", ["manifest", "graph"])
def test_fuzz(tmp_path: Path, members: Members, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with one thing changed, every digest made to fit, is refused or is another loss;
    nothing else is raised, and nothing is compiled."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a file that is being loaded runs code")

    monkeypatch.setattr("rewriter.ahead.load.load_package", never)
    monkeypatch.setattr("rewriter.ahead.load.compile_graph", never)
    name = MANIFEST if what == "manifest" else next(n for n in members if n.endswith("step.json"))
    record = json.loads(members[name])
    choose = random.Random(0)
    accepted = 0
    for _ in range(250):
        changed = mutations(record, choose)
        try:
            data = sealed({**members, name: canonical(changed)})
        except (TypeError, AttributeError, ValueError):
            continue  # no manifest at all: it has no place for digests
        (tmp_path / "file").write_bytes(data)
        try:
            load(tmp_path / "file", backend="eager")
            accepted += 1
        except ArtifactError:
            pass
    assert 0 < accepted < 190  # names and values may change; structure may not


def test_random_bytes(tmp_path: Path, members: Members) -> None:
    choose = random.Random(0)
    name = next(n for n in members if n.endswith("step.json"))
    for _ in range(60):
        data = bytearray(members[name])
        for _ in range(choose.randrange(1, 9)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        (tmp_path / "file").write_bytes(sealed({**members, name: bytes(data)}))
        try:
            load(tmp_path / "file", backend="eager")
        except ArtifactError:
            continue


def test_manifest_says_what_it_is(file: Path, tmp_path: Path) -> None:
    manifest, known = read_manifest(file)
    assert (manifest.loss, manifest.form, manifest.leaves) == ("penalty", "portable", ("x",))
    (program,) = manifest.programs
    assert (program.inputs[0].name, program.inputs[0].kind.shape) == ("x", ("batch", 2))
    assert {x.name for x in program.inputs if x.has_gradient} == {
        f"net.{key}" for key in manifest.roots[0].state
    }
    unpack_to(file, tmp_path / "folder", sha256=known)
    assert {p.name for p in (tmp_path / "folder/program0").iterdir()} >= {"step.json", "value.json"}
    assert manifest.format == validate.FORMAT
