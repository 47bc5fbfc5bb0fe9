"""What changed between two stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text


@dataclass(frozen=True)
class Change:
    """A node that two stages compute in different ways.

    Attributes:
        id: What the node is called in both.
        before: The node in the first stage, as text.
        after: The node in the second stage, as text.
    """

    id: str
    before: str
    after: str


@dataclass(frozen=True, repr=False)
class StageDiff:
    """What changed between two stages.

    Attributes:
        first: The first stage's name.
        second: The second stage's name.
        added: Nodes that only the second has, as text.
        removed: Nodes that only the first has, as text.
        changed: Nodes that both have, with another operator, shape or arguments.
        same: How many nodes are the same.
    """

    first: str
    second: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[Change, ...]
    same: int

    def __str__(self) -> str:
        return self.__rich__().plain

    def __rich__(self) -> Text:
        head = (
            f"{self.first} → {self.second}: {len(self.removed)} removed, {len(self.added)} added, "
            f"{len(self.changed)} changed, {self.same} the same"
        )
        text = [Text(head, "bold")]
        text += [Text(f"- {node}", "red") for node in self.removed]
        text += [Text(f"+ {node}", "green") for node in self.added]
        for change in self.changed:
            text += [Text(f"~ {change.before}", "yellow"), Text(f"→ {change.after}", "yellow")]
        return Text("\n").join(text)

    def __repr__(self) -> str:
        return str(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return asdict(self)


def diff_stages(first: dict[str, Any], second: dict[str, Any]) -> StageDiff:
    """Compare two stages of `Report.to_dict`; nodes inside of derivatives count like the others,
    their inputs and outputs do not."""
    old = {node["id"]: node for node in _walk(first["nodes"])}
    new = {node["id"]: node for node in _walk(second["nodes"])}
    both = [name for name in old if name in new]
    changed = [n for n in both if _line(old[n]) != _line(new[n])]
    return StageDiff(
        first=first["name"],
        second=second["name"],
        added=tuple(_line(node) for name, node in new.items() if name not in old),
        removed=tuple(_line(node) for name, node in old.items() if name not in new),
        changed=tuple(Change(n, _line(old[n]), _line(new[n])) for n in changed),
        same=len(both) - len(changed),
    )


def _walk(nodes: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for node in nodes:
        yield node
        yield from (n for n in _walk(node.get("body", ())) if n["kind"] in ("call", "site"))


def _line(node: dict[str, Any]) -> str:
    if node["kind"] == "input":
        return f"{node['id']}: {node['tensor']}"
    return f"{node['id']}: {node['tensor']} = {node['op']}({', '.join(node['inputs'])})"
