"""The pictures of a report: a page of HTML to look around in, and a drawing of one stage.

`render_html` and `render_svg` take a report's record (`Report.to_dict`) and know nothing else of
the compiler, so a record that was written to a file yesterday can be drawn today.
"""

from rewriter.page.html import render_html
from rewriter.page.svg import render_svg

__all__ = ["render_html", "render_svg"]
