"""A training step as a file: compiled ahead of time, loaded without its Python.

The way there: `signature` takes a call apart, `observe` captures it, `program` makes records and
closed graphs of it (`closed`), which are written as data (`portable`) or compiled
(`rewriter.codegen`), described by a `manifest` and packed (`archive`). The way back: `archive`,
`validate`, `shapes`, and `run`, behind `loaded` and `bind`.
"""
