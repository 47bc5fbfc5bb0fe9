"""Artifacts through Inductor: native code in a new process, without Python, and compiled on
arrival."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import ArtifactError, OptimizeNestedError, load, optimize_nested
from rewriter.ahead.archive import MANIFEST, pack, unpack
from tests.versions import sizes_fixed_by_convolutions

pytestmark = pytest.mark.inductor
ROOT = Path(__file__).resolve().parents[2]


def drawing(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = nn.functional.dropout(net(p), 0.3)
    (g,) = grad(u.sum(), p, create_graph=True)
    return g.square().sum() + (u - y).square().mean()


CHILD = """
import sys, torch
from rewriter import load
loaded = load(sys.argv[1], sha256=sys.argv[2])
saved = torch.load(sys.argv[3], weights_only=True)
net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
net.load_state_dict(saved["state"])
bound, found = loaded.bind(net), []
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
torch.manual_seed(3)
for x, y in saved["data"]:
    optimizer.zero_grad()
    value = bound(x, y=y)
    value.backward()
    optimizer.step()
    found.append(value.detach())
with torch.no_grad():
    found.append(bound(x, y))
value, grads = loaded.value_and_grad(net.state_dict(), x, y)
end = {"values": found, "state": net.state_dict(), "value": value, "grads": grads}
torch.save({**end, "generator": torch.get_rng_state()}, sys.argv[3])
"""


def test_native_in_a_new_process(tmp_path: Path) -> None:
    """Training with draws and two batch sizes: as in eager, generator included."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    data = [(torch.randn(n, 3), torch.randn(n, 1)) for n in (5, 33, 5)]
    file, sizes = tmp_path / "file.pt2", {"x": {0: "batch"}, "y": {0: "batch"}}
    digest = optimize_nested(drawing).compile_ahead(
        file, net, torch.randn(16, 3), torch.randn(16, 1), dynamic=sizes, modes=["train"]
    )
    saved = tmp_path / "saved.pt"
    torch.save({"state": net.state_dict(), "data": data}, saved)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), digest, str(saved)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    end = torch.load(saved, weights_only=True)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(3)
    for (x, y), value in zip(data, end["values"], strict=False):
        optimizer.zero_grad()
        expected = drawing(net, x, y)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(value, expected.detach())
    x, y = data[-1]
    torch.testing.assert_close(end["values"][-1], drawing(net, x, y).detach())
    expected, grads = optimize_nested(drawing, backend="eager").value_and_grad(net, x, y)
    torch.testing.assert_close(end["value"], expected.detach())
    torch.testing.assert_close(end["grads"], grads)
    torch.testing.assert_close(end["state"], dict(net.state_dict()))
    assert torch.equal(end["generator"], torch.get_rng_state())

    members = unpack(file.read_bytes(), "file")
    for name in members:
        altered = bytearray(members[name])
        altered[len(altered) // 2] ^= 1
        file.write_bytes(pack({**members, name: bytes(altered)}))
        match = "and not" if name == MANIFEST else f"{name} is not what the manifest says"
        with pytest.raises(ArtifactError, match=match):
            load(file, sha256=digest)


def test_portable_compiles_on_arrival(tmp_path: Path) -> None:
    """With a size that stays open."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def penalty(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        (g,) = grad(net(p).sum(), p, create_graph=True)
        return g.square().sum(1).mean()

    optimize_nested(penalty).compile_ahead(
        tmp_path / "file",
        net,
        torch.randn(16, 3),
        portable=True,
        modes=["train"],
        dynamic={"x": {0: "n"}},
    )
    bound = load(tmp_path / "file").bind(net)
    for n in (16, 5):
        x = torch.randn(n, 3)
        expected = optimize_nested(penalty, backend="eager").value_and_grad(net, x)
        torch.testing.assert_close(bound.value_and_grad(x), (expected[0].detach(), expected[1]))


@sizes_fixed_by_convolutions
@pytest.mark.parametrize("portable", [False, True])
def test_sizes_that_inductor_fixes(tmp_path: Path, portable: bool) -> None:
    """By reverse mode, the weight gradient of a convolution is one with the batch as channels."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        (g,) = grad(net(p).sum(), p, create_graph=True)
        return g.square().sum()

    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh())
    x, file = torch.randn(8, 1, 4, 4), tmp_path / "file"
    for _ in range(2):  # the second time its code is on disk
        with pytest.raises(OptimizeNestedError, match="one size only of those declared dynamic"):
            optimize_nested(loss, strategy="reverse").compile_ahead(
                file, net, x, portable=portable, modes=["train"], dynamic={"x": {0: "batch"}}
            )
            load(file).bind(net)(x)
    assert file.exists() == portable


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="CMake is not installed")
def test_training_without_python(tmp_path: Path) -> None:
    """The example in C++, built against the installed PyTorch, trains."""
    folder = ROOT / "examples" / "cpp"
    runpy.run_path(str(folder / "penalty.py"))["main"](str(tmp_path))
    build, prefix = tmp_path / "build", torch.utils.cmake_prefix_path
    for command in (
        ["cmake", "-S", str(folder), "-B", str(build), f"-DCMAKE_PREFIX_PATH={prefix}"],
        ["cmake", "--build", str(build)],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    trained = subprocess.run(
        [str(build / "train"), str(tmp_path / "penalty/program0/step.pt2")],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert trained.stdout.startswith("loss ")
