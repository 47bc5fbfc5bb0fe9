"""A graph as data: JSON over operators of ATen that have no effect but their result.

Loading builds an FX graph of calls to operators on the list, with arguments that fit their schemas.
Nothing in the data is executed, unpickled or looked up by any other name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from passes.graph import placeholders, results
from rewriter.ahead.archive import canonical, parsed
from rewriter.ahead.operators import operator_named
from rewriter.errors import ArtifactError, CaptureError

MAX_NODES = 500_000
MAX_INPUTS = 100_000

_SYMBOLIC: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul,
    "floordiv": operator.floordiv, "mod": operator.mod, "truediv": operator.truediv,
    "neg": operator.neg, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "sym_max": torch.sym_max, "sym_min": torch.sym_min, "sym_float": torch.sym_float,
    "sym_int": torch.sym_int, "sym_not": torch.sym_not,
}  # fmt: skip
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64",
        "int32", "int16", "int8", "uint8", "bool",
    )
}  # fmt: skip
_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for `torch.float32`.

    Raises:
        CaptureError: No artifact holds tensors of this type.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise CaptureError(f"an artifact cannot hold tensors of {dtype}")
    return name


def dtype_named(name: Any) -> torch.dtype:
    """Return `torch.float32` for ``"float32"``.

    Raises:
        ArtifactError: There is no such type.
    """
    if not isinstance(name, str) or name not in _DTYPES:
        raise ArtifactError(f"unknown dtype {name!r}")
    return _DTYPES[name]


def device_named(name: Any) -> torch.device:
    """Return the device of a name.

    Raises:
        ArtifactError: There is no such device.
    """
    try:
        return torch.device(str(name))
    except RuntimeError as error:
        raise ArtifactError(f"unknown device {name!r}") from error


def write_graph(module: GraphModule) -> bytes:
    """Write a closed graph as JSON.

    Raises:
        CaptureError: It holds an operator that is not on the list, or an argument that is no data.
    """
    index: dict[Node, int] = {}
    nodes = []
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "call_function":
            nodes.append(_node_as_data(node, index))
        elif node.op != "placeholder":
            raise CaptureError(f"the portable form cannot hold {node.op} nodes ({node})")
        index[node] = len(index)
    return canonical(
        {
            "inputs": len(placeholders(module.graph)),
            "nodes": nodes,
            "results": [index[node] for node in results(module.graph)],
        }
    )


def _node_as_data(node: Node, index: dict[Node, int]) -> dict[str, Any]:
    name = _target_name(node.target)
    if name is None:
        raise CaptureError(
            f"the portable form has no operator {node.target}; leave portable=True out"
        )
    kwargs = {key: _as_data(value, index) for key, value in node.kwargs.items()}
    return {"op": name, "args": [_as_data(x, index) for x in node.args], "kwargs": kwargs}


def _target_name(target: Any) -> str | None:
    if isinstance(target, OpOverload):
        name = str(target)
        return name if operator_named(name) is target else None
    if target is operator.getitem:
        return "getitem"
    return next((f"size.{name}" for name, f in _SYMBOLIC.items() if f is target), None)


def _as_data(value: Any, index: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"node": index[value]}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [_as_data(value.real, index), _as_data(value.imag, index)]}
    if isinstance(value, (list, tuple)):
        return [_as_data(item, index) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"format": str(value).removeprefix("torch.")}
    if value is torch.strided:
        return {"layout": "strided"}
    raise CaptureError(f"the portable form cannot hold {value!r} as an argument")


def read_graph(data: bytes, what: str) -> GraphModule:
    """Build the graph that some JSON describes. Nothing is run.

    Raises:
        ArtifactError: It describes no graph over the operators of the list.
    """
    record = parsed(data, what)
    if not isinstance(record, dict) or record.keys() != {"inputs", "nodes", "results"}:
        raise ArtifactError(f"{what}: expected inputs, nodes and results")
    n_inputs, nodes, found = record["inputs"], record["nodes"], record["results"]
    if type(n_inputs) is not int or not 0 <= n_inputs <= MAX_INPUTS:
        raise ArtifactError(f"{what}: expected a number of inputs up to {MAX_INPUTS}")
    if not isinstance(nodes, list) or len(nodes) > MAX_NODES or not isinstance(found, list):
        raise ArtifactError(f"{what}: expected lists of at most {MAX_NODES} nodes and results")
    graph = Graph()
    made = [graph.placeholder(f"input_{i}") for i in range(n_inputs)]
    for number, node in enumerate(nodes):
        made.append(_node_from_data(graph, node, made, f"{what}, node {number}"))
    graph.output(tuple(_earlier(i, made, f"{what}, results") for i in found))
    graph.lint()
    return GraphModule(torch.nn.Module(), graph)


def _node_from_data(graph: Graph, data: Any, made: list[Node], where: str) -> Node:
    if not isinstance(data, dict) or data.keys() != {"op", "args", "kwargs"}:
        raise ArtifactError(f"{where}: expected op, args and kwargs")
    name, args, kwargs = data["op"], data["args"], data["kwargs"]
    if not (isinstance(name, str) and isinstance(args, list) and isinstance(kwargs, dict)):
        raise ArtifactError(f"{where}: expected a name, a list and an object")
    plain = tuple(_from_data(x, made, where, 0) for x in args)
    named = {key: _from_data(x, made, where, 0) for key, x in kwargs.items()}
    if name == "getitem":
        is_item = len(plain) == 2 and isinstance(plain[0], Node) and type(plain[1]) is int
        if not is_item or named or plain[1] < 0:
            raise ArtifactError(f"{where}: getitem takes a node and an index")
        return graph.call_function(operator.getitem, plain)
    if name.startswith("size."):
        function = _SYMBOLIC.get(name.removeprefix("size."))
        numbers = all(isinstance(x, (Node, int, float)) for x in plain)
        if function is None or named or not numbers or not 1 <= len(plain) <= 2:
            raise ArtifactError(f"{where}: {name} is not an operation on sizes")
        return graph.call_function(function, plain)
    target = operator_named(name)
    if target is None:
        raise ArtifactError(f"{where}: the operator {name!r} is not on the list")
    _check_schema(target, plain, named, where)
    return graph.call_function(target, plain, named)


def _from_data(data: Any, made: list[Node], where: str, depth: int) -> Any:
    if data is None or isinstance(data, (bool, float, str)):
        return data
    if isinstance(data, int):
        if abs(data) >= 2**63:
            raise ArtifactError(f"{where}: {data} is no 64-bit integer")
        return data
    if isinstance(data, list) and depth < 2:
        return [_from_data(item, made, where, depth + 1) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ArtifactError(f"{where}: {str(data)[:100]} is no argument")
    ((kind, value),) = data.items()
    if kind == "node":
        return _earlier(value, made, where)
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "complex" and isinstance(value, list) and len(value) == 2:
        real, imaginary = (_from_data(x, made, where, 2) for x in value)
        if isinstance(real, (int, float)) and isinstance(imaginary, (int, float)):
            return complex(real, imaginary)
    if kind == "dtype":
        return dtype_named(value)
    if kind == "device":
        return device_named(value)
    if kind == "format" and isinstance(value, str) and value in _FORMATS:
        return _FORMATS[value]
    if kind == "layout" and value == "strided":
        return torch.strided
    raise ArtifactError(f"{where}: {str(data)[:100]} is no argument")


def _earlier(position: Any, made: list[Node], where: str) -> Node:
    if type(position) is not int or not 0 <= position < len(made):
        raise ArtifactError(f"{where}: {str(position)[:100]} is no earlier node")
    return made[position]


def _check_schema(target: OpOverload, args: tuple[Any, ...], kwargs: Any, where: str) -> None:
    """Check names and kinds of arguments; what nodes are is only known once values flow."""
    schema = target._schema
    by_position = [a for a in schema.arguments if not a.kwarg_only]
    by_name = {a.name: a for a in schema.arguments}
    if len(args) > len(by_position):
        raise ArtifactError(f"{where}: {target} takes {len(by_position)} arguments")
    given = {a.name: value for a, value in zip(by_position, args, strict=False)}
    for name, value in kwargs.items():
        if name not in by_name or name in given:
            raise ArtifactError(f"{where}: {target} takes no argument {name!r} here")
        given[name] = value
    for argument in schema.arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise ArtifactError(f"{where}: {target} needs {argument.name!r}")
        elif not _fits(given[argument.name], str(argument.real_type)):
            raise ArtifactError(
                f"{where}: {target} takes {argument.real_type} as {argument.name!r}, got "
                f"{str(given[argument.name])[:100]}"
            )


def _fits(value: Any, kind: str) -> bool:
    """Whether a value may be given where a schema says ``kind``; a node may be anything yet."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1])
    if isinstance(value, Node):
        return True
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if not isinstance(value, list):
            return inner in ("int", "SymInt", "float") and _fits(value, inner)
        return all(_fits(item, inner) for item in value)
    if kind in ("int", "SymInt"):
        return type(value) is int
    if kind in ("float", "SymFloat"):
        return type(value) in (int, float)
    if kind in ("number", "Scalar", "Union[float, int]", "Union[complex, float, int]"):
        return isinstance(value, (bool, int, float, complex))
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind in ("ScalarType", "Layout", "MemoryFormat", "Device"):
        wanted = {
            "ScalarType": torch.dtype,
            "Layout": torch.layout,
            "MemoryFormat": torch.memory_format,
            "Device": torch.device,
        }[kind]
        return isinstance(value, wanted)
    # A tensor can only be a node, or a number that stands for one; nothing else is data.
    return kind == "Tensor" and type(value) in (bool, int, float, complex)


def tensor_bytes(x: Tensor) -> bytes:
    """Return a tensor's elements in index order, as raw bytes."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def tensor_from(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor whose elements some bytes are.

    Raises:
        ArtifactError: There are more or fewer bytes than elements.
    """
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ArtifactError(f"a constant of shape {shape} has {len(data)} bytes")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)
