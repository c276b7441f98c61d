"""A lowered module -> something to call: torch's own kernels, torch.compile, or a package."""

import copy
import ctypes
import importlib
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tersor.backends.inductor.options import Options
from tersor.kernels.assembler import use_sound_assembler
from tersor.kernels.codebook_linear import codebook_linear
from tersor.kernels.conv8 import conv8
from tersor.kernels.linear8 import linear8
from tersor.kernels.narrow_attention import narrow_attention
from tersor.kernels.narrow_block import narrow_block
from tersor.kernels.narrow_linear import narrow_linear
from tersor.kernels.narrow_linear8 import narrow_linear8

Call = Callable[..., Sequence[Tensor]]
_TUNED = (
    linear8,
    codebook_linear,
    conv8,
    narrow_block,
    narrow_attention,
    narrow_linear,
    narrow_linear8,
)
_AUTOTUNE = {"max_autotune": True, "triton.cudagraphs": False}


@dataclass(slots=True)
class Compiled:
    """A call, and what is known about how it was made.

    Attributes:
        call: Takes the flat inputs on the device.
        sources: Text of the generated programs that make the calls of kernels.
        traced: Nodes of the compiler's own graph: name and target, in order.
        package: The bytes of an ahead-of-time package; empty without one.
    """

    call: Call
    sources: list[str] = field(default_factory=list)
    traced: list[tuple[str, str]] = field(default_factory=list)
    package: bytes = b""


def compile_module(
    module: fx.GraphModule, example: Sequence[Tensor], options: Options, *, is_open: bool
) -> Compiled:
    """Make the call of a mode, and run it once, which is when torch.compile compiles.

    Args:
        module: Lowered, on its device.
        example: Flat inputs on the device.
        options: The mode.
        is_open: Sizes differ from call to call.
    """
    if options.mode == "eager":
        return Compiled(call=module)
    if any(t.is_cuda for t in example):
        use_sound_assembler()
    with _quiet():
        if not is_open and any(n.target in _TUNED for n in module.graph.nodes):
            _choose_tiles(module, example, exactly=options.mode == "package")
        with _analysed_once():
            if options.mode == "package":
                return _packaged(module, example, is_open=is_open, is_tuned=options.tuned)
            return _just_in_time(module, example, options, is_open=is_open)


def _choose_tiles(module: fx.GraphModule, example: Sequence[Tensor], *, exactly: bool) -> None:
    """Kernels choose how they are launched for these shapes, which no compiler does."""
    if find_spec("triton") is None or not any(t.is_cuda for t in example):
        return
    from tersor.kernels.tiles import choosing

    with choosing(exactly=exactly):
        module(*example)


@contextmanager
def _quiet() -> Iterator[None]:
    from torch._inductor import select_algorithm

    prints = getattr(select_algorithm, "PRINT_AUTOTUNE", None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own compiler
        if prints is not None:  # a table of kernels for every layer
            select_algorithm.PRINT_AUTOTUNE = False
        try:
            yield
        finally:
            if prints is not None:
                select_algorithm.PRINT_AUTOTUNE = prints


# As torch calls it, by version.
_ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")
_KINDS = 8  # integers up to which a constant of a kernel may tell what it reads and writes; larger ones are sizes
_ANALYSED: dict[Hashable, Any] = {}


@contextmanager
def _analysed_once() -> Iterator[None]:
    """Keep what torch finds out about which arguments a kernel of this package reads and writes.

    It translates a kernel anew for every call in a graph, several times each (torch 2.11 to 2.13): seconds a
    build. The answer depends on the switches and kinds among a kernel's constants, and on no size.
    """
    home: Any = importlib.import_module("torch._higher_order_ops.triton_kernel_wrap")
    found = {name: getattr(home, name) for name in _ANALYSES if hasattr(home, name)}

    def remembered(analyse: Callable[..., Any]) -> Callable[..., Any]:
        def analysis(kernel: Any, kwargs: Mapping[str, Any], *more: Any) -> Any:
            function = getattr(kernel, "fn", kernel)  # of a kernel and its tiles
            if not str(getattr(function, "__module__", "")).startswith("tersor."):
                return analyse(kernel, kwargs, *more)
            switches = tuple((n, v if _is_switch(v) else "") for n, v in kwargs.items())
            key = (function.__module__, function.__name__, switches)
            if key not in _ANALYSED:
                _ANALYSED[key] = analyse(kernel, kwargs, *more)
            return copy.deepcopy(_ANALYSED[key])

        return analysis

    for name, analyse in found.items():
        setattr(home, name, remembered(analyse))
    try:
        yield
    finally:
        for name, analyse in found.items():
            setattr(home, name, analyse)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool | None) or (isinstance(value, int) and 0 <= value <= _KINDS)


def _just_in_time(
    module: fx.GraphModule, example: Sequence[Tensor], options: Options, *, is_open: bool
) -> Compiled:
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {"cpp.enable_kernel_profile": True}
    if options.mode == "autotune":
        patches |= _AUTOTUNE
    traced: list[tuple[str, str]] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        traced.extend((n.name, str(n.target)) for n in graph.graph.nodes if n.op == "call_function")
        return compile_fx(graph, list(inputs), config_patches=patches)

    before = {id(m) for m in PyCodeCache.modules}
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=is_open)
    compiled(*example)
    texts = [
        Path(str(m.__file__)).read_text(encoding="utf-8")
        for m in PyCodeCache.modules
        if id(m) not in before and m.__file__ and Path(m.__file__).is_file()
    ]
    return Compiled(call=compiled, sources=texts, traced=traced)


def _packaged(
    module: fx.GraphModule, example: Sequence[Tensor], *, is_open: bool, is_tuned: bool
) -> Compiled:
    """Constants stay outside: the file holds them once, and they are on the device already."""
    shapes = None
    if is_open:
        shapes = tuple(dict.fromkeys(range(1, t.dim()), torch.export.Dim.AUTO) for t in example)
    program = torch.export.export(module, tuple(example), dynamic_shapes=shapes, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt2")
        torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - its documented home
            program,
            package_path=path,
            inductor_configs={
                "aot_inductor.package_constants_in_so": False,
                "always_keep_tensor_constants": True,
                "max_autotune": is_tuned,
            },
        )
        package = Path(path).read_bytes()
    return Compiled(call=open_package(package, constants_of(program)), package=package)


def constants_of(program: Any) -> dict[str, Tensor]:
    """The tensors of an exported program, by the names that its package gives them."""
    return {**program.state_dict, **program.constants}


@cache
def _share_cxx_runtime() -> None:
    """Let libraries that were linked without libstdc++ find it in this process.

    A compiler that links it statically, or not at all, leaves a package's library with names that nothing
    on its own list has, and the first call of one ends the process (torch 2.11, seen with g++ of another
    prefix than the system's).
    """
    with suppress(OSError):  # another runtime: its packages link against that
        ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


def open_package(package: bytes, constants: Mapping[str, Tensor]) -> Call:
    """The call of a package; its native code is loaded into this process, without a compiler.

    ``torch._inductor.aoti_load_package`` is the documented way to the same: it imports torch's compilers,
    which takes seconds, and compares the processors of a package and of this machine, to which end it
    compiles and runs a program for each kind of vectors (torch 2.11 to 2.13: 3 to 40 s in every process), for
    a warning at most. A file's host was compared before (``host.mismatch``).

    Args:
        package: The bytes of a ``.pt2``.
        constants: On the device; they are used where they lie and must stay as they are.
    """
    _share_cxx_runtime()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        path.write_bytes(package)
        # One call at a time needs no locks, which a recording could not hold.
        model: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)  # noqa: SLF001
    wanted = model.get_constant_fqns()
    known = {name: constants[name] for name in wanted if name in constants}
    # Not a full update, used where they lie: they stay this module's.
    try:
        model.load_constants(known, False, False, True)
    except TypeError:  # a torch before that choice, which copies them
        model.load_constants(known, False, False)

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        return tuple(model.boxed_run(list(inputs)))

    call.model = model  # type: ignore[attr-defined]  # lives as long as the call
    call.constants = known  # type: ignore[attr-defined]
    return call
