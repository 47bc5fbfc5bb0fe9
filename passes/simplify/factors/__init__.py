"""Products of products, contracted in their cheapest order.

A gradient of one sample's loss in the weights of a layer is an outer product, ``δ aᵀ``, and its
norm is ``‖δ‖ ‖a‖``: what such a tensor is used for can be computed from its factors. `terms` is the
algebra, sums of products of tensors over named indices; `moves` reads operators into it; `order`
finds the cheapest way to contract one product; `lowering` writes that down as operators again;
`keep` decides where.
"""

from passes.simplify.factors.keep import keep_factors

__all__ = ["keep_factors"]
