"""Hand a joint graph to Inductor: the one file that knows Inductor's private names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx import GraphModule

from passes.graph import is_random, placeholders, value_of
from passes.tracing import fake_mode_of
from rewriter.errors import NestedGradientWarning

Compiled = Callable[..., Sequence[Any]]


def compile_graph(module: GraphModule, backend: str, mode: str) -> Compiled:
    """Return a function that computes what a functional ATen graph computes.

    Args:
        module: The graph; its placeholders hold fake tensors.
        backend: ``"eager"`` runs the graph op by op, ``"inductor"`` compiles it.
        mode: A mode of Inductor.
    """
    if backend == "eager":
        return module.forward
    if not _has_compiler(module):
        warnings.warn(
            "optimize_nested: no C++ compiler was found, so the rewritten loss runs op by op. "
            "Install one (Debian, Ubuntu: apt-get install g++; conda: gxx; macOS: xcode-select "
            "--install) or set the environment variable CXX.",
            NestedGradientWarning,
            stacklevel=2,
        )
        return module.forward
    examples = [value_of(node) for node in placeholders(module.graph)]
    examples = [x.detach() if isinstance(x, Tensor) else x for x in examples]
    # The generator must end where eager leaves it, so draws are eager's own.
    draws = any(is_random(node) for node in module.graph.nodes)
    settings = {**list_mode_options(mode), "fallback_random": draws}
    context = TracingContext(fake_mode_of(examples))
    with tracing(context), torch.no_grad():
        return compile_fx(module, examples, config_patches=settings)  # pyright: ignore[reportReturnType]


def _has_compiler(module: GraphModule) -> bool:
    """Whether Inductor can build code for the graph's device."""
    devices = {
        value_of(n).device.type for n in module.graph.nodes if isinstance(value_of(n), Tensor)
    }
    if devices != {"cpu"} or inductor_config.cpu_backend != "cpp":
        return True
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
