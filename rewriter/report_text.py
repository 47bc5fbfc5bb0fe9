"""A report as one screen of text, plain or in colours."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.text import Text

WIDTH = 100
LISTED = 4

Line = list[tuple[str, str]]
"""Pieces of text, each with a style of rich."""


def si(number: float) -> str:
    """Print with an SI prefix: ``12.3 M``."""
    for power, prefix in ((-9, "n"), (-6, "µ"), (-3, "m")):
        if 0 < abs(number) < 10.0 ** (power + 3):
            return f"{number / 10.0**power:.3g} {prefix}"
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
    if record["captured"]:
        lines = [*_head(record), *_sites(record), *_choices(record), *_stages(record)]
        if record["way"] == "trace":
            lines += _wrapped([("captured: ", "bold")], _by_recording(record))
        lines += [*_totals(record["totals"]), *_list("specialisations", record["recompiles"])]
        if record["captures"]["captures"] > 1:
            lines.append([(record["captures"]["text"], "")])
        lines += _list("graphs", record["tiers"])
        if record["verified"]:
            lines += _wrapped([("verified: ", "bold")], record["verified"])
    else:
        lines = _not_captured(record)
    lines += _list("timed", record["raced"])
    breaks = [reason for reason in record["breaks"] if reason != record["reason"]]
    return _text([*lines, *_list("calls that run as written", breaks)])


def sites_text(record: dict[str, Any]) -> str:
    """Return what became of each site, as text."""
    return _text(_sites(record)).plain


def choices_text(record: dict[str, Any]) -> str:
    """Return what was priced, as text."""
    return _text([*_choices(record), *_totals(record["totals"])]).plain


def stages_text(record: dict[str, Any]) -> str:
    """Return what each pass has done, as text."""
    return _text(_stages(record)).plain


def _text(lines: list[Line]) -> Text:
    return Text("\n").join(_cut(Text.assemble(*line)) for line in lines)


def _cut(line: Text) -> Text:
    line.truncate(WIDTH, overflow="ellipsis")
    line.rstrip()
    return line


def _by_recording(record: dict[str, Any]) -> str:
    reason = record["refused_before"]
    return f"by a recording; Dynamo refuses: {reason}" if reason else "by a recording, as asked for"


def _not_captured(record: dict[str, Any]) -> list[Line]:
    how = "captured by layer" if record["layers"] else "runs as written"
    name = record["function"]
    head: Line = [(f"{name}: " if name else "", "bold"), (f"{how}: ", "yellow")]
    layers: list[Line] = [[(f"  {line}", "")] for line in record["layers"]]
    remedy = _wrapped([("  remedy: ", "bold")], record["remedy"]) if record["remedy"] else []
    return [*_wrapped(head, record["reason"]), *remedy, *layers]


def _wrapped(head: Line, text: str) -> list[Line]:
    """Return text of any length after the head of its first line."""
    start = " " * sum(len(piece) for piece, _ in head)
    first, *rest = textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * 8)
    return [[*head, (first.removeprefix(start), "")], *([(line, "")] for line in rest)]


def _head(record: dict[str, Any]) -> list[Line]:
    number = len(record["sites"])
    inputs = ", ".join(f"{item['name']} {item['tensor']}" for item in record["inputs"])
    plural = "" if number == 1 else "s"
    return [
        [(record["function"] or "the loss", "bold"), (f": {number} nested derivative{plural}", "")],
        [("    of ", "dim"), (inputs, "")],
    ]


def _sites(record: dict[str, Any]) -> list[Line]:
    return [line for site in record["sites"] for line in _site(site)]


def _site(site: dict[str, Any]) -> list[Line]:
    colour = "green" if site["status"] == "rewritten" else "yellow"
    where = f"{site['path']}:{site['line']}" if site["path"] else "?"
    refused = [c for c in site["candidates"] if not c["accepted"]]
    lines: list[Line] = [
        [
            (site["name"], "bold"),
            (f": {site['operator']}, order {site['order']}, ", ""),
            (site["status"], colour),
            (f" ({site['strategy']})", ""),
        ],
        [("    at ", "dim"), (where, "cyan"), (f": {site['code']}", "")],
    ]
    if site["flops"]:
        lines.append([("    costs ", "dim"), (_priced(site["flops"], site["flops_formula"]), "")])
    if not refused:
        lines.append([("    why ", "dim"), (site["reason"], "")])
    for c in refused:
        lines += _wrapped([(f"    {c['strategy']} refused: ", "yellow")], c["reason"])
    return lines


def _choices(record: dict[str, Any]) -> list[Line]:
    lines: list[Line] = [[("candidates", "bold")]] if record["candidates"] else []
    for candidate in record["candidates"]:
        lines += _candidate(candidate)
    for part in record["not_traced"]:
        first, *others = part["sites"]
        sites = first if not others else f"{first} and {len(others)} more"
        said = f"no other strategy at {sites} traced: at least {si(part['flops_at_least'])}FLOP"
        lines.append([(f"    {said}", "dim")])
    if record["untried"]:
        plural = "" if record["untried"] == 1 else "s"
        lines.append(
            [(f"    {record['untried']} more change{plural} of a strategy not tried", "dim")]
        )
    return lines


def _candidate(candidate: dict[str, Any]) -> list[Line]:
    colour = "green" if candidate["taken"] else ""
    price = f"{si(candidate['flops']):>7}FLOP  {si(candidate['bytes_moved']):>7}B moved  "
    price += f"{si(candidate['bytes_kept']):>7}B kept  {candidate['kernels']:3} kernels"
    if candidate["seconds"] is not None:
        price += f"  {si(candidate['seconds']):>6}s"
    name = candidate["name"]
    mark = "  * " if candidate["taken"] else "    "
    lines: list[Line] = [[(mark, colour), (f"{name:22}", colour), (price, "")]]
    if len(name) > 22:
        lines = [[(mark, colour), (name, colour)], [(" " * 26, ""), (price, "")]]
    if not candidate["flops_formula"].isdigit():
        lines.append([(" " * 26 + f"= {candidate['flops_formula']} FLOP", "dim")])
    return lines


def _stages(record: dict[str, Any]) -> list[Line]:
    lines: list[Line] = [[("stages", "bold")]]
    for stage in record["stages"]:
        done = f"{stage['operators']:6} operators {stage['changes']:6} changes "
        lines.append(
            [
                (f"    {stage['name']:9}{done}{stage['seconds']:8.2f} s", ""),
                (f"  {stage['maker']}", "dim"),
            ]
        )
    return lines


def _totals(totals: dict[str, Any]) -> list[Line]:
    written = totals["flops_as_written"]
    ratio = totals["flops"] / written if written else 1.0
    now = _priced(totals["flops"], totals["flops_formula"])
    before = _priced(written, totals["flops_as_written_formula"])
    matmuls = f"{totals['matmuls']} matmuls, as written {totals['matmuls_as_written']}"
    kept = f"{si(totals['bytes_kept'])}B kept at most"
    kept += f", as written {si(totals['bytes_kept_as_written'])}B"
    work = f"{totals['kernels']} kernels of pointwise work, {totals['nodes']} operators"
    return [
        [("step", "bold"), (f"  {now}", "bold green" if ratio < 1 else "bold")],
        [(f"    x{ratio:.2f} of what is written: {before}", "")],
        [(f"    {matmuls}; {work}", "")],
        [(f"    {kept}; {si(totals['bytes_moved'])}B moved", "")],
    ]


def _priced(flops: int, formula: str) -> str:
    """Print a price; with its formula, if it has sizes in it."""
    number = f"{si(flops)}FLOP"
    return number if formula.isdigit() or not formula else f"{number} = {formula}"


def _list(title: str, found: list[str]) -> list[Line]:
    if not found:
        return []
    lines: list[Line] = [[(f"{title}: {len(found)}", "bold")]]
    lines += [[(f"  {number}  {line}", "")] for number, line in enumerate(found[:LISTED], start=1)]
    if len(found) > LISTED:
        lines.append([(f"  … and {len(found) - LISTED} more", "dim")])
    return lines
