"""What earlier processes chose, kept beside Inductor's compiled code.

Strategies are kept, and no graphs: each process builds and prices the form itself, and searches
anew if it does not cost what it cost then. So what is found on disk can make a step slow to build,
and never wrong.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from pathlib import Path

import torch
from torch.fx import GraphModule

import passes
import rewriter
from passes.custom_rules import CUSTOM
from passes.graph import graphs_in, print_graph
from passes.joint import Roles
from passes.price import size_hints
from rewriter.codegen import cache_folder
from rewriter.files import write_whole
from rewriter.forms import Candidate

_FOLDER = "optimize_nested"


class Recollection:
    """What was chosen for a derivative graph.

    Args:
        module: The graph.
        roles: What its inputs and outputs are.
        seeded: Whether the outputs' cotangents are inputs of the joint graph.
    """

    def __init__(self, module: GraphModule, roles: Roles, *, seeded: bool) -> None:
        text = list(map(print_graph, graphs_in(module)))
        sizes = sorted((str(symbol), str(size)) for symbol, size in size_hints(module).items())
        operators = sorted(map(str, CUSTOM))
        said = [_code(), torch.__version__, text, sizes, repr(roles), seeded, operators]
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        self._path = cache_folder() / _FOLDER / f"{key}.json"

    def strategies(self) -> dict[str, str] | None:
        """Return site name → strategy; None if nothing is known."""
        return self._found()[0]

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate has the strategies that were chosen, and costs what that cost."""
        return self._found() == (dict(candidate.strategies), candidate.flops)

    def keep(self, candidate: Candidate) -> None:
        """Keep a choice for later processes, if the folder can be written to."""
        data = {"strategies": dict(candidate.strategies), "flops": candidate.flops}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(data))

    def _found(self) -> tuple[dict[str, str] | None, int]:
        try:
            data = json.loads(self._path.read_text())
            strategies = {str(name): str(strategy) for name, strategy in data["strategies"].items()}
            return strategies, int(data["flops"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, 0  # there is none, or it is no file of ours


@functools.cache
def _code() -> str:
    """Return a digest of the passes: other passes may choose otherwise."""
    digest = hashlib.sha256()
    for package in (passes, rewriter):
        (folder,) = package.__path__
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
