"""Recurrent layers with dropout between them, one layer at a time.

PyTorch's decomposition of `torch.lstm` and its kin, which a trace takes, leaves the dropout out
(2.13, `torch._decomp.decompositions._rnn_helper`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS: dict[Callable[..., Any], str] = {
    getattr(torch, name): name for name in ("rnn_tanh", "rnn_relu", "lstm", "gru")
}


def layer_by_layer(
    kind: str, x: Tensor, *arguments: Any, dropout: Callable[..., Tensor] = F.dropout
) -> Any:
    """Call one of `KINDS`, with ``dropout(x, p)`` where it has its own.

    Args:
        kind: Its name.
        x: Points, shape (time, batch, dim); shape (time · batch, dim) if a packed sequence.
        *arguments: The others.
        dropout: What to do between the layers.
    """
    function = getattr(torch, kind)
    if not isinstance(arguments[2], bool):  # a packed sequence has its sizes in front
        return function(x, *arguments)
    states, weights, has_biases, n_layers, p, train, bidirectional, batch_first = arguments
    if not train or p == 0 or n_layers == 1:
        return function(x, *arguments)
    parts = (states,) if isinstance(states, Tensor) else tuple(states)
    directions, n_weights = 2 if bidirectional else 1, len(weights) // n_layers
    x = x.transpose(0, 1) if batch_first else x
    found = []
    for layer in range(n_layers):
        if layer:
            x = dropout(x, p)
        own = [part[layer * directions : (layer + 1) * directions] for part in parts]
        state = own[0] if isinstance(states, Tensor) else own
        mine = weights[layer * n_weights : (layer + 1) * n_weights]
        x, *last = function(x, state, mine, has_biases, 1, 0.0, train, bidirectional, False)
        found.append(last)
    last = [torch.cat(states) for states in zip(*found, strict=True)]
    return (x.transpose(0, 1) if batch_first else x, *last)
