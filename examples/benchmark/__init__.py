"""The workloads as written, compiled, and optimized, side by side: `python -m examples.benchmark`.

The forms of a case take turns in a process of their own, so a form that takes the process down
loses its column and nothing else. `results` keeps what was measured, a section for each machine;
`page`, `targets` and `chart` are made from it.
"""
