"""Derivatives as operands of the contractions that use them.

`terms` is the algebra: sums of products of explicit tensors and one derivative tensor, over named
indices. `raising` reads a derivative graph into it; `rows` proves that a body keeps the rows of its
input apart; `lowering` computes what is asked for, in Taylor mode.
"""
