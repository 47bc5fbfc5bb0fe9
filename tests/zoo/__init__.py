"""Losses as people write them, each whole: networks, data, caches, counters, prints.

They are written after public research code and libraries of their fields, not after what is
captured. ``python -m tests.zoo`` measures them all and writes ``docs/zoo.md``.
"""
