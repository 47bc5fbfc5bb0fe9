"""The simplifying passes, in order, until none changes anything."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.graph import drop_dead, finish
from passes.simplify.aliases import drop_aliases, merge_views
from passes.simplify.batches import fold_batches
from passes.simplify.common import merge_common
from passes.simplify.contractions import contract_first
from passes.simplify.factors import keep_factors
from passes.simplify.filled import fold_filled
from passes.simplify.groups import fold_groups
from passes.simplify.masks import narrow_masks
from passes.simplify.narrow import narrow_products, narrow_stacks
from passes.simplify.rows import multiply_rows_once
from passes.simplify.scales import merge_products, share_scaled
from passes.simplify.sums import gather_sums
from passes.simplify.zeros import drop_zeros

RULES = (
    merge_views,
    drop_aliases,
    drop_zeros,
    fold_filled,
    narrow_masks,
    merge_common,
    fold_batches,
    fold_groups,
    gather_sums,
    share_scaled,
    merge_products,
    contract_first,
    multiply_rows_once,
    narrow_products,
    narrow_stacks,
)
# Of what the others have left: it changes more of a graph than they know again.
LAST = (keep_factors,)


def simplify(module: GraphModule, rounds: int = 20) -> dict[str, int]:
    """Run every rule to a fixpoint.

    Args:
        module: A functional ATen graph; changed in place.
        rounds: A bound on the rounds; reaching it is a bug in a rule.

    Returns:
        How often each rule fired.
    """
    fired = {rule.__name__: 0 for rule in (*RULES, *LAST)} | {"drop_dead": 0}
    for _ in range(rounds):
        fired["drop_dead"] += drop_dead(module.graph)
        changes = {rule.__name__: rule(module.graph) for rule in RULES}
        if not any(changes.values()):
            changes = {rule.__name__: rule(module.graph) for rule in LAST}
        for name, count in changes.items():
            fired[name] += count
        if not any(changes.values()):
            finish(module)
            return fired
    raise AssertionError(f"simplify did not settle in {rounds} rounds: {changes}")  # pyright: ignore
