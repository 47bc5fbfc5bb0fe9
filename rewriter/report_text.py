"""A report as one screen of text, plain or in colours."""

from __future__ import annotations

from typing import Any

from rich.text import Text

WIDTH = 100


def si(number: float) -> str:
    """Print with an SI prefix: ``12.3 M``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def text_of(record: dict[str, Any]) -> Text:
    """Return one screen of text, at most 100 columns wide.

    Args:
        record: What `Report.summary` returns.
    """
    lines = _captured(record) if record["captured"] else _not_captured(record)
    for name in ("breaks", "recompiles"):
        found = record[name]
        if not found or (name == "recompiles" and len(found) == 1):
            continue
        lines.append([(_TITLES[name], "bold")])
        lines += [[(f"  {number}  {line}", "")] for number, line in enumerate(found[:4], start=1)]
        if len(found) > 4:
            lines.append([(f"  … and {len(found) - 4} more", "dim")])
    screen = Text("\n").join(Text.assemble(*line) for line in lines)
    screen.no_wrap, screen.overflow = True, "ellipsis"
    return Text("\n").join(_cut(line) for line in screen.split("\n"))


_TITLES = {"breaks": "calls that run as written", "recompiles": "specialisations"}

Line = list[tuple[str, str]]


def _cut(line: Text) -> Text:
    line.truncate(WIDTH, overflow="ellipsis")
    line.rstrip()
    return line


def _not_captured(record: dict[str, Any]) -> list[Line]:
    how = "captured by layer" if record["layers"] else "runs as written"
    head: Line = [(f"{record['function'] or 'the loss'} ", "bold"), (f"{how}: ", "yellow")]
    return [[*head, (record["reason"], "")], *([(f"  {line}", "")] for line in record["layers"])]


def _captured(record: dict[str, Any]) -> list[Line]:
    totals, sites = record["totals"], record["sites"]
    inputs = ", ".join(f"{i['name']} {i['tensor']}" for i in record["inputs"])
    lines: list[Line] = [
        [
            (record["function"] or "the loss", "bold"),
            (f": {len(sites)} nested derivative{'' if len(sites) == 1 else 's'}", ""),
        ],
        [("  inputs ", "dim"), (_shortened(inputs, WIDTH - 9), "")],
    ]
    for site in sites:
        lines += _site(site)
    if record["candidates"]:
        lines.append([("candidates", "bold")])
    for candidate in record["candidates"]:
        price = f"{si(candidate['flops']):>7}FLOP  {si(candidate['bytes_moved']):>7}B moved  "
        names = ", ".join(sorted(set(candidate["strategies"].values()))) or "no site"
        lines.append(
            [
                ("  * " if candidate["taken"] else "    ", "green"),
                (f"{names:22}", "green" if candidate["taken"] else ""),
                (f"{price}{candidate['nodes']} operators", ""),
            ]
        )
    lines.append([("stages", "bold")])
    for stage in record["stages"]:
        lines.append(
            [
                (f"    {stage['name']:9}", ""),
                (f"{stage['operators']:6} operators {stage['changes']:6} changes ", ""),
                (f"{stage['seconds']:8.2f} s", ""),
                (f"  {stage['maker']}", "dim"),
            ]
        )
    return [*lines, *_totals(totals)]


def _site(site: dict[str, Any]) -> list[Line]:
    colour = "green" if site["status"] == "rewritten" else "yellow"
    price = [(f"    {si(site['flops'])}FLOP = {site['flops_formula']}", "")]
    where = f"{site['path']}:{site['line']}" if site["path"] else "?"
    refused = [c for c in site["candidates"] if not c["accepted"]]
    return [
        [
            (site["name"], "bold"),
            (f": {site['operator']}, order {site['order']}, ", ""),
            (site["status"], colour),
            (f" ({site['strategy']})", ""),
        ],
        [("    at ", "dim"), (where, "cyan"), (f": {site['code']}", "")],
        *([price] if site["flops"] else []),
        *(
            [[(f"    {c['strategy']} refused: ", "yellow"), (c["reason"], "")] for c in refused]
            or [[(f"    {site['reason']}", "")]]
        ),
    ]


def _totals(totals: dict[str, Any]) -> list[Line]:
    written = totals["flops_as_written"]
    ratio = totals["flops"] / written if written else 1.0
    return [
        [
            ("step: ", "bold"),
            (f"{si(totals['flops'])}FLOP", "bold green" if ratio < 1 else "bold"),
            (f", as written {si(written)}FLOP (x{ratio:.2f}); ", ""),
            (f"{totals['matmuls']} matmuls, as written {totals['matmuls_as_written']}", ""),
        ],
        [
            (f"    {si(totals['bytes_moved'])}B moved, {si(totals['bytes_kept'])}B kept, ", ""),
            (f"{totals['nodes']} operators", ""),
        ],
        [(f"    {totals['flops_formula']} FLOP", "dim")],
        [(f"    {totals['flops_as_written_formula']} FLOP as written", "dim")],
    ]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
