"""Milliseconds by the graph's nodes: of kernels on a GPU, of calls on a CPU.

A kernel's time goes to the last of the nodes that it computes: the one whose result it is. What comes
from no node goes by its kind.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._autograd import DeviceType

_SOURCES = re.compile(r"# Topologically Sorted Source Nodes: \[([^\]]*)\]")
_KERNEL = re.compile(r"\b((?:triton|cpp|linear8|conv8|codebook|narrow)\w*)(?:\.run)?\(")
_EXTERN = re.compile(r"\bextern_kernels\.(\w+)\(")
_OP = re.compile(r"\btorch\.ops\.(\w+)\.(\w+)\.\w+\(")
_MARK = "tersor:"
_OTHER = "other kernels"
_MICROSECOND = 1e-3
# What functions of ours become in the compiler's graph: one such op each.
_OWN = {
    "quantize_codes": "round",
    "floats_of": "round",
    "linear8": "linear8",
    "conv8": "conv8",
    "codebook_linear": "codebook_linear",
    "narrow_block": "narrow_block",
    "narrow_attention": "narrow_attention",
    "narrow_linear": "narrow_linear",
    "narrow_linear8": "narrow_linear",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a kernel in a generated program: its name for a profiler, and its last node."""

    name: str
    source: str


def launches(program: str) -> list[Launch]:
    """The kernels that a generated program calls, in order."""
    start = program.find("def call(")
    source = ""
    found: list[Launch] = []
    for line in program[max(0, start) :].splitlines():
        comment = _SOURCES.search(line)
        if comment:
            source = comment.group(1).split(",")[-1].strip()
            continue
        if line.strip().startswith(("#", "def ")):
            continue
        before = len(found)
        extern, op, kernel = _EXTERN.search(line), _OP.search(line), _KERNEL.search(line)
        if extern:
            found.append(Launch(f"aten::{extern.group(1)}", source))
        elif kernel:
            found.append(Launch(kernel.group(1), source or kernel.group(1)))
        elif op:
            found.append(Launch(f"{op.group(1)}::{op.group(2)}", source))
        if len(found) > before:  # a comment is of the next call alone
            source = ""
    return found


def traced_names(module: fx.GraphModule, traced: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Nodes of the compiler's graph -> the module's; it keeps the ops and their order."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    old = [_OWN.get(getattr(n.target, "__name__", ""), str(n.target)) for n in nodes]
    new = [_kind(target) for _, target in traced]
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return {traced[b.b + i][0]: nodes[b.a + i].name for b in blocks for i in range(b.size)}


def _kind(target: str) -> str:
    if target.startswith("tersor.linear8") or "_int_mm" in target or "_scaled_mm" in target:
        return "linear8"
    if target.startswith("tersor.conv8") or "method conv2d" in target:
        return "conv8"
    for name in ("codebook_linear", "narrow_block", "narrow_attention", "narrow_linear"):
        if target.startswith(f"tersor.{name}"):
            return name
    return "round" if re.search(r"\bround\b", target) and not target.startswith("aten") else target


class _Timed(fx.Interpreter):
    """Reads the clock around every call, or marks it for a profiler."""

    def __init__(self, module: fx.GraphModule, *, is_marked: bool) -> None:
        super().__init__(module)
        self.is_marked = is_marked
        self.milliseconds: dict[str, list[float]] = defaultdict(list)

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        if n.op != "call_function":
            return super().run_node(n)
        if self.is_marked:
            with torch.profiler.record_function(f"{_MARK}{n.name}"):
                return super().run_node(n)
        start = time.perf_counter_ns()
        value: Tensor | Any = super().run_node(n)
        self.milliseconds[n.name].append((time.perf_counter_ns() - start) / 1e6)
        return value


def eager_ms(
    module: fx.GraphModule, inputs: Sequence[Tensor], runs: int, warm: int
) -> dict[str, float]:
    """Median milliseconds of every call on a CPU."""
    timed = _Timed(module, is_marked=False)
    with torch.no_grad():
        for i in range(warm + runs):
            if i == warm:
                timed.milliseconds.clear()
            timed.run(*inputs)
    return {name: sorted(values)[len(values) // 2] for name, values in timed.milliseconds.items()}


def marked_kernels_ms(
    module: fx.GraphModule, inputs: Sequence[Tensor], runs: int
) -> dict[str, float]:
    """Kernel milliseconds of every call of an eager module on a GPU."""
    timed = _Timed(module, is_marked=True)

    def run() -> None:
        for _ in range(runs):
            timed.run(*inputs)

    events, kernels = profiled(run)
    found: dict[str, float] = {}
    for event in events:
        if event.name.startswith(_MARK):
            name = event.name.removeprefix(_MARK)
            found[name] = found.get(name, 0.0) + _device_us(event) * _MICROSECOND / runs
    return with_rest(found, sum(kernels.values()) * _MICROSECOND / runs)


def launched_ms(
    call: Callable[[], object], order: Sequence[Launch], runs: int, *, on_gpu: bool
) -> dict[str, float]:
    """Milliseconds a call by source node, of a compiled call whose launches are known."""

    def run() -> None:
        for _ in range(runs):
            call()

    events, kernels = profiled(run)
    found = attributed(
        order, [(e.name, _device_us(e) if on_gpu else float(e.cpu_time_total)) for e in events]
    )
    found = {name: us * _MICROSECOND / runs for name, us in found.items()}
    return with_rest(found, sum(kernels.values()) * _MICROSECOND / runs)


def attributed(order: Sequence[Launch], events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Microseconds by source: launches of one name and its events come in the same order.

    Args:
        order: The launches of one call.
        events: Name and microseconds of every event, of one call or several, in order.
    """
    sources: dict[str, list[str]] = defaultdict(list)
    for launch in order:
        sources[launch.name].append(launch.source)
    seen: dict[str, int] = defaultdict(int)
    found: dict[str, float] = {}
    for name, us in events:
        own = name if name in sources else next((n for n in sources if n in name), "")
        if not own or (own != name and not own.startswith("cpp")):
            continue
        source = sources[own][seen[own] % len(sources[own])]
        seen[own] += 1
        found[source] = found.get(source, 0.0) + us
    return found


def with_rest(found: Mapping[str, float], total_ms: float) -> dict[str, float]:
    """Kernels that no node is known of, as one entry."""
    rest = total_ms - sum(found.values())
    return {**found, _OTHER: rest} if rest > 0.01 * total_ms else dict(found)


def profiled(run: Callable[[], None]) -> tuple[list[Any], dict[str, float]]:
    """Events of the processor in order, and microseconds of the device by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.no_grad(), torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    events: list[Any] = []
    kernels: dict[str, float] = defaultdict(float)
    for event in profile.events() or ():
        if event.device_type == DeviceType.CPU:
            events.append(event)
        elif not event.name.startswith((_MARK, "aten::", "Memcpy HtoD")) and not getattr(
            event, "is_user_annotation", False
        ):
            kernels[event.name] += float(event.time_range.elapsed_us())
    events.sort(key=lambda e: e.time_range.start)
    return events, dict(kernels)


def _device_us(event: Any) -> float:
    return float(getattr(event, "device_time_total", 0.0))
