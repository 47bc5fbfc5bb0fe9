"""Losses to measure, each as a user would write it."""

from examples.workloads import curvature, penalties, physics
from examples.workloads.workload import Case, Workload

WORKLOADS: list[Workload] = sorted(
    [*penalties.WORKLOADS, *physics.WORKLOADS, *curvature.WORKLOADS], key=lambda w: w.number
)

__all__ = ["WORKLOADS", "Case", "Workload"]
