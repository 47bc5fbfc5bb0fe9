"""Losses to measure, each as a user would write it."""

from examples.workloads import curvature, directions, jacobians, operators, penalties, physics
from examples.workloads.workload import Case, Workload

_FAMILIES = (penalties, physics, directions, operators, curvature, jacobians)
WORKLOADS: list[Workload] = sorted(
    (workload for family in _FAMILIES for workload in family.WORKLOADS), key=lambda w: w.number
)

__all__ = ["WORKLOADS", "Case", "Workload"]
