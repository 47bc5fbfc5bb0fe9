"""What the wheel promises, read from the files it is built from."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["rewriter", "passes"]

# Written in pieces, so that this file does not contain what it looks for.
# A word in front of the last is a module's attribute, such as torch's.
MACHINE_PATHS = re.compile("|".join(["/wo" + "rk/", r"\.\./sha" + "red", r"(?<!\w)\.lib" + "rary"]))


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def requirements(pyproject: dict[str, Any]) -> list[Requirement]:
    """Every direct requirement of the project and of its extras."""
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for lines in [project["dependencies"], *extras] for line in lines]


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {pin.name: pin for pin in found}


def test_project_metadata(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert project["name"] == "optimize-nested"
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.10"
    assert set(project["optional-dependencies"]) == {
        "dev", "examples", "ase", "lightning", "clients", "jax", "docs",
    }  # fmt: skip


def test_torch_range(requirements: list[Requirement]) -> None:
    (torch,) = [requirement for requirement in requirements if requirement.name == "torch"]
    assert torch.specifier == SpecifierSet(">=2.11,<2.16")


def test_one_wheel_holds_both_packages(pyproject: dict[str, Any]) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == [f"{name}*" for name in PACKAGES]
    page = {"rewriter.page": [f"{folder}/*" for folder in ("assets", "templates", "vendor")]}
    assert setuptools["package-data"] == {name: ["py.typed"] for name in PACKAGES} | page


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package: str) -> None:
    folders = {file.parent for file in (ROOT / package).rglob("*.py")}
    missing = [folder for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, f"no __init__.py, so not in the wheel: {missing}"


def test_every_requirement_is_pinned_in_its_range(
    requirements: list[Requirement], pins: dict[str, Requirement]
) -> None:
    for requirement in requirements:
        pin = pins[requirement.name]
        (exact,) = pin.specifier
        assert exact.operator == "==", f"{pin}: a constraint is an exact version"
        assert exact.version in requirement.specifier, f"{pin} is outside {requirement}"


def test_every_pin_is_a_requirement(
    requirements: list[Requirement], pins: dict[str, Requirement]
) -> None:
    assert set(pins) == {requirement.name for requirement in requirements}


def test_changelog_knows_the_version(pyproject: dict[str, Any]) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)
    assert {pyproject["project"]["version"], "Unreleased"} & set(headings)


def imported_modules(file: Path) -> set[str]:
    """Return the absolute names of the modules that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def third_party(files: Iterable[Path]) -> set[str]:
    """Return what distributions files import modules of."""
    names = {name.partition(".")[0] for file in files for name in imported_modules(file)}
    return {_DISTRIBUTIONS.get(n, n) for n in names - sys.stdlib_module_names - {*PACKAGES}}


# Where the name differs, or the library is not installed here.
_DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "pytorch_lightning": "pytorch-lightning",
}


def distributions(lines: Iterable[str]) -> set[str]:
    return {Requirement(line).name for line in lines}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package: str, pyproject: dict[str, Any]) -> None:
    """A wheel in an empty environment has what it imports, and not by what others bring."""
    found = third_party((ROOT / package).rglob("*.py"))
    assert "torch" in found
    assert found <= distributions(pyproject["project"]["dependencies"])


EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))


def with_helpers(example: Path) -> set[Path]:
    """Return an example and the modules beside it that it imports."""
    found, waiting = set(), [example]
    while waiting:
        file = waiting.pop()
        found.add(file)
        near = {file.parent / f"{name}.py" for name in imported_modules(file)}
        waiting += [helper for helper in near if helper.is_file() and helper not in found]
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT / "examples")))
def test_every_example_says_what_it_needs(example: Path, pyproject: dict[str, Any]) -> None:
    """`make setup` has installed it, or the docstring names the extra."""
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    said = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    named = [e for e in extras if f".[{e}]" in said or f"make {e}" in said]
    lines = [*project["dependencies"], *extras["examples"], *(x for e in named for x in extras[e])]
    files = with_helpers(example)
    own = {file.stem for file in EXAMPLES} | {"examples", "tests"}
    assert third_party(files) - own <= distributions(lines)


@pytest.mark.parametrize(
    ("example", "extra"), [("forces", "ase"), ("poisson_lightning", "lightning")]
)
def test_an_example_without_its_library_says_so(example: str, extra: str, tmp_path: Path) -> None:
    """In one sentence, with what to type."""
    hidden = {"ase": "ase", "lightning": "pytorch_lightning"}[extra]
    code = (
        f"import runpy, sys; sys.modules[{hidden!r}] = None; "
        f"sys.path.insert(0, {str(ROOT / 'examples')!r}); "
        f"runpy.run_path({str(ROOT / 'examples' / example)!r} + '.py', run_name='__main__')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 1
    assert re.fullmatch(rf"This example needs \w+: pip install '.\[{extra}\]'\n", ran.stderr)


def test_passes_never_imports_rewriter() -> None:
    files = sorted((ROOT / "passes").rglob("*.py"))
    assert files, "there is nothing to check in passes/"
    guilty = [
        str(file.relative_to(ROOT))
        for file in files
        if any(name.split(".")[0] == "rewriter" for name in imported_modules(file))
    ]
    assert not guilty


def project_files() -> list[Path]:
    """Return the files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_file_names_a_path_of_one_machine() -> None:
    guilty = {
        str(file.relative_to(ROOT)): found.group()
        for file in project_files()
        if (found := MACHINE_PATHS.search(file.read_text(encoding="utf-8", errors="replace")))
    }
    assert not guilty


@pytest.mark.parametrize(
    ("text", "is_machine_path"),
    [
        ("open('/wo" + "rk/x')", True),
        ("see ../sha" + "red/notes", True),
        ("run .lib" + "rary/tool", True),
        ("torch.lib" + "rary.custom_op", False),
    ],
)
def test_machine_paths_are_found(text: str, is_machine_path: bool) -> None:
    assert bool(MACHINE_PATHS.search(text)) == is_machine_path
