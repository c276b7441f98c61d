"""Builds on one card, random weights: what is found, by hand, in 8 bits; BERT-base, ViT-B, ResNet-50.

    python -m benchmarks.gpu_builds --out results.jsonl [--work bert,vit,resnet50,kernels] [--batches 1,32] [--formats int8,fp8]

Speed only. All builds of one line were measured in turn in one run by device events, inputs on the
device. "float": uncompressed builds of this project; "hand": the same module by ``torch.compile``, in
bfloat16 and float16, and its calls recorded as a CUDA graph. Widths are cut in the models themselves
(``--small``: feed-forward 2048, nine heads; "hand" and "float" stay whole). With ``--out`` whole rows
go to the file, and what is printed is short.
"""

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor, nn

from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.host import facts
from tersor.capture.module import capture
from tersor.capture.samples import Call, Samples
from tersor.core.errors import BackendError
from tersor.core.records import BuildChoice, Site, Structure
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import attribute, run_all
from tersor.graph.operators import weighted_ops
from tersor.kernels.activations_triton import ACTIVATION_CODES
from tersor.kernels.epilogue import activated, finished
from tersor.kernels.linear8 import linear8
from tersor.kernels.linear8_cuda import CHOICES
from tersor.kernels.linear8_library import library_product, library_ways
from tersor.kernels.linear8_triton import CHOSEN as CHOSEN_TILES
from tersor.kernels.linear8_triton import choose_tile, finish, key_of, launch
from tersor.ops.float8 import FLOAT8_LIMIT, float8_codes
from tersor.timing.protocol import Protocol, measure, noise
from tests.conformance.zoo.torchvision_shim import import_torchvision

PROTOCOL = Protocol(rounds=5, runs=15, max_seconds=20.0)
FLOATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bf16", {"mode": "eager", "graph": True}),
    ("bf16", {"mode": "compile", "graph": True}),
    ("bf16", {"mode": "autotune", "graph": True}),
)
IMAGES: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    ("bf16", {"mode": mode, "graph": True, "half": half, "layout": "channels_last"})
    for mode in ("eager", "compile", "autotune")
    for half in ("bfloat16", "float16")
)
HANDS = ((True, torch.bfloat16), (False, torch.bfloat16))
IMAGE_HANDS = ((True, torch.bfloat16), (True, torch.float16), (False, torch.float16))
LINEARS = (
    (4096, 768, 768), (4096, 768, 2304), (4096, 768, 3072), (4096, 3072, 768),  # BERT-base, batch 32
    (32768, 768, 768), (32768, 768, 2304), (32768, 768, 3072), (32768, 3072, 768),  # batch 256
    (6304, 768, 2304), (6304, 768, 3072), (6304, 3072, 768),  # ViT-B, batch 32
    (50432, 768, 2304), (50432, 768, 3072), (50432, 3072, 768),  # batch 256
    (1, 768, 3072), (128, 768, 3072),
)  # fmt: skip
CHAINED = ("none", "gelu")  # to bf16, and through GELU to the next codes


class Layer(nn.Module):
    """A transformer's layer, norms in front (ViT) or behind (BERT)."""

    def __init__(self, width: int, heads: int, inner: int, *, in_front: bool) -> None:
        super().__init__()
        size = 64 * heads
        self.q, self.k, self.v = (nn.Linear(width, size) for _ in range(3))
        self.out, self.up, self.down = (
            nn.Linear(size, width),
            nn.Linear(width, inner),
            nn.Linear(inner, width),
        )
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.in_front = heads, in_front

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = [
            f(x).view(batch, tokens, self.heads, 64).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        ]
        found = nn.functional.scaled_dot_product_attention(*parts)
        return self.out(found.transpose(1, 2).reshape(batch, tokens, -1))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_front:
            x = x + self.attend(self.first(x))
            return x + self.feed(self.second(x))
        x = self.first(x + self.attend(x))
        return self.second(x + self.feed(x))


class Bert(nn.Module):
    def __init__(self, heads: int, inner: int) -> None:
        super().__init__()
        self.words, self.places = (
            nn.Embedding(30522, 768),
            nn.Parameter(torch.randn(1, 128, 768) * 0.02),
        )
        self.norm = nn.LayerNorm(768)
        self.layers = nn.ModuleList(Layer(768, heads, inner, in_front=False) for _ in range(12))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places)
        for layer in self.layers:
            x = layer(x)
        return x


class Vit(nn.Module):
    def __init__(self, heads: int, inner: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.token, self.places = (
            nn.Parameter(torch.zeros(1, 1, 768)),
            nn.Parameter(torch.randn(1, 197, 768) * 0.02),
        )
        self.layers = nn.ModuleList(Layer(768, heads, inner, in_front=True) for _ in range(12))
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def example(name: str, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "bert":
        return torch.randint(0, 30522, (batch, 128), generator=generator)
    return torch.randn(batch, 3, 224, 224, generator=generator)


def model_of(name: str, *, small: bool) -> nn.Module:
    if name == "resnet50":
        torch.manual_seed(1)
        model: nn.Module = import_torchvision().models.resnet50()
        return model.eval()
    generator = torch.Generator().manual_seed(1)
    model = {"bert": Bert, "vit": Vit}[name](9 if small else 12, 2048 if small else 3072)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.eval()


def graph_of(name: str, *, small: bool) -> Graph:
    leaf = Structure(kind="tensor")
    call = Call(Structure(kind="tuple", children=(leaf,)), Structure(kind="dict"))
    return capture(model_of(name, small=small), Samples(call, (example(name, 2),))).graph


class ByHand:
    """What a careful user does: sixteen bits, channels last, torch.compile, a CUDA graph."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, *, compiles: bool) -> None:
        model = model_of(name, small=False).to("cuda", dtype)
        x = example(name, batch).cuda()
        x = x.to(dtype) if x.is_floating_point() else x
        if name == "resnet50":
            model, x = (v.to(memory_format=torch.channels_last) for v in (model, x))
        call = torch.compile(model) if compiles else model
        with torch.no_grad():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call(x)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._kept = (call(x), call, model, x)  # a recording reads them where they lie

    def __call__(self) -> object:
        self._graph.replay()
        torch.cuda.synchronize()
        return None

    def timed_ms(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def in_eight_bits(graph: Graph, level: Literal["int8", "fp8"], left: Collection[str] = ()) -> Graph:
    """Every linear but those by name on codes: a scale a row, a step a tensor, both from the largest value seen."""
    seen = run_all(graph.module, graph.example)
    changes = []
    for op in weighted_ops(graph.module):
        if op.kind != "linear" or op.node.name in left:
            continue
        weight = attribute(graph.module, str(op.weight.target)).detach()
        most = 127 if level == "int8" else FLOAT8_LIMIT
        scale = weight.abs().amax(1) / most
        step = float(seen[op.data.name].abs().max()) / most
        site = Site(name=op.node.name, kind="format", ops=(op.node.name,), op_kind="linear",
                    weight=str(op.weight.target), shape=tuple(weight.shape))  # fmt: skip
        units = weight / scale[:, None]
        if level == "int8":
            codes, grid = units.round().to(torch.int8), Quantizer(step=step, low=-128, high=127)
        else:
            codes = float8_codes(units)
            grid = Quantizer(step=step, low=-FLOAT8_LIMIT, high=FLOAT8_LIMIT, kind="fp8")
        changes.append(SiteChange(site=site, level=level, codes=codes, scale=scale, quantizer=grid))
    return apply(graph, changes)


def compare(
    name: str, batch: int, *, small: bool, modes: str, formats: Sequence[Any], by_hand: bool = True
) -> dict[str, Any]:
    plain, has_images = graph_of(name, small=False), name == "resnet50"
    builds = [("float", plain, p, o) for p, o in (IMAGES if has_images else FLOATS)]
    if not has_images and batch > 1:
        whole = graph_of(name, small=True) if small else plain
        for level in formats:
            cut = in_eight_bits(whole, level)
            builds += [(level, cut, p, o) for p, o in FLOATS[1:]]
    builds = [b for b in builds if b[3]["mode"] in modes.split(",")]
    (spec,) = plain.signature.inputs
    inputs = {spec.name: example(name, batch).numpy()}
    backend, calls, seconds, notes = InductorBackend("cuda"), {}, {}, {}
    for kind, graph, precision, options in builds:
        label = f"{kind} {options.get('half', 'bfloat16')} {options['mode']}"
        choice = BuildChoice(
            backend="inductor", device="cuda", precision=precision, batch=batch, options=options
        )  # type: ignore[arg-type]
        start = time.perf_counter()
        try:
            built = backend.build(graph, {spec.name: inputs[spec.name].shape}, choice)
        except BackendError as error:
            notes[label] = str(error)
            continue
        seconds[label] = round(time.perf_counter() - start, 1)
        calls[label] = built.resident(inputs)
    for compiles, dtype in (IMAGE_HANDS if has_images else HANDS) if by_hand else ():
        label = f"hand {str(dtype).partition('.')[2]} {'compile' if compiles else 'eager'}"
        start = time.perf_counter()
        calls[label] = ByHand(name, batch, dtype, compiles=compiles)
        seconds[label] = round(time.perf_counter() - start, 1)
    times = measure(calls, PROTOCOL)
    best = {
        kind: min((t.median_ms, n) for n, t in times.items() if n.startswith(kind))
        for kind in ("hand", "float", *formats)
        if any(n.startswith(kind) for n in times)
    }
    row: dict[str, Any] = {
        "work": name, "batch": batch, "small": small,
        "ms": {n: [round(t.median_ms, 4), round(noise(t), 4)] for n, t in times.items()},
        "build_s": seconds, "dropped": notes, "best": best,
    }  # fmt: skip
    for base, over in ((b, o) for b in ("float", "hand") for o in ("float", *formats)):
        if base != over and base in best and over in best:
            row[f"{over}_over_{base}"] = round(best[base][0] / best[over][0], 3)
    row["ways"] = [[str(k), c.way, c.ms, c.refused] for k, c in CHOICES.items()]
    return row


def _in_turn(
    product: Callable[[], Tensor], after: Callable[..., Tensor], arguments: tuple[Any, ...]
) -> Tensor:
    return after(product(), *arguments)


def arms(rows: int, inp: int, out: int, activation: str) -> dict[str, Callable[[], object]]:
    """One layer, whatever computes it: with bias, to bf16, or through an activation to the next codes.

    "fused": the Triton kernel; the others are the library's products, with what follows compiled by
    Inductor ("compiled") or in one kernel of ours ("finished").
    """
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, inp, device="cuda", generator=generator)
    w = torch.randn(out, inp, device="cuda", generator=generator)
    scale, bias = torch.full((out,), 0.01, device="cuda"), torch.randn(out, device="cuda")
    inverse = None if activation == "none" else torch.full((out,), 20.0, device="cuda")
    xb, wb, half = x.bfloat16(), w.bfloat16(), bias.bfloat16()
    after = torch.compile(finished, dynamic=False)

    def by_hand() -> object:
        return activated(nn.functional.linear(xb, wb, half), activation)

    found: dict[str, Callable[[], object]] = {"bf16": torch.compile(by_hand, dynamic=False)}
    for name, kind in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        xc, wc = ((t * 30).round().clamp(-127, 127).to(kind) for t in (x, w))
        dtype = torch.bfloat16 if inverse is None else kind
        code, known = ACTIVATION_CODES[activation], scale if inverse is None else inverse
        most = 127.0 if kind == torch.int8 else 448.0
        tail = (dtype, code, inverse is not None, 0.0, -most, most)
        key = key_of(xc, wc, dtype, code)

        fused = partial(launch, xc, wc, scale, bias, known, *tail)
        choose_tile(key, fused)
        found[f"{name} fused"] = fused
        found[f"{name} chosen"] = partial(
            linear8, xc, wc, scale, bias, dtype, activation, inverse, 0.0, int(-most), int(most)
        )
        if kind == torch.int8 and rows > 16:
            found["int8 _int_mm alone"] = partial(torch._int_mm, xc, wc.t())  # noqa: SLF001
        for way in library_ways(xc, wc, dtype, is_last=inverse is None):
            product = partial(library_product, xc, wc, scale, bias, dtype, way)
            found[f"{name} {way} alone"] = product
            if way == "rowwise":
                continue
            end = (scale, bias, dtype, activation, inverse, 0.0, -most, most)
            found[f"{name} {way} compiled"] = partial(_in_turn, product, after, end)
            found[f"{name} {way} finished"] = partial(
                _in_turn, product, finish, (scale, bias, known, *tail)
            )
    return found


def kernels(rows: int, inp: int, out: int) -> Iterator[dict[str, Any]]:
    """Median microseconds of every way of one layer, recorded as CUDA graphs, and which is chosen."""
    for activation in CHAINED:
        us: dict[str, float] = {}
        refused: dict[str, str] = {}
        torch._dynamo.reset()  # noqa: SLF001 - one compiled program a shape
        for name, call in arms(rows, inp, out, activation).items():
            try:
                call()
                ms = triton.testing.do_bench_cudagraph(call, rep=10, return_mode="median")
            except RuntimeError as error:
                refused[name] = str(error)[:300]
                continue
            us[name] = round(ms * 1e3, 2)
        flop = 2.0 * rows * inp * out
        yield {
            "work": "linear", "shape": [rows, inp, out], "after": activation, "us": us,
            "tera": {n: round(flop / t / 1e6) for n, t in us.items()}, "refused": refused,
            "chosen": {
                str(k[3]): v.way for k, v in CHOICES.items()
                if k[:3] == (rows, inp, out) and k[5] == ACTIVATION_CODES[activation]
            },
            "tiles": {str(k[3]): v for k, v in CHOSEN_TILES.items() if k[:3] == (rows, inp, out)},
        }  # fmt: skip


def brief(row: dict[str, Any]) -> str:
    """A row in at most 300 characters; the whole one is in the file."""
    if "shape" in row:
        return f"{row['shape']} {row['after']} {row['us']}"[:300]
    ms = {kind: round(found[0], 3) for kind, found in row["best"].items()}
    over = {name: value for name, value in row.items() if "_over_" in name}
    ways = [f"{c[1]} {c[0].split(', torch')[0][1:]}" for c in row["ways"]]
    return f"{row['work']} {row['batch']} {ms} {over} {row['dropped']} {ways}"[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--work", default="kernels,bert,vit")
    parser.add_argument("--batches", default="32,256")
    parser.add_argument("--modes", default="eager,compile,autotune")
    parser.add_argument("--formats", default="int8,fp8", help="of eight bits, beside floats")
    parser.add_argument("--hand", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    card = {**facts("cuda"), "torch": torch.__version__}
    for work in options.work.split(","):
        rows = (
            (row for shape in LINEARS for row in kernels(*shape))
            if work == "kernels"
            else (
                compare(
                    work,
                    int(b),
                    small=options.small,
                    modes=options.modes,
                    formats=options.formats.split(","),
                    by_hand=options.hand,
                )
                for b in options.batches.split(",")
            )
        )
        for row in rows:
            line = json.dumps({**row, "card": card})
            print(line if options.out is None else brief(row), flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
