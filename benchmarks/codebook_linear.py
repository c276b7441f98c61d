"""Linears on 4- and 8-bit codes against bf16 and stock int4, on one card: weights come from memory.

    python -m benchmarks.codebook_linear --out results [--shapes 8192x8192] [--rows 1,8,16,64] [--kinds table4]

Most of a first run is compiling: some 35 launches of a kind of weight, a second or two each. ``--kinds`` and
``--shapes`` split it; what was compiled stays in Triton's cache.

Every contender has so many copies of its weight that they take more than four times the second-level
cache, and its calls go through them in turn, recorded as a CUDA graph; one figure is one replay over its
calls. All contenders of a line were measured in turn in one run by device events. Every contender's result
is compared with float64 on fresh inputs before it is timed. "share": bytes of the codes (or of the bf16
weight) over the time, as a share of the read bandwidth that a sum over a large tensor reaches in this run.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from tersor.backends.inductor.host import facts
from tersor.kernels import codebook_linear_triton as kernels
from tersor.kernels.codebook_linear import codebook_linear
from tersor.kernels.codebook_weight import coded_weight, expanded
from tersor.timing.device import SelfTimed
from tersor.timing.protocol import Protocol, measure, noise

NAME = "codebook_linear"
SEED = 0
PROTOCOL = Protocol(rounds=7, runs=9, settled_ms=20.0, max_seconds=15.0)
SHAPES = "8192x8192,4096x4096,14336x4096,4096x14336,28672x8192"  # outputs x inputs
KINDS = "table4,uniform4,table8,uniform8"
GROUP = 128  # of uniform 4-bit weights, ours and stock
COLD = 4  # times the second-level cache that the copies of a weight take at least
LEAST_CALLS = 16  # of one recording
READ_BYTES = 2**32  # of the tensor whose sum shows the read bandwidth
INNER_TILES = 8  # of the stock kernel's layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One shape and number of rows.

    Attributes:
        us: Contender -> median microseconds a call, and their spread as a share.
        share: Contender -> its weight's bytes over the time, of the read bandwidth.
        error: Contender -> norm of the error over the norm of the float64 result.
        launch: Contender -> how ours was launched.
        dropped: Contender -> why it was not measured.
    """

    outputs: int
    inputs: int
    rows: int
    us: dict[str, list[float]]
    share: dict[str, float]
    error: dict[str, float]
    launch: dict[str, str]
    dropped: dict[str, str]
    read_tb_s: float


class Turns:
    """Calls on copies of a weight in turn, recorded once."""

    def __init__(self, copies: Sequence[Any], call: Callable[[Any], Tensor]) -> None:
        self._copies = copies  # the recording reads them where they lie
        rounds = -(-LEAST_CALLS // len(copies))
        self.count = rounds * len(copies)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for copy in copies:
                call(copy)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                for copy in copies:
                    call(copy)

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
        return start.elapsed_time(end) / self.count


@dataclass(frozen=True, slots=True)
class Contender:
    """A weight in its own form: the bytes of it, what it stands for, and the product."""

    weight: tuple[Tensor, ...]  # what is read by every call, and copied
    values: Tensor  # float64 [outputs, inputs]
    call: Callable[[tuple[Tensor, ...]], Tensor]
    launch: Callable[[], str] = lambda: ""  # how it was launched, once it was

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.weight)

    def copies(self) -> list[tuple[Tensor, ...]]:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = max(2, COLD * cache // self.size_bytes + 1)
        return [self.weight, *(tuple(t.clone() for t in self.weight) for _ in range(count - 1))]


def coded(x: Tensor, bits: int, outputs: int, *, is_table: bool) -> Contender:
    """Ours: a table a row, or a grid: steps of groups at 4 bits, one a row at 8."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    inputs = x.shape[1]
    codes = torch.randint(
        0, 2**bits, (outputs, inputs), generator=generator, device="cuda", dtype=torch.uint8
    )
    if is_table:
        shape = (outputs, 1, 2**bits)
        tables = torch.randn(shape, generator=generator, device="cuda").mul_(0.02).half()
        weight = coded_weight(codes, bits=bits, tables=tables)
    else:
        group = GROUP if bits == 4 else 0
        groups = inputs // GROUP if group else 1
        scales = torch.rand(outputs, groups, generator=generator, device="cuda") * 0.01 + 0.001
        weight = coded_weight(codes, bits=bits, scales=scales.half().float(), group=group)
    names = [n for n in ("words", "tables", "planes", "scales") if getattr(weight, n) is not None]

    def call(parts: tuple[Tensor, ...]) -> Tensor:
        known = dict(zip(names, parts, strict=True))
        tensors = (known.get(n) for n in ("words", "tables", "planes", "scales"))
        return codebook_linear(x, *tensors, None, bits, inputs, weight.group)  # type: ignore[arg-type]

    values = expanded(
        weight.words, weight.tables, weight.scales, bits, inputs, weight.group
    ).double()
    known = kernels.Weight(
        weight.words, weight.tables, weight.planes, weight.scales, bits, inputs, weight.group
    )
    return Contender(
        tuple(getattr(weight, n) for n in names),
        values,
        call,
        lambda: str(kernels.launch_of(x, known)),
    )


def plain(x: Tensor, values: Tensor) -> Contender:
    """The bf16 product of a weight."""
    weight = values.to(torch.bfloat16)
    return Contender((weight,), values, lambda parts: torch.nn.functional.linear(x, parts[0]))


def stock(x: Tensor, outputs: int) -> Contender:
    """Torch's own int4: two codes a byte, scales and zeros of groups in bf16."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    inputs = x.shape[1]
    codes = torch.randint(
        0, 16, (outputs, inputs), generator=generator, device="cuda", dtype=torch.uint8
    )
    scales = torch.rand(inputs // GROUP, outputs, generator=generator, device="cuda") * 0.01 + 0.001
    pairs = torch.stack([scales, torch.zeros_like(scales)], 2).to(torch.bfloat16).contiguous()
    joined = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch._convert_weight_to_int4pack(joined, INNER_TILES)  # noqa: SLF001 - the op to beat
    steps = pairs[:, :, 0].t().double().repeat_interleave(GROUP, 1)

    def call(parts: tuple[Tensor, ...]) -> Tensor:
        found: Tensor = torch._weight_int4pack_mm(x, parts[0], GROUP, parts[1])  # noqa: SLF001
        return found

    return Contender((packed, pairs), (codes.double() - 8) * steps, call)


def read_bandwidth() -> float:
    """Bytes a second of a sum over a tensor that no cache holds."""
    data = torch.randint(0, 9, (READ_BYTES // 4,), device="cuda", dtype=torch.int32).float()
    timed = Turns([data], torch.sum)
    return READ_BYTES / (min(timed.timed_ms() for _ in range(9)) * 1e-3)


def contenders(x: Tensor, outputs: int, kinds: Sequence[str]) -> Iterator[tuple[str, Contender]]:
    for kind in kinds:
        found = coded(x, int(kind[-1]), outputs, is_table=kind.startswith("table"))
        yield kind, found
        if kind == kinds[0]:
            yield "bf16", plain(x, found.values)
    yield "stock int4", stock(x, outputs)


def relative_error(x: Tensor, contender: Contender) -> float:
    wanted = x.double() @ contender.values.t()
    found = contender.call(contender.weight).double()
    return float((found - wanted).norm() / wanted.norm())


def line(outputs: int, inputs: int, rows: int, kinds: Sequence[str], bandwidth: float) -> Row:
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, inputs, device="cuda", generator=generator).to(torch.bfloat16)
    timed: dict[str, SelfTimed] = {}
    sizes, error, dropped, launch = {}, {}, {}, {}
    for name, contender in contenders(x, outputs, kinds):
        try:
            error[name] = relative_error(x, contender)
            timed[name] = Turns(contender.copies(), contender.call)
        except (
            RuntimeError,
            NotImplementedError,
        ) as problem:  # a stock op that a shape does not suit
            dropped[name] = str(problem)[:200]
            error.pop(name, None)
            continue
        sizes[name] = contender.size_bytes
        launch[name] = contender.launch()
    times = measure(timed, PROTOCOL)
    return Row(
        outputs=outputs,
        inputs=inputs,
        rows=rows,
        us={n: [round(t.median_ms * 1e3, 2), round(noise(t), 4)] for n, t in times.items()},
        share={n: round(sizes[n] / (t.median_ms * 1e-3) / bandwidth, 3) for n, t in times.items()},
        error=error,
        launch=launch,
        dropped=dropped,
        read_tb_s=round(bandwidth / 1e12, 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default="1,8,16,64")
    parser.add_argument("--kinds", default=KINDS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; this benchmark is for a card")
    card = {**facts("cuda"), "torch": torch.__version__}
    bandwidth = read_bandwidth()
    for shape in options.shapes.split(","):
        outputs, inputs = map(int, shape.split("x"))
        for rows in map(int, options.rows.split(",")):
            row = line(outputs, inputs, rows, options.kinds.split(","), bandwidth)
            record.append(NAME, [row], seed=SEED, settings={"card": card}, folder=options.out)
            print(
                json.dumps({"shape": shape, "rows": rows, "us": row.us, "launch": row.launch}),
                flush=True,
            )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
