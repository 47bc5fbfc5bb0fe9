"""``python -m rewriter``: see `rewriter.cli`."""

from rewriter.cli import main

main()
