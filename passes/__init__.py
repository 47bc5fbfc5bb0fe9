"""Passes over graphs: graph in, graph out. Nothing here knows user code or code generation (that is
`rewriter`)."""
