"""Records as `Report.to_dict()` makes them, of any size, without a loss to rewrite."""

from __future__ import annotations

from typing import Any

CODE = [
    "def penalty(critic, x):",
    '    """Keep the slope of the critic near 1; </script><b>not markup</b>."""',
    "    x = x.detach().requires_grad_()",
    "    y = critic(x)",
    "    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)",
    "    return ((g.norm(dim=1) - 1) ** 2).mean()",
]
PATH, FIRST_LINE = "train.py", 10
BATCH, WIDTH = 32, 64


class _Maker:
    """Append nodes to a graph; each takes names of earlier ones."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.nodes: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}

    def add(
        self, op: str, inputs: list[str], role: str = "primal", module: str = "", **more: Any
    ) -> str:
        short = op.split(".")[-1]
        number = self.counts.get(short, 0)
        self.counts[short] = number + 1
        name = short if number == 0 else f"{short}_{number}"
        line = more.pop("line", FIRST_LINE + 3)
        flops = 2 * BATCH * WIDTH * WIDTH if short in ("mm", "addmm") else 0
        node = {
            "id": name,
            "op": op,
            "kind": "call",
            "role": role,
            "module": module,
            "tensor": f"f32[{BATCH}, {WIDTH}]",
            "flops": flops,
            "flops_formula": f"{2 * WIDTH * WIDTH}*b" if flops else "0",
            "bytes": 4 * BATCH * WIDTH,
            "where": f"{PATH}:{line}: {CODE[line - FIRST_LINE].strip()}",
            "path": PATH,
            "line": line,
            "site": None,
            "stage": self.stage,
            "inputs": inputs,
        }
        self.nodes.append({**node, **more})
        return name


def _inputs(maker: _Maker, layers: int) -> tuple[list[str], str]:
    weights = [
        maker.add("placeholder", [], module=f"critic.{2 * i}", kind="input", line=FIRST_LINE)
        for i in range(layers)
    ]
    return weights, maker.add("placeholder", [], kind="input", line=FIRST_LINE)


def _before(layers: int) -> list[dict[str, Any]]:
    """The loss: a forward pass and one gradient node."""
    maker = _Maker("flatten")
    weights, x = _inputs(maker, layers)
    h, body = x, []
    for i, weight in enumerate(weights):
        h = maker.add("aten.addmm", [h, weight], module=f"critic.{2 * i}")
        h = maker.add("aten.tanh", [h], module=f"critic.{2 * i + 1}")
        body += maker.nodes[-2:]
    g = maker.add(
        "gradient", [h, x, *weights], kind="site", site="gradient", line=FIRST_LINE + 4, body=body
    )
    n = maker.add("aten.norm", [g], line=FIRST_LINE + 5)
    s = maker.add("aten.sub", [n], line=FIRST_LINE + 5)
    p = maker.add("aten.pow", [s], line=FIRST_LINE + 5)
    m = maker.add("aten.mean", [p], line=FIRST_LINE + 5)
    maker.add("output", [m], kind="output", line=FIRST_LINE + 5)
    return maker.nodes


def _after(layers: int) -> list[dict[str, Any]]:
    """The step: primal, cotangent, tangent and gradient passes, about 15 nodes a layer."""
    maker = _Maker("joint")
    weights, x = _inputs(maker, layers)
    site = {"site": "gradient", "line": FIRST_LINE + 4}
    modules = [(f"critic.{2 * i}", f"critic.{2 * i + 1}") for i in range(layers)]
    h, values, slopes = x, [], []
    for (linear, act), weight in zip(modules, weights, strict=True):
        values.append(h)
        t = maker.add("aten.permute", [weight], module=linear)
        h = maker.add("aten.addmm", [h, t], module=linear)
        h = maker.add("aten.tanh", [h], module=act)
        square = maker.add("aten.mul", [h, h], "cotangent", act, **site)
        slopes.append(maker.add("aten.sub", [square], "cotangent", act, **site))
    c = maker.add("aten.full", [], "cotangent", **site)
    cotangents = []
    for (linear, act), weight, slope in reversed(list(zip(modules, weights, slopes, strict=True))):
        c = maker.add("aten.mul", [c, slope], "cotangent", act, **site)
        cotangents.insert(0, c)
        c = maker.add("aten.mm", [c, weight], "cotangent", linear, **site)
    n = maker.add("aten.norm", [c], line=FIRST_LINE + 5)
    s = maker.add("aten.sub", [n], line=FIRST_LINE + 5)
    p = maker.add("aten.pow", [s], line=FIRST_LINE + 5)
    m = maker.add("aten.mean", [p], line=FIRST_LINE + 5)
    v = maker.add("aten.div", [s, n], "cotangent", line=FIRST_LINE + 5)
    v = maker.add("aten.mul", [v, c], "cotangent", line=FIRST_LINE + 5)
    tangents = []
    for (linear, act), weight, slope in zip(modules, weights, slopes, strict=True):
        tangents.append(v)
        v = maker.add("aten.mm", [v, weight], "tangent", linear, **site)
        v = maker.add("aten.mul", [v, slope], "tangent", act, **site)
    gradients, back = [], v
    for i in reversed(range(layers)):
        linear, act = modules[i]
        back = maker.add("aten.mul", [back, slopes[i]], "gradient", act, **site)
        t = maker.add("aten.permute", [back], "gradient", linear, **site)
        one = maker.add("aten.mm", [t, values[i]], "gradient", linear, **site)
        two = maker.add("aten.mm", [cotangents[i], tangents[i]], "gradient", linear, **site)
        gradients.append(maker.add("aten.add", [one, two], "gradient", linear, **site))
        back = maker.add("aten.mm", [back, weights[i]], "gradient", linear, **site)
    maker.add("output", [m, *gradients], kind="output", line=FIRST_LINE + 5)
    return maker.nodes


def make_record(layers: int = 3) -> dict[str, Any]:
    """Return the record of a gradient penalty of a network with that many hidden layers."""
    before, after = _before(layers), _after(layers)
    shared = [node for node in before if node["id"] != "permute"]
    forward = 2 * BATCH * WIDTH * WIDTH * layers
    flops = sum(node["flops"] for node in after)
    refusal = "no tangent rule for <aten.foo>"
    return {
        "format": 1,
        "function": "penalty",
        "versions": {"torch": "2.13.0", "python": "3.11.2", "optimize_nested": "0.1.0"},
        "captured": True,
        "reason": "",
        "layers": [],
        "way": "dynamo",
        "refused_before": "",
        "inputs": [
            *({"name": f"critic.{2 * i}.weight", "tensor": "f32[64, 64]"} for i in range(layers)),
            {"name": "x", "tensor": f"f32[{BATCH}, {WIDTH}]"},
        ],
        "sources": [{"path": PATH, "first_line": FIRST_LINE, "lines": CODE}],
        "sites": [
            {
                "name": "gradient",
                "path": PATH,
                "line": FIRST_LINE + 4,
                "code": CODE[4].strip(),
                "operator": "gradient",
                "order": 1,
                "status": "rewritten",
                "strategy": "jvp_over_gradient",
                "reason": "fewest FLOPs",
                "flops": flops - forward,
                "flops_formula": f"{(flops - forward) // BATCH}*b",
                "candidates": [
                    {"strategy": "jvp_over_gradient", "accepted": True, "reason": ""},
                    {"strategy": "collapsed_taylor", "accepted": False, "reason": refusal},
                ],
            }
        ],
        "untried": 0,
        "not_traced": [],
        "candidates": [
            {
                "name": "jvp_over_gradient",
                "strategies": {"gradient": "jvp_over_gradient"},
                "flops": flops,
                "flops_formula": f"{flops // BATCH}*b",
                "bytes_moved": 4_000_000,
                "bytes_moved_formula": "4000000",
                "bytes_kept": 1_200_000,
                "bytes_kept_formula": "1200000",
                "kernels": 11,
                "seconds": 0.0012,
                "nodes": len(after),
                "taken": True,
            },
            {
                "name": "reverse",
                "strategies": {"gradient": "reverse"},
                "flops": 9 * forward,
                "flops_formula": f"{9 * forward // BATCH}*b",
                "bytes_moved": 5_000_000,
                "bytes_moved_formula": "5000000",
                "bytes_kept": 1_300_000,
                "bytes_kept_formula": "1300000",
                "kernels": 12,
                "seconds": None,
                "nodes": len(after) + 10,
                "taken": False,
            },
        ],
        "stages": [
            _stage("flatten", 0, "rewriter.flatten", before),
            _stage("share", 3, "passes.share", shared),
            _stage("joint", 57, "passes.joint", after),
        ],
        "totals": {
            "flops": flops,
            "flops_as_written": 9 * forward,
            "flops_formula": f"{flops // BATCH}*b",
            "bytes_moved": 4_000_000,
            "bytes_kept": 1_200_000,
            "bytes_kept_as_written": 1_500_000,
            "kernels": 11,
            "matmuls": sum(node["flops"] > 0 for node in after),
            "matmuls_as_written": 9 * layers,
            "nodes": len(after),
        },
        "breaks": [],
        "verified": "the same as the loss as written, at the first call",
        "recompiles": ["batch 32 → any batch from 2 on"],
    }


def _stage(name: str, changes: int, maker: str, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "seconds": 0.1, "changes": changes, "maker": maker, "nodes": nodes}
