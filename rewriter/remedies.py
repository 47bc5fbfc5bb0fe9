"""What to change where a loss is refused, in words: a table of kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of obstacle.

    Attributes:
        name: What it is called.
        remedy: What to write in its place; empty where nothing is known.
        reason: What the reason of a refusal says, as a regular expression; None: anything.
        code: What the line says, as a regular expression; None: anything.
    """

    name: str
    remedy: str
    reason: str | None = None
    code: str | None = None

    def is_of(self, reason: str, code: str) -> bool:
        """Whether a refusal with this reason at this line is of this kind."""
        pairs = ((self.reason, reason), (self.code, code))
        return all(found is None or re.search(found, text) for found, text in pairs)


UNKNOWN = Kind("unknown", "")

# The first that fits; the more particular ones come first.
KINDS: tuple[Kind, ...] = (
    Kind(
        "a write of a log",
        "log after the step: return what is logged beside the loss, detached",
        code=r"\bprint\(|\blogg?(er|ing)?\.\w+\(|\bwarn(ings)?\b|\.write\(|\btqdm\b|\.add_scalar|"
        r"\bwandb\.|\.set_(postfix|description)",
    ),
    Kind(
        "a draw of another generator",
        "draw with PyTorch's generator (torch.rand, torch.randint), or before the step",
        reason=r"random generator|takes a Generator|random bytes|seeds a random",
    ),
    Kind(
        "a draw of another generator",
        "draw with PyTorch's generator (torch.rand, torch.randint), or before the step",
        code=r"\b(np|numpy)\.random\.",
    ),
    Kind(
        "a file, the clock or the system",
        "do it before or after the step",
        code=r"\bopen\(|\bos\.|\btime\.|\bsys\.|\bsubprocess\.|\bdatetime\.|\btorch\.(save|load)\(",
    ),
    Kind(
        "a branch on values",
        "torch.where(condition, a, b) where both sides compute; move a check behind the step",
        reason=r"branch on the value|[Dd]ata-dependent|guard on data-dependent",
    ),
    Kind(
        "sizes that depend on values",
        "weights of zeros and ones in place of the mask, or a fixed number of elements",
        reason=r"size.* depends on|sizes that depend|nonzero|masked_select|unbacked",
    ),
    Kind(
        "a number read from a tensor",
        "keep it a tensor; read the number after the step",
        reason=r"read from a tensor|an integer is read|item\(\)|got SymInt",
    ),
    Kind(
        "a number read from a tensor",
        "keep it a tensor; read the number after the step",
        code=r"\.item\(\)|\.tolist\(\)|\b(float|int|bool)\(",
    ),
    Kind(
        "NumPy",
        "write it with PyTorch, or compute it before the step",
        code=r"\b(np|numpy|scipy)\.|\.numpy\(\)|from_numpy",
    ),
    Kind(
        "a list that grows",
        "append after the step",
        reason=r"a list that grows",
    ),
    Kind(
        "a user-defined autograd.Function",
        "write its backward with differentiable operators and without @once_differentiable",
        reason=r"user-defined autograd\.Function",
    ),
    Kind(
        "requires_grad is switched",
        "switch it before or after the step, or use x.detach() where a constant is meant",
        code=r"requires_grad",
    ),
    Kind(
        "networks made or copied in the loss",
        "torch.func.functional_call(net, parameters, x) with the parameters as tensors",
        code=r"deepcopy|nn\.Parameter\(|load_state_dict|type\(",
    ),
    Kind(
        "an optimizer in the loss",
        "write the inner step: parameters minus rate times torch.autograd.grad",
        code=r"\.step\(|zero_grad\(|optim\.",
    ),
    Kind(
        "a hook",
        "compute in the loss what the hook computes",
        code=r"register_\w*hook",
    ),
    Kind(
        "no_grad and forward mode",
        "detach the result in place of no_grad",
        reason=r"no_grad",
    ),
    Kind(
        "an operator that Dynamo does not trace",
        "compute it before the step, or take another operator",
        reason=r"[Uu]nsupported|skipped|builtin|not traceable|[Ff]ailed to trace",
    ),
)


def kind_of(reason: str, code: str) -> Kind:
    """Return the kind of a refusal; `UNKNOWN` where the table has none."""
    return next((kind for kind in KINDS if kind.is_of(reason, code)), UNKNOWN)
