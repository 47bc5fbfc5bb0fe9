"""Hand a joint graph to Inductor: the one file that knows Inductor's private names."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import graph_compile
from torch._guards import TracingContext, tracing
from torch._inductor import aoti_compile_and_package, list_mode_options
from torch._inductor import config as inductor_config
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.autograd import profiler
from torch.export import Dim, export
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from passes.bytes import size_in_bytes
from passes.graph import copy_graph, hint, is_random, placeholders, value_of
from passes.price import evaluated, size_hints
from passes.tracing import fake_mode_of
from passes.versions import IS_BEFORE_2_13
from rewriter.capture import guards_unmoved, replaced
from rewriter.errors import NestedGradientWarning, OptimizeNestedError
from rewriter.parcel import CannotPack, pack, unpack

Compiled = Callable[..., Sequence[Any]]
_ALIGNMENT = 16  # bytes
_SHARED_PART = 64  # loops that share less than such a part of the largest value are not merged


def compile_graph(
    module: GraphModule, backend: str, mode: str, *, strict: bool, static: Sequence[int] = ()
) -> Compiled:
    """Return a function that computes what a functional ATen graph computes.

    Args:
        module: The graph; its placeholders hold fake tensors.
        backend: ``"eager"`` runs the graph op by op, ``"inductor"`` compiles it.
        mode: A mode of Inductor.
        strict: Let Inductor's own errors pass, instead of running the graph op by op.
        static: Positions of inputs that are mostly the same memory at each call, parameters: where
            CUDA graphs are replayed, the others are copied to where the graph reads them.
    """
    if backend == "eager":
        return _op_by_op(module)
    if not has_compiler(_values(module)):
        warnings.warn(
            "optimize_nested: no C++ compiler was found, so the rewritten loss runs op by op. "
            "Install one (Debian, Ubuntu: apt-get install g++; conda: gxx; macOS: xcode-select "
            "--install) or set the environment variable CXX.",
            NestedGradientWarning,
            stacklevel=2,
        )
        return _op_by_op(module)
    if IS_BEFORE_2_13 and any(map(is_random, module.graph.nodes)):
        warnings.warn(
            f"optimize_nested: Inductor of PyTorch {torch.__version__} draws in another order than "
            "eager, so the rewritten loss runs op by op, with eager's numbers. PyTorch 2.13 "
            "compiles it.",
            NestedGradientWarning,
            stacklevel=2,
        )
        return _op_by_op(module)
    module, sizes = _with_sizes(_with_own_draws(module))
    examples = [value_of(node) for node in placeholders(module.graph)]
    examples = [x.detach() if isinstance(x, Tensor) else x for x in examples]
    settings = _settings(module, mode)
    is_replayed = settings.get("triton.cudagraphs", False) and _is_on_cuda(examples)
    static = static if is_replayed else ()
    if is_for_cpp(_values(module)):
        get_toolchain_ready().join()
    inner = functools.partial(_compile_with_static, tuple(static)) if static else compile_fx_inner
    with (
        tracing(TracingContext(fake_mode_of(examples))),
        torch.no_grad(),
        torch._C._DisableAutocast(),  # casts are in the graph already
        _floats_left_alone(),
        guards_unmoved(),
    ):
        try:
            compiled: Any = compile_fx(module, examples, inner, config_patches=settings)
            compiled = _replayed(compiled, static) if is_replayed else Unwrapped.of(compiled)
            if not sizes:
                return compiled
            return lambda *inputs: compiled(*inputs, *(inputs[i].shape[d] for i, d in sizes))
        except Exception as error:
            if strict:
                raise
            warnings.warn(
                f"optimize_nested: Inductor fails on the rewritten loss, so it runs op by op: "
                f"{(str(error).strip() or type(error).__name__).splitlines()[0]}",
                NestedGradientWarning,
                stacklevel=2,
            )
            return _op_by_op(module)


@functools.cache
def get_toolchain_ready() -> threading.Thread:
    """Begin what Inductor does once per process before its first C++ kernel: it tries out which
    vector instructions it can use, and compiles the header that all kernels include.

    Compilers and other processes do that, for seconds; meanwhile a loss is captured and rewritten.
    What fails here fails again, and is reported, where a graph is compiled.
    """

    def work() -> None:
        kernel = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel() {}'
        failures = (CppCompileError, InvalidCxxCompiler, OSError, subprocess.SubprocessError)
        with contextlib.suppress(*failures):
            pick_vec_isa()
            CppPythonBindingsCodeCache.load_pybinding_async([], kernel, submit_fn=lambda job: job)

    thread = threading.Thread(target=work, name="toolchain", daemon=True)
    thread.start()
    return thread


def _is_on_cuda(examples: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.is_cuda for x in examples)


def _compile_with_static(static: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """Compile a graph some of whose inputs CUDA graphs may read where they are; those that have
    moved since are noticed, and the graph is recorded again."""
    return compile_fx_inner(*args, **{**kwargs, "static_input_idxs": list(static)})


def _replayed(compiled: Compiled, static: Sequence[int]) -> Compiled:
    """Guard what CUDA graphs leave to their caller.

    Results are copied: the next replay, which may come before ``backward()`` or while the caller
    still has an older loss, writes to the same memory. A static input that is not aligned is copied
    too: Inductor takes for granted that those are.
    """

    def run(*inputs: Any) -> Sequence[Any]:
        moved = [i for i in static if inputs[i].data_ptr() % _ALIGNMENT]
        inputs = tuple(x.clone() if i in moved else x for i, x in enumerate(inputs))
        given = set(map(id, inputs))
        found = list(compiled(*inputs))
        places = [i for i, x in enumerate(found) if isinstance(x, Tensor) and id(x) not in given]
        own = [torch.empty_like(found[i]) for i in places]
        if own:
            torch._foreach_copy_(own, [found[i] for i in places])
        for i, x in zip(places, own, strict=True):
            found[i] = x
        return found

    return run


class Unwrapped:
    """Compiled code, called past the wrapper that AOTAutograd puts around it.

    The wrapper is for inputs and results that share memory, change or require grad. The first call
    goes through it; where it hands over what comes in and what goes out as they are, the calls that
    follow do without it, which for a small network is a tenth of what is around the code.

    Args:
        wrapped: What Inductor returns.
        graph: What the wrapper calls.
    """

    def __init__(self, wrapped: Compiled, graph: CompiledFxGraph) -> None:
        self.wrapped, self._graph = wrapped, graph
        self._run: Callable[[list[Any]], Sequence[Any]] | None = None
        self._is_first = True

    @classmethod
    def of(cls, wrapped: Compiled) -> Compiled:
        """Return what Inductor returns, unwrapped where that can be."""
        graph = inspect.unwrap(wrapped)
        return cls(wrapped, graph) if isinstance(graph, CompiledFxGraph) else wrapped

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        run = self._run
        if run is None or torch.is_grad_enabled() or profiler._is_profiler_enabled:
            return self._first(inputs) if self._is_first else self.wrapped(*inputs)
        return run([*inputs])

    def _first(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Call the wrapper, and see what it does to inputs and results."""
        self._is_first = False
        run: Any = self._graph.current_callable
        taken: list[Any] = []
        given: list[Any] = []

        def watched(values: list[Any]) -> Sequence[Any]:
            taken.extend(values)
            found = run(values)
            given.extend(found)
            return found

        self._graph.current_callable = watched
        try:
            results = self.wrapped(*inputs)
        finally:
            self._graph.current_callable = run
        if _are_same(taken, inputs) and _are_same(given, results):
            self._run = run
        return results


def _are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _settings(module: GraphModule, mode: str) -> dict[str, Any]:
    """Return Inductor's settings for a graph."""
    # The generator must end where eager leaves it, so draws are eager's own.
    draws = any(is_random(node) for node in module.graph.nodes)
    settings = {**list_mode_options(mode), "fallback_random": draws}
    if _devices(_values(module)) == {"cpu"}:
        # oneDNN blocks what it convolves anyway. Channels-last copies, of each weight, gradient and
        # activation in every step, come on top: of a critic's step a third of the time and more
        # than half of the memory.
        settings["layout_optimization"] = False
        # Gradients of biases, all of the sample weights that they share, would become one loop over
        # every layer's activations, which then are alive until the last layer's is there.
        threshold = inductor_config.score_fusion_memory_threshold
        shared = _largest(module) // _SHARED_PART
        settings["score_fusion_memory_threshold"] = max(threshold, shared)
    return settings


def _largest(module: GraphModule) -> int:
    """Return the bytes of the largest value that is computed, at the sizes at hand."""
    hints = size_hints(module)
    computed = (node for node in module.graph.nodes if node.op == "call_function")
    sizes = {size_in_bytes(x) for node in computed for x in tree_leaves(value_of(node))}
    return max((evaluated(size, hints) for size in sizes), default=0)


def _with_sizes(module: GraphModule) -> tuple[GraphModule, list[tuple[int, int]]]:
    """Make inputs, after the others, of the symbolic sizes that only tensors have; return from
    which input and dimension each is read.

    What Inductor takes for granted of a size, when it finds its code on disk, becomes a guard only
    if the size is an input.
    """
    inputs = placeholders(module.graph)
    known = {n.node.expr for n in map(value_of, inputs) if isinstance(n, torch.SymInt)}
    sizes: list[tuple[int, int]] = []
    last = inputs[-1] if inputs else None
    for position, node in enumerate(inputs):
        for dim, size in enumerate(getattr(value_of(node), "shape", ())):
            symbol = size.node.expr if isinstance(size, torch.SymInt) else None
            if symbol is None or not symbol.is_Symbol or symbol in known:
                continue
            known.add(symbol)
            sizes.append((position, dim))
            with module.graph.inserting_after(last):
                last = module.graph.placeholder(f"size_of_{node.name}_{dim}")
            last.meta["val"] = size
    module.recompile()
    return module, sizes


@dataclass(frozen=True)
class Settings:
    """What compiled code depends on beside its graph, so that another process makes the same.

    Attributes:
        mode: A mode of Inductor.
        inductor: Inductor's configuration.
        functorch: That of AOTAutograd.
        threads: How many threads kernels are written for.
        dtype: The default dtype.
        deterministic: Whether deterministic algorithms are on, and whether that only warns.
        precision: Of float32 matrix products.
        reduced: Whether CUDA's products may accumulate in float16 and in bfloat16.
        folder: Where Inductor keeps compiled code.
        finder: The module through which pickle finds a name of PyTorch's: the first one that has
            imported it. By that accident it is a part of Inductor's keys.
    """

    mode: str
    inductor: dict[str, Any]
    functorch: dict[str, Any]
    threads: int
    dtype: torch.dtype
    deterministic: tuple[bool, bool]
    precision: str
    reduced: tuple[Any, Any]
    folder: str
    finder: str

    @classmethod
    def now(cls, mode: str) -> Settings:
        """Return those of this process."""
        matmul = torch.backends.cuda.matmul
        return cls(
            mode=mode,
            inductor=inductor_config.save_config_portable(),
            functorch=functorch_config.save_config_portable(),
            threads=torch.get_num_threads(),
            dtype=torch.get_default_dtype(),
            deterministic=(
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            precision=torch.get_float32_matmul_precision(),
            reduced=(
                matmul.allow_fp16_reduced_precision_reduction,
                matmul.allow_bf16_reduced_precision_reduction,
            ),
            folder=cache_dir(),
            finder=_finder(),
        )

    @classmethod
    def packed(cls, mode: str) -> bytes:
        """Return those of this process, for another one.

        Raises:
            CannotPack: There is something among them that cannot be pickled.
        """
        try:
            return pickle.dumps(cls.now(mode))
        except Exception as error:
            raise CannotPack(
                f"Inductor's settings cannot be pickled: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def applied(cls, data: bytes) -> Settings:
        """Make those of another process, packed, those of this one; return them."""
        settings: Settings = pickle.loads(data)
        settings._apply()
        return settings

    def _apply(self) -> None:
        matmul: Any = torch.backends.cuda.matmul
        with warnings.catch_warnings():
            # Among all settings are those that will be removed.
            warnings.simplefilter("ignore", FutureWarning)
            inductor_config.load_config(self.inductor)
            functorch_config.load_config(self.functorch)
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        on, warn_only = self.deterministic
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
        if torch.get_float32_matmul_precision() != self.precision:  # the default is not to have one
            torch.set_float32_matmul_precision(self.precision)
        (
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        ) = self.reduced
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.folder
        if _finder() != self.finder:
            known = dict(sys.modules)
            stand_in: Any = types.ModuleType(self.finder)
            stand_in.torch = torch
            sys.modules.clear()
            sys.modules[self.finder] = stand_in  # before all others
            sys.modules.update(known)


def _finder() -> str:
    module = pickle.whichmodule(torch.contiguous_format, "torch.contiguous_format")  # pyright: ignore[reportAttributeAccessIssue]
    return str(module)


def packed(module: GraphModule, mode: str) -> bytes:
    """Return a graph and the settings of this process, for `fill_cache` in another one.

    Args:
        module: The graph; its placeholders hold fake tensors.
        mode: A mode of Inductor.

    Raises:
        CannotPack: The graph holds something that cannot go to another process, or Inductor keeps
            no code on disk.
    """
    if not keeps_code():
        raise CannotPack("Inductor's cache on disk is switched off")
    return pickle.dumps((pack(module), Settings.packed(mode)))


def fill_cache(data: bytes) -> bytes:
    """Compile what `packed` returned; the code is left in Inductor's cache on disk, where
    `compile_graph` finds it."""
    graph, settings = pickle.loads(data)
    mode = Settings.applied(settings).mode
    compile_graph(unpack(graph), "inductor", mode, strict=True)
    return b""


def package_graph(module: GraphModule, mode: str) -> bytes:
    """Compile a graph of tensors to native code ahead of time; return AOTInductor's package.

    Args:
        module: The graph; its placeholders hold fake tensors, and its results are tensors.
        mode: A mode of Inductor.

    Raises:
        OptimizeNestedError: There is no C++ compiler, or Inductor fails on the graph.
    """
    if not has_compiler(_values(module)):
        raise OptimizeNestedError(
            "no C++ compiler was found: install one, set the environment variable CXX, or compile "
            "with portable=True"
        )
    settings = _settings(module, mode)
    settings.pop("triton.cudagraphs", None)  # of compiled Python, not of packages
    fakes = [value_of(node) for node in placeholders(module.graph)]
    open_dims = [_open_dims(fake) for fake in fakes]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
        examples = tuple(_example(fake) for fake in fakes)
        dims = (tuple({d: Dim.AUTO for d in dims} or None for dims in open_dims),)
        path = str(Path(folder, "graph.pt2"))
        try:
            program = export(_Root(_with_own_draws(module)), examples, dynamic_shapes=dims)
            aoti_compile_and_package(program, package_path=path, inductor_configs=settings)
            # Export and Inductor fix a size without a word where a kernel of theirs needs it fixed.
            taken = [value_of(node) for node in placeholders(program.graph)]
            if [_open_dims(value) for value in taken] != open_dims:
                raise OptimizeNestedError(
                    "Inductor compiles this loss for one size only of those declared dynamic, as "
                    "it does where a convolution has the batch as channels: leave `dynamic` out, "
                    "or compile with portable=True"
                )
        except OptimizeNestedError:
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise OptimizeNestedError(
                f"Inductor cannot compile this loss ahead of time: {type(error).__name__}: {text}"
            ) from error
        return Path(path).read_bytes()


class _Root(torch.nn.Module):
    """`torch.export` takes modules whose forward has arguments by position."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Any:
        return self.module(*tensors)


def _open_dims(fake: Tensor) -> list[int]:
    sizes = enumerate(fake.shape)
    return [
        d for d, size in sizes if isinstance(size, torch.SymInt) and size.node.expr.free_symbols
    ]


def _example(fake: Tensor) -> Tensor:
    """Return a tensor like a fake one; no size of it is asked for, which would fix it."""

    shape, strides = map(hint, fake.shape), map(hint, fake.stride())
    example = torch.empty_strided(
        tuple(shape), tuple(strides), dtype=fake.dtype, device=fake.device
    )
    return example.zero_()


def load_package(path: str) -> Compiled:
    """Load AOTInductor's package: native code, which from here on can do anything.

    Args:
        path: The package; the caller has checked what it is.
    """
    # The class behind `aoti_load_package`, which before it would unpickle what a package may hold.
    native: Any = torch._C._aoti  # pyright: ignore[reportAttributeAccessIssue]
    loader = native.AOTIModelPackageLoader(path, "model", False, 1, -1)

    def run(*inputs: Tensor) -> Sequence[Any]:
        with torch._C._DisableAutocast():
            return loader.boxed_run(list(inputs))

    return run


def _floats_left_alone() -> contextlib.AbstractContextManager[None]:
    """Keep Inductor from asking Dynamo to begin anew without symbols for Python floats: those that
    change are tensors in our graphs, although the examples' mode still knows the symbols."""
    return replaced(graph_compile, "tensorify_python_scalars", lambda *_: None)


def _op_by_op(module: GraphModule) -> Compiled:
    """Run a graph as it is: autocast around the call is in the graph already."""
    module = _with_resolved_views(module)

    def run(*inputs: Any) -> Sequence[Any]:
        with torch._C._DisableAutocast():
            return module.forward(*inputs)

    return run


def _with_resolved_views(module: GraphModule) -> GraphModule:
    """Return a graph that takes numbers whose conjugation PyTorch has put off."""
    views = module.graph.find_nodes(op="call_function", target=torch.ops.aten.view_as_real.default)
    if not views:
        return module
    module = copy_graph(module)
    for node in module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.view_as_real.default
    ):
        node.target = _view_resolved
    module.recompile()
    return module


def _view_resolved(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


@torch.library.custom_op(
    "optimize_nested::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _bernoulli(p: Tensor) -> Tensor:
    """Draw as `torch.bernoulli` does; Inductor takes that one apart, into other numbers."""
    return torch.bernoulli(p)


@_bernoulli.register_fake
def _bernoulli_fake(p: Tensor) -> Tensor:
    return torch.empty_like(p)


def _with_own_draws(module: GraphModule) -> GraphModule:
    """Return a copy, which Inductor may keep, that draws as eager draws."""
    module = copy_graph(module)
    for node in module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.bernoulli.default
    ):
        node.target = torch.ops.optimize_nested.bernoulli.default
    module.recompile()
    return module


def has_compiler(values: Iterable[Any]) -> bool:
    """Whether Inductor can build code for what computes with ``values``."""
    return not is_for_cpp(values) or cpp_compiler() is not None


def is_for_cpp(values: Iterable[Any]) -> bool:
    """Whether Inductor writes C++ for what computes with ``values``, and nothing else."""
    return _devices(values) == {"cpu"} and inductor_config.cpu_backend == "cpp"


def _values(module: GraphModule) -> Iterable[Any]:
    return map(value_of, module.graph.nodes)


def _devices(values: Iterable[Any]) -> set[str]:
    return {value.device.type for value in values if isinstance(value, Tensor)}


def cpp_compiler() -> str | None:
    """Return the C++ compiler that Inductor calls; None if it finds none."""
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def keeps_code() -> bool:
    """Whether Inductor keeps compiled code on disk, for other processes."""
    return inductor_config.fx_graph_cache and not inductor_config.force_disable_caches


def cache_folder() -> Path:
    """Return where Inductor keeps compiled code."""
    return Path(cache_dir())
