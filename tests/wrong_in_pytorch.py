"""What PyTorch gets wrong: write docs/wrong_in_pytorch.md, each case with its numbers.

`make wrong` runs `python -m tests.wrong_in_pytorch`. A case's code is a function of
`tests.wrong_cases`, which the page shows as it stands; its number is measured three times: by
PyTorch, by the rewritten loss (op by op), and by finite differences of what needs one derivative
less, or of the plain function. ``--quick`` leaves what the page has of cases that need Inductor.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import wrong_cases
from tests.wrong_measures import (
    Numbers,
    compiled,
    dual,
    gradient,
    measured,
    parallel,
    relative_error,
    second,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "wrong_in_pytorch.md"


@dataclass(frozen=True)
class Case:
    """A loss whose number PyTorch gets wrong, or refuses to compute.

    Attributes:
        anchor: Its heading's anchor on the page; it never changes.
        title: Its heading.
        text: What goes wrong, for whom, and why.
        code: The function in `tests.wrong_cases`.
        measure: Measures its numbers.
        number: What is compared.
        issues: Public issues of pytorch/pytorch.
        is_slow: Whether it needs Inductor.
    """

    anchor: str
    title: str
    text: str
    code: Callable[[], Any]
    measure: Callable[[Callable[[], Any]], Numbers]
    number: str
    issues: tuple[int, ...] = ()
    is_slow: bool = False


# The cases

_DERIVATIVE = "derivative of the loss along a direction of the first weight"
_SECOND = "second derivative at t = 0.5"
_NORM_WHY = (
    "The second derivative's formula takes the saved mean and deviation as constants, so that "
    "whatever differentiates it once more misses how they move."
)
_FACTORS_WHY = (
    "The forward-mode rule solves with the factors that the primal has left behind, and they carry "
    "no derivative: whoever differentiates the rule takes them for constants."
)

SECTIONS: dict[str, tuple[Case, ...]] = {
    "Third derivatives of norm layers": (
        Case(
            "layer-norm-score-matching",
            "LayerNorm: score matching",
            "An energy's score and its divergence are two derivatives, training is the third. "
            + _NORM_WHY,
            wrong_cases.score_matching,
            gradient,
            _DERIVATIVE,
            (175754, 176234),
        ),
        Case(
            "layer-norm-pinn",
            "LayerNorm: the residual of an equation",
            "Any second derivative in the residual of a physics-informed network, trained.",
            wrong_cases.equation,
            gradient,
            _DERIVATIVE,
            (175754,),
        ),
        Case(
            "layer-norm-meta-learning",
            "LayerNorm: meta-learning of a force field",
            "An inner step on a loss that holds a force, differentiated by the outer loss (MAML).",
            wrong_cases.meta_learning,
            gradient,
            _DERIVATIVE,
            (175754,),
        ),
        Case(
            "batch-norm-hessian-trace",
            "BatchNorm: a Hessian trace as a regulariser",
            "A curvature estimate `vᵀHv` (Hutchinson) of a residual network in train mode.",
            wrong_cases.hessian_trace,
            gradient,
            "derivative of the loss along a direction of the first bias",
            (186256,),
        ),
        Case(
            "instance-norm-curvature",
            "InstanceNorm: the same",
            "InstanceNorm is BatchNorm underneath. GroupNorm is right in 2.13, and so is RMSNorm.",
            wrong_cases.style,
            gradient,
            _DERIVATIVE,
            (186256,),
        ),
    ),
    "Norm layers in forward mode": (
        Case(
            "layer-norm-jvp",
            "LayerNorm: the gradient of a `jvp`",
            "One `jvp` in the loss and `backward()` around it: flow maps, mean flows, consistency "
            "models, sliced score matching. " + _NORM_WHY,
            wrong_cases.flow_map,
            gradient,
            _DERIVATIVE,
            (196700,),
        ),
        Case(
            "batch-norm-jvp",
            "BatchNorm: the gradient of a `jvp`",
            "The same through BatchNorm.",
            wrong_cases.batch_jvp,
            gradient,
            _DERIVATIVE,
            (196699,),
        ),
        Case(
            "layer-norm-jvp-of-jvp",
            "LayerNorm: a `jvp` of a `jvp`",
            "Second derivatives by forward mode over forward mode.",
            wrong_cases.layer_norm_forward,
            second,
            _SECOND,
            (196700,),
        ),
    ),
    "Weight norm": (
        Case(
            "weight-norm-direction",
            "Second derivatives in the direction",
            "Hessian-vector products, sharpness and unrolled steps in the parameters of a layer "
            "under `weight_norm`: one of the two terms is missing.",
            wrong_cases.hessian_vector,
            gradient,
            "derivative of the loss along a direction of the weight's direction",
        ),
    ),
    "Linear algebra": (
        Case(
            "gaussian-process",
            "The Hessian of a Gaussian process's likelihood",
            "`jacfwd(jacfwd(f))`; `jacrev(jacfwd(f))` gives the same wrong number. "
            "`hessian`, which is `jacfwd(jacrev(f))`, is right. " + _FACTORS_WHY,
            wrong_cases.gaussian_process,
            second,
            _SECOND,
            (192540,),
        ),
        Case(
            "solve",
            "`linalg.solve`: a `jvp` of a `jvp`",
            "As above.",
            wrong_cases.solve,
            second,
            _SECOND,
            (192540, 196695),
        ),
        Case(
            "slogdet",
            "`linalg.slogdet` and `logdet`: a `jvp` of a `jvp`",
            "As above.",
            wrong_cases.slogdet,
            second,
            _SECOND,
            (192540, 196697),
        ),
        Case(
            "det",
            "`linalg.det`: a `jvp` of a `jvp`",
            "As above.",
            wrong_cases.determinant,
            second,
            _SECOND,
            (192540, 196696),
        ),
        Case(
            "solve-gradient-of-jvp",
            "`linalg.solve`: the gradient of a `jvp`",
            "As above; so is the gradient of a Hessian-vector product, or of `hessian`.",
            wrong_cases.tangent_gradient,
            second,
            _SECOND,
            (192540,),
        ),
        Case(
            "det-equal-singular-values",
            "`linalg.det` where singular values are equal",
            "At the identity, under `torch.func`: `nan`. `autograd.grad` twice is right.",
            wrong_cases.equal_singular_values,
            second,
            _SECOND,
            (149694, 192521),
        ),
        Case(
            "eigh",
            "`linalg.eigh`: the gradient of a `jvp`",
            "`nan` where all eigenvalues are distinct: the rule divides by differences, of which "
            "those on the diagonal are zero.",
            wrong_cases.eigenvectors,
            second,
            _SECOND,
        ),
    ),
    "Products": (
        Case(
            "cumprod-zero",
            "`cumprod` with a zero among the factors",
            "A polynomial, differentiated by a formula that divides by the factors.",
            wrong_cases.zero_factor,
            second,
            _SECOND,
            (196701,),
        ),
    ),
    "Refused, although it can be computed": (
        Case(
            "pdist",
            "Distances of all pairs: `pdist`",
            "Forces from pair distances, trained.",
            wrong_cases.pair_distances,
            gradient,
            _DERIVATIVE,
            (188901,),
        ),
        Case(
            "cdist",
            "Distances to centres: `cdist`",
            "A radial basis, with a gradient penalty.",
            wrong_cases.distances,
            gradient,
            _DERIVATIVE,
            (83510,),
        ),
        Case(
            "attention",
            "Fused attention, differentiated twice",
            "Forces or penalties of a transformer: the fused kernel has one derivative.",
            wrong_cases.attention,
            gradient,
            _DERIVATIVE,
            (116350,),
        ),
        Case(
            "batch-norm-transform",
            "BatchNorm in train mode, inside of `torch.func`",
            "It would write its statistics to a buffer from inside of the transform.",
            wrong_cases.batch_norm_transform,
            gradient,
            _DERIVATIVE,
            (85533,),
        ),
    ),
    "`torch.compile`": (
        Case(
            "ddp",
            "A nested loss under `DistributedDataParallel`",
            "`torch.compile` cuts the graph where parameters fill a bucket (1 MB), also between a "
            "forward pass and its inner gradient, which then is zero. With `trace_autograd_ops`; "
            "without it, the loss is refused.",
            wrong_cases.data_parallel,
            parallel,
            "the loss",
        ),
        Case(
            "numpy-random",
            "NumPy's random numbers",
            "They are drawn from PyTorch's generator: other numbers, and NumPy's seed has no say.",
            wrong_cases.random_numbers,
            compiled("eager"),
            "the value",
        ),
        Case(
            "compiled-trace",
            "`hessian` of a function with a trace",
            "A constant is added to entries of the Hessian.",
            wrong_cases.compiled_trace,
            compiled("inductor"),
            "an entry of the Hessian",
            (190855,),
            is_slow=True,
        ),
        Case(
            "dual-level",
            "A compiled function under a dual level",
            "The tangent is dropped.",
            wrong_cases.dual_numbers,
            dual,
            "the tangent",
            (187284,),
            is_slow=True,
        ),
    ),
}
CASES = tuple(case for cases in SECTIONS.values() for case in cases)

# The page

_HEAD = """\
# What PyTorch gets wrong

Losses with nested derivatives whose numbers PyTorch gets wrong without a word, or refuses to
compute although they exist. Each has its code, PyTorch's number, that of the rewritten loss, and
the judge: a finite difference in float64, of sixth order, of what needs one derivative less, or of
the plain function. `@optimize_nested` computes all of them rightly, because it differentiates the
formulas themselves.

Written by `make wrong` with torch {version}. Public issues are named where there are any;
[pytorch#198017](https://github.com/pytorch/pytorch/issues/198017) collects those of forward mode.
A loss that has such a layer in it need not be wrong: second derivatives of norm layers are right,
and so are losses in which the network is in eval mode. What `check=True` says of the rest is in
[Limits](limits.md).

{summary}

Without `@optimize_nested`: write the norm out by `mean` and `var`, and take second derivatives of
linear algebra by reverse mode over reverse mode (`autograd.grad` twice, `jacrev(jacrev(f))`).

Every block below starts from

<!-- no test: the cases themselves are run -->
```python
{imports}

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
```
"""


def source(case: Case) -> str:
    """What the page shows of a case: its function's body, spaced as at a module's top."""
    lines = inspect.getsource(case.code).splitlines()
    body = textwrap.dedent("\n".join(lines[1:]))
    body = re.sub(r"\n+return [^\n]*\Z", "", body.rstrip())
    body = re.sub(r"\n\n(?=def |class )", "\n\n\n", body)
    return re.sub(r"(\n [^\n]*\n)\n(?=\w)(?!def |class )", r"\1\n\n", body)


def imports() -> str:
    lines = inspect.getsource(wrong_cases).splitlines()
    hidden = ("from __future__", "from typing")
    return "\n".join(
        x for x in lines if x.startswith(("import ", "from ")) and not x.startswith(hidden)
    )


def section(case: Case, numbers: Numbers) -> str:
    """A case on the page; its heading has the case's anchor."""
    found = ", ".join(
        f"[pytorch#{n}](https://github.com/pytorch/pytorch/issues/{n})" for n in case.issues
    )
    issues = f" {found}." if found else ""
    return f"""\
### {case.title} {{: #{case.anchor} }}

{textwrap.fill(case.text + issues, 120, break_long_words=False, break_on_hyphens=False)}

<!-- no test: python -m tests.wrong_in_pytorch runs it -->
```python
{source(case)}
```

| {case.number} | |
|---|---|
| PyTorch | {_shown(numbers.theirs)} |
| `optimize_nested` | {_shown(numbers.ours)} |
| {numbers.judge} | {_shown(numbers.right)} |
"""


def _shown(number: float | str) -> str:
    return number.replace("|", "\\|") if isinstance(number, str) else f"{number:.6g}"


def summary(found: dict[str, Numbers]) -> str:
    rows = ["| case | PyTorch's error |", "|---|---|"]
    for case in CASES:
        numbers = found[case.anchor]
        rows.append(f"| [{case.title}](#{case.anchor}) | {_how_wrong(numbers)} |")
    return "\n".join(rows)


def _how_wrong(numbers: Numbers) -> str:
    if isinstance(numbers.theirs, str):
        return "refused" if "Error" in numbers.theirs else numbers.theirs
    if math.isnan(numbers.theirs):
        return "`nan`"
    sign = ", wrong sign" if numbers.theirs * numbers.right < 0 else ""
    if numbers.right == 0:
        return f"{numbers.theirs:.3g} in place of 0"
    error = 100 * relative_error(numbers.theirs, numbers.right)
    return f"{error:.0f} %{sign}" if error > 10 else f"{error:.1f} %{sign}"


def page(found: dict[str, Numbers]) -> str:
    version = torch.__version__.split("+")[0]
    parts = [_HEAD.format(version=version, summary=summary(found), imports=imports())]
    for title, cases in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [section(case, found[case.anchor]) for case in cases]
    return "\n".join(parts)


def main() -> int:
    """Write the page; return how many cases are not as it says: PyTorch wrong, ours right."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("anchors", nargs="*", help="only measure these, and print")
    given = parser.parse_args()
    cases = [case for case in CASES if not given.anchors or case.anchor in given.anchors]
    found = {}
    for case in cases:
        found[case.anchor] = numbers = measured(case.measure, case.code)
        verdict = "ours wrong" if not numbers.is_ours_right else ""
        verdict += "" if numbers.is_theirs_wrong else " PyTorch is right"
        print(f"{case.anchor}: {numbers} {verdict}", flush=True)
    if not given.anchors:
        PAGE.write_text(page(found), encoding="utf-8")
        print(PAGE)
    return sum(not (x.is_theirs_wrong and x.is_ours_right) for x in found.values())


if __name__ == "__main__":
    sys.exit(main())
