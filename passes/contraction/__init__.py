"""Derivatives as operands of the contractions that use them.

`terms` is the algebra: sums of products of explicit tensors and one derivative tensor, over named
indices. `raising` reads a derivative graph into it, by the `moves` of linear operators; `rows`
proves that a body keeps the rows of its point apart; `directions` takes contractions apart into
derivatives along single directions; `lowering` computes them in Taylor mode; `replace` puts that in
place of the derivatives.
"""
