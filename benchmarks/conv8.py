"""8-bit convolutions on one card: ResNet-50's layers beside cuDNN in float16, and the whole network.

    python -m benchmarks.conv8 --out results.jsonl [--work layers,model] [--batches 256,1] [--jobs 12]

Speed only, random weights. Layers: recorded calls on copies that take four times the second-level cache together
(at most 32), those of one line in turn in one run; conv8 ends in the next layer's codes with everything that
follows the layer there (bias, ReLU, the residual addition), cuDNN's convolution adds a bias alone. ``--jobs``:
processes that compile the kernels beforehand. Model: builds in turn in one run, inputs on the device.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.gpu_builds import ByHand, example, graph_of
from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.host import facts
from tersor.core.errors import BackendError
from tersor.core.records import BuildChoice, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import attribute, run_all
from tersor.graph.operators import weighted_ops
from tersor.kernels import conv8_triton
from tersor.kernels.conv8 import conv8, result_size
from tersor.timing.device import SelfTimed
from tersor.timing.protocol import Protocol, measure, noise

LAYER_PROTOCOL = Protocol(rounds=3, runs=5, max_seconds=1.5)
MODEL_PROTOCOL = Protocol(rounds=5, runs=15, max_seconds=6.0)
LOUD = 4 * 50 * 2**20  # four times the second-level cache of an H200, bytes
MOST_COPIES = 32
CODES = 127
BUILDS = "float-float16-compile,int8-float16-compile,hand-float16-compile,float-bfloat16-compile"


class Layer(NamedTuple):
    """A convolution of ResNet-50 and how often it has it."""

    inp: int
    out: int
    kernel: int
    stride: int
    size: int  # pixels a side of its input
    count: int
    residual: bool = False
    relu: bool = True


def layers() -> tuple[Layer, ...]:
    """Of ResNet-50 at 224 x 224, strides in the 3 x 3 convolutions (torchvision's)."""
    found = [Layer(3, 64, 7, 2, 224, 1)]
    before, size = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        after, wide = size // stride, 4 * width
        found += [
            Layer(before, width, 1, 1, size, 1),
            Layer(width, width, 3, stride, size, 1),
            Layer(width, wide, 1, 1, after, 1, relu=False),
            Layer(before, wide, 1, stride, size, 1, residual=True),  # after the one before it
            Layer(wide, width, 1, 1, after, blocks - 1),
            Layer(width, width, 3, 1, after, blocks - 1),
            Layer(width, wide, 1, 1, after, blocks - 1, residual=True),
        ]
        before, size = wide, after
    counts: dict[Layer, int] = {}
    for layer in found:
        key = layer._replace(count=1)
        counts[key] = counts.get(key, 0) + layer.count
    return tuple(key._replace(count=count) for key, count in counts.items())


class Recorded:
    """Calls on copies of their operands, recorded once; milliseconds a call."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._count = len(calls)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()

    def __call__(self) -> object:
        self._graph.replay()
        torch.cuda.synchronize()
        return None

    def timed_ms(self) -> float:
        """One replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self._count


def operands(layer: Layer, batch: int) -> dict[str, Any]:
    """Random ones for both, channels last; the stem's codes are filled up to four channels."""
    inp = max(layer.inp, 4)
    side = result_size(layer.size, layer.kernel, layer.stride, layer.kernel // 2)
    last = torch.channels_last

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")

    def halves(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16, device="cuda").to(memory_format=last)

    images = codes(batch, layer.size, layer.size, inp).permute(0, 3, 1, 2)
    residual = codes(batch, side, side, layer.out).permute(0, 3, 1, 2) if layer.residual else None
    return {
        "codes": images,
        "weight": codes(layer.out, layer.kernel, layer.kernel, inp),
        "scale": torch.full((layer.out,), 1 / (70 * (inp * layer.kernel**2) ** 0.5), device="cuda"),
        # Codes behind a ReLU have their zero at -128, so that borders count; those of images do not.
        "offset": torch.randn(16 if layer.kernel == 3 else 1, layer.out, device="cuda"),
        "residual": residual,
        "image": halves(batch, layer.inp, layer.size, layer.size),
        "kernel": halves(layer.out, layer.inp, layer.kernel, layer.kernel),
        "bias": torch.randn(layer.out, dtype=torch.float16, device="cuda"),
    }


def eight_bit(layer: Layer, given: dict[str, Any]) -> torch.Tensor:
    steps = ([layer.stride] * 2, [layer.kernel // 2] * 2)
    return conv8(
        given["codes"], given["weight"], given["scale"], given["offset"], *steps, torch.int8,
        0.0 if layer.relu else -128.0, 127.0, given["residual"], 0.5, 0.0,
        (-128.0, 127.0, 0.5) if layer.residual else None,
    )  # fmt: skip


def floats(layer: Layer, given: dict[str, Any]) -> torch.Tensor:
    return nn.functional.conv2d(
        given["image"], given["kernel"], given["bias"], layer.stride, layer.kernel // 2
    )


def size_bytes(layer: Layer, batch: int) -> tuple[int, int, int]:
    """Codes in, weight, codes out (the residual's among those in)."""
    side = result_size(layer.size, layer.kernel, layer.stride, layer.kernel // 2)
    out = batch * side**2 * layer.out
    seen = layer.size**2 if layer.kernel > 1 or layer.stride == 1 else side**2
    inp = batch * seen * layer.inp + (out if layer.residual else 0)
    return inp, layer.out * layer.kernel**2 * layer.inp, out


def layer_row(layer: Layer, batch: int) -> dict[str, Any]:
    """One layer at one batch."""
    start = time.perf_counter()
    given = operands(layer, batch)
    eight_bit(layer, given)  # chooses the tile
    chosen = next(reversed(conv8_triton._CHOSEN.values()))  # noqa: SLF001 - what the figure is of
    chosen_s = time.perf_counter() - start
    total = sum(size_bytes(layer, batch))
    copies = max(1, min(MOST_COPIES, -(-LOUD // total)))
    sets = [given, *(operands(layer, batch) for _ in range(copies - 1))]
    calls: dict[str, SelfTimed] = {
        "conv8": Recorded([lambda g=g: eight_bit(layer, g) for g in sets]),  # type: ignore[misc]
        "cudnn float16": Recorded([lambda g=g: floats(layer, g) for g in sets]),  # type: ignore[misc]
    }
    times = measure(calls, LAYER_PROTOCOL)
    side = result_size(layer.size, layer.kernel, layer.stride, layer.kernel // 2)
    operations = 2 * batch * side**2 * layer.out * layer.inp * layer.kernel**2
    us = {n: round(t.median_ms * 1e3, 2) for n, t in times.items()}
    return {
        "work": "layer", "layer": layer._asdict(), "batch": batch, "tile": list(chosen),
        "us": us, "noise": {n: round(noise(t), 4) for n, t in times.items()},
        "speedup": round(us["cudnn float16"] / us["conv8"], 3), "copies": copies,
        "tera": round(operations / us["conv8"] / 1e6), "bytes_s": round(total / us["conv8"] / 1e6, 3),
        "chosen_s": round(chosen_s, 1),
    }  # fmt: skip


def grid_of(values: torch.Tensor) -> Quantizer:
    """256 codes from zero on, or symmetric ones, up to the largest value."""
    largest = float(values.abs().max())
    if float(values.min()) >= 0:
        return Quantizer(step=largest / 255, low=0, high=255)
    return Quantizer(step=largest / CODES, low=-128, high=CODES)


def in_eight_bits(graph: Graph) -> Graph:
    """Convolutions, linears and both operands of residual additions on codes."""
    seen = run_all(graph.module, graph.example)
    grids: dict[str, Quantizer] = {}

    def grid(name: str) -> Quantizer:
        return grids.setdefault(name, grid_of(seen[name]))

    changes = []
    for op in weighted_ops(graph.module):
        weight = attribute(graph.module, str(op.weight.target)).detach()
        scale = weight.abs().flatten(1).amax(1) / CODES
        codes = (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
        site = Site(name=op.node.name, kind="format", ops=(op.node.name,), op_kind=op.kind,  # type: ignore[arg-type]
                    weight=str(op.weight.target), shape=tuple(weight.shape))  # fmt: skip
        changes.append(
            SiteChange(
                site=site, level="int8", codes=codes, scale=scale, quantizer=grid(op.data.name)
            )
        )
    for node in graph.module.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            site = Site(name=f"add:{node.name}", kind="format", ops=(node.name,), op_kind="add")
            operands = {a.name: grid(a.name) for a in node.args}
            changes.append(SiteChange(site=site, level="int8", operands=operands))
    return apply(graph, changes)


def built(kind: str, plain: Graph, batch: int, image: Any) -> SelfTimed:
    """A build by its name: by hand, float or int8; half; mode.

    Raises:
        BackendError: It fails or has no memory.
    """
    name, half, mode = kind.split("-")
    if name == "hand":
        return ByHand("resnet50", batch, getattr(torch, half), compiles=mode == "compile")
    options: dict[str, Any] = {
        "mode": mode, "graph": True, "half": half, "layout": "channels_last",
    }  # fmt: skip
    choice = BuildChoice(
        backend="inductor", device="cuda", precision="bf16", batch=batch, options=options
    )
    (spec,) = plain.signature.inputs
    graph = in_eight_bits(plain) if name == "int8" else plain
    made = InductorBackend("cuda").build(graph, {spec.name: image.shape}, choice)
    return made.resident({spec.name: image})


def model_rows(
    batch: int, kinds: Sequence[str], limit_s: float, warming: "Warming"
) -> Iterator[dict[str, Any]]:
    """ResNet-50 in 8 bits beside uncompressed builds, after the one in 8 bits and again after the others.

    Builds that there is no time for are left out by name.
    """
    begin = time.perf_counter()
    plain = graph_of("resnet50", small=False)
    image = example("resnet50", batch).numpy()
    calls: dict[str, SelfTimed] = {}
    seconds = {"capture": round(time.perf_counter() - begin, 1)}
    notes: dict[str, str] = {}
    for kind in kinds:
        if kind.startswith("int8"):
            warming.wait()
        start = time.perf_counter()
        if start - begin > limit_s:
            notes[kind] = "no time left"
            continue
        try:
            calls[kind] = built(kind, plain, batch, image)
        except BackendError as error:
            notes[kind] = str(error)
        seconds[kind] = round(time.perf_counter() - start, 1)
        print(f"# {kind} {seconds[kind]} s, {notes.get(kind, '')[:200]}", flush=True)
        if kind.startswith("int8") or kind == kinds[-1]:
            yield model_row(batch, calls, seconds, notes)


def model_row(
    batch: int, calls: dict[str, SelfTimed], seconds: dict[str, float], notes: dict[str, str]
) -> dict[str, Any]:
    """Builds in turn."""
    times = measure(calls, MODEL_PROTOCOL)
    base = min((t.median_ms for n, t in times.items() if not n.startswith("int8")), default=None)
    best = min((t.median_ms for n, t in times.items() if n.startswith("int8")), default=None)
    return {
        "work": "resnet50", "batch": batch,
        "ms": {n: [round(t.median_ms, 4), round(noise(t), 4)] for n, t in times.items()},
        "speedup": round(base / best, 3) if base and best else None,
        "build_s": dict(seconds), "dropped": dict(notes),
    }  # fmt: skip


class Warming:
    """Processes that compile the kernels into Triton's cache."""

    def __init__(self, jobs: int, batches: str) -> None:
        command = [sys.executable, "-m", "benchmarks.conv8", "--batches", batches]
        parts = range(jobs if jobs > 1 else 0)
        self._running = [
            subprocess.Popen([*command, "--part", f"{i}/{jobs}"])  # noqa: S603
            for i in parts
        ]

    def wait(self) -> None:
        """Until all are done."""
        for process in self._running:
            process.wait()


def compile_part(part: str, batches: Sequence[int]) -> None:
    """The kernels of every n-th layer, from the i-th on: "i/n"."""
    index, count = (int(v) for v in part.split("/"))
    for batch in batches:
        for layer in layers()[index::count]:
            eight_bit(layer, operands(layer, batch))


def layer_rows(batch: int) -> Iterator[dict[str, Any]]:
    """Lines of the layers and of their sum, as they are measured."""
    total = dict.fromkeys(("conv8", "cudnn float16"), 0.0)
    for layer in layers():
        row = layer_row(layer, batch)
        for name in total:
            total[name] += row["us"][name] * layer.count / 1e3
        yield row
    yield {"work": "layers", "batch": batch, "ms": {n: round(v, 3) for n, v in total.items()}}


def write(row: dict[str, Any], out: Path | None) -> None:
    """A line of the file; what is printed is short."""
    line = json.dumps({**row, "card": {**facts("cuda"), "torch": torch.__version__}})
    print(" ".join(str(v) for v in row.values())[:300], flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--work", default="layers,model")
    parser.add_argument("--batches", default="256,1")
    parser.add_argument("--builds", default=BUILDS)
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="no build starts after, a model"
    )
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--part", default="", help="compile this part of the layers' kernels alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    batches = [int(b) for b in options.batches.split(",")]
    if options.part:
        compile_part(options.part, batches)
        return
    warming = Warming(options.jobs, options.batches)
    if "layers" in options.work:
        warming.wait()
        for batch in batches:
            for row in layer_rows(batch):
                write(row, options.out)
        torch.cuda.empty_cache()
    if "model" in options.work:
        kinds = options.builds.split(",")
        for batch in batches:
            for row in model_rows(batch, kinds, options.seconds, warming):
                write(row, options.out)


if __name__ == "__main__":
    main()
