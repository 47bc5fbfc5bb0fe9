"""A report as a table for a notebook."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment

from rewriter.report_text import si

_TABLE = """\
<div style="font-family: sans-serif; font-size: 13px">
{%- if not record.captured %}
<p><b>{{ record.function }}</b>
{{ "is captured by layer" if record.layers else "runs as written" }}: {{ record.reason }}</p>
{%- for line in record.layers %}<p>{{ line }}</p>{% endfor %}
{%- else %}
<p><b>{{ record.function }}</b>: {{ totals.flops | si }}FLOP,
as written {{ totals.flops_as_written | si }}FLOP;
{{ totals.matmuls }} matmuls, as written {{ totals.matmuls_as_written }};
{{ totals.kernels }} kernels of pointwise work; {{ totals.bytes_moved | si }}B moved,
{{ totals.bytes_kept | si }}B kept at most, as written {{ totals.bytes_kept_as_written | si }}B</p>
<table>
<tr><th>site</th><th>where</th><th>operator</th><th>strategy</th><th>price</th><th>why</th></tr>
{%- for site in record.sites %}
<tr>
<td>{{ site.name }}</td>
<td><code>{{ site.path }}:{{ site.line }}: {{ site.code }}</code></td>
<td>{{ site.operator }}, order {{ site.order }}</td>
<td>{{ site.strategy }}</td>
<td title="{{ site.flops_formula }}">{{ (site.flops | si) ~ "FLOP" if site.flops }}</td>
<td>{{ site.reason }}</td>
</tr>
{%- endfor %}
</table>
<table>
<tr><th>candidate</th><th>FLOPs</th><th>moved</th><th>kept</th><th>kernels</th><th>step</th></tr>
{%- for one in record.candidates %}
<tr><td>{{ one.name }}{{ " (taken)" if one.taken }}</td>
<td title="{{ one.flops_formula }}">{{ one.flops | si }}</td>
<td title="{{ one.bytes_moved_formula }}">{{ one.bytes_moved | si }}B</td>
<td title="{{ one.bytes_kept_formula }}">{{ one.bytes_kept | si }}B</td>
<td>{{ one.kernels }}</td>
<td>{{ (one.seconds | si) ~ "s" if one.seconds }}</td></tr>
{%- endfor %}
</table>
<table>
<tr><th>stage</th><th>operators</th><th>changes</th><th>seconds</th></tr>
{%- for stage in record.stages %}
<tr><td>{{ stage.name }}</td><td>{{ stage.operators }}</td><td>{{ stage.changes }}</td>
<td>{{ "%.2f" | format(stage.seconds) }}</td></tr>
{%- endfor %}
</table>
{%- endif %}
{%- for line in breaks %}<p>runs as written: {{ line }}</p>{% endfor %}
</div>
"""

_environment = Environment(autoescape=True)
_environment.filters["si"] = si
_template = _environment.from_string(_TABLE)


def table_of(record: dict[str, Any]) -> str:
    """Return a report as HTML without scripts.

    Args:
        record: What `Report.summary` returns.
    """
    breaks = [reason for reason in record["breaks"] if reason != record["reason"]]
    return _template.render(record=record, totals=record["totals"], breaks=breaks)
