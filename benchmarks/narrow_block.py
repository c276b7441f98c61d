"""ResNet-20 with its residual blocks fused against torch.compile, and the blocks alone, on one card.

    python -m benchmarks.narrow_block --out narrow.jsonl [--batch 512] [--work network,blocks] [--autotune]

Trained weights and test images (``tests/data``), norms folded for all. "inductor": the same convolutions by
torch.compile, channels last, cuDNN's own search on; "autotune": with torch's search for kernels, too. All
contenders of a line are recorded as CUDA graphs of several calls and were measured in turn in one run by
device events. "launches": those of the fused kernels, in float16; the fastest is "fused". Blocks alone are
measured in float16. Kernels are compiled by processes of their own first (``--warm``), into caches on disk.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tersor.backends.inductor.host import facts
from tersor.kernels import narrow_block_triton as kernels
from tersor.kernels.narrow_block import block_weights, narrow_block
from tersor.timing.device import SelfTimed
from tersor.timing.protocol import Protocol, measure, noise
from tests.data.zoo import load_fashion, load_resnet20

PROTOCOL = Protocol(rounds=7, runs=9, settled_ms=20.0, max_seconds=12.0)
DTYPES = (torch.float16, torch.bfloat16)
BLOCKS = (0, 3, 6, 4, 7)  # 16; 16 to 32; 32 to 64; 32; 64 channels
NAMES = ("inductor", "fused")
PROFILED = 10
MOST_KERNELS = 16
CALLS = 20  # of one recording
AUTOTUNE = "max-autotune-no-cudagraphs"
START = time.perf_counter()


class Folded(nn.Module):
    """A block whose norms are part of its convolutions."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1 = fuse_conv_bn_eval(block.conv1, block.bn1)
        self.conv2 = fuse_conv_bn_eval(block.conv2, block.bn2)
        has_weight = isinstance(block.short, nn.Sequential)
        self.short = fuse_conv_bn_eval(*block.short) if has_weight else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x).relu()) + self.short(x)).relu()


class Fused(nn.Module):
    """The same by one op."""

    def __init__(self, block: Folded, dtype: torch.dtype) -> None:
        super().__init__()
        short = block.short if isinstance(block.short, nn.Conv2d) else None
        found = block_weights(
            block.conv1.weight.detach(), block.conv1.bias.detach(),
            block.conv2.weight.detach(), block.conv2.bias.detach(), dtype=dtype,
            short=None if short is None else short.weight.detach(),
            short_bias=None if short is None or short.bias is None else short.bias.detach(),
        )  # fmt: skip
        self.parts = [None if t is None else t.cuda() for t in found]
        self.stride = int(block.conv1.stride[0])

    @property
    def out(self) -> int:
        return int(self.parts[2].shape[1])  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return narrow_block(x, *self.parts, self.stride)  # type: ignore[arg-type]

    def launched(self, x: Tensor, launch: kernels.Launch) -> Tensor:
        return kernels.run(x, *self.parts, self.stride, launch)  # type: ignore[arg-type]

    def key(self, x: Tensor) -> Any:
        return kernels._key(x, (self.out, self.out), self.stride, is_plain=self.parts[4] is None)  # noqa: SLF001

    def launches(self) -> tuple[kernels.Launch, ...]:
        return kernels.launches(self.out)


class Network(nn.Module):
    """The network around its blocks."""

    def __init__(self, model: Any, blocks: list[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.stem = fuse_conv_bn_eval(copy.deepcopy(model.stem), model.bn)
        self.blocks = nn.Sequential(*blocks)
        self.fc = copy.deepcopy(model.fc)
        self.to("cuda", dtype, memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x).relu()).mean((2, 3)))


class Recorded:
    """Several calls, recorded once."""

    def __init__(self, call: Callable[[], Tensor], count: int = CALLS) -> None:
        self.count, self._call = count, call  # what a recording reads lives as long as it does
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(count):
                self.kept = call()

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


def kernel_us(call: Callable[[], Tensor]) -> dict[str, float]:
    """Kernel -> microseconds of one call, the longest first; for the eye, not for the verdict."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    found = {e.key[:80]: e.self_device_time_total / PROFILED for e in profile.key_averages()}
    longest = sorted(found, key=lambda n: -found[n])[:MOST_KERNELS]
    return {n: round(found[n], 2) for n in longest if found[n] > 0}


class Subject:
    """The trained network in its parts, and what goes into every block."""

    def __init__(self, batch: int) -> None:
        self.model = load_resnet20()
        self.folded = [Folded(b).eval() for b in self.model.layers]  # type: ignore[union-attr]
        _, self.test = load_fashion()
        count = -(-batch // len(self.test.images))
        images = self.test.images.repeat(count, 1, 1, 1)[:batch].cuda()
        self.images = images.contiguous(memory_format=torch.channels_last)

    def block_input(self, index: int, dtype: torch.dtype) -> Tensor:
        model = copy.deepcopy(self.model).cuda()
        x = torch.relu(model.bn(model.stem(self.images)))  # type: ignore[operator]
        x = model.layers[:index](x)  # type: ignore[index,operator]
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def plain(self, index: int, dtype: torch.dtype) -> nn.Module:
        block = copy.deepcopy(self.folded[index])
        return block.to("cuda", dtype, memory_format=torch.channels_last)

    def network(self, dtype: torch.dtype, *, is_fused: bool) -> Network:
        blocks: list[nn.Module] = (
            [Fused(b, dtype) for b in self.folded] if is_fused else copy.deepcopy(self.folded)
        )  # type: ignore[assignment]
        return Network(self.model, blocks, dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).partition(".")[2]


def compiled(module: nn.Module, mode: str | None = None) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()  # noqa: SLF001 - one network's guards are no other's
    return torch.compile(module, fullgraph=True, mode=mode)


def times_of(contenders: dict[str, SelfTimed]) -> dict[str, list[float]]:
    found = measure(contenders, PROTOCOL)
    return {n: [round(t.median_ms * 1e3, 2), round(noise(t), 4)] for n, t in found.items()}


def choose(subject: Subject, index: int) -> dict[str, list[float]]:
    """Every launch of a block's shape, in float16; the fastest is what calls get from here on."""
    x = subject.block_input(index, torch.float16)
    block = Fused(subject.folded[index], torch.float16)
    wanted = subject.folded[index].double().cuda()(x.double())
    contenders: dict[str, SelfTimed] = {}
    names = {}
    for launch in block.launches():
        found = block.launched(x, launch).double()
        error = float((found - wanted).norm() / wanted.norm())
        if not error < 1e-2:  # far above what rounding gives
            print("WRONG", launch, error, flush=True)
            continue
        names[str(launch)] = launch
        contenders[str(launch)] = Recorded(lambda a=launch: block.launched(x, a))
    subject.folded[index].float().cpu()
    us = times_of(contenders)
    kernels._CHOSEN[block.key(x)] = names[min(us, key=lambda n: us[n][0])]  # noqa: SLF001
    return us


def block_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    dtype = torch.float16
    for index in BLOCKS:
        launches = choose(subject, index)
        contenders: dict[str, SelfTimed] = {}
        error = {}
        x = subject.block_input(index, dtype)
        wanted = subject.folded[index].double().cuda()(x.double())
        subject.folded[index].float().cpu()
        calls = {
            "inductor": compiled(subject.plain(index, dtype)),
            "fused": Fused(subject.folded[index], dtype),
        }
        for name, call in calls.items():
            timed = Recorded(lambda f=call, a=x: f(a))  # type: ignore[misc]
            timed()
            error[name] = float((timed.kept.double() - wanted).norm() / wanted.norm())
            contenders[name] = timed
        us = times_of(contenders)
        moved = (x.numel() + wanted.numel()) * 2
        taps = 9 * (x.shape[1] + wanted.shape[1])
        macs = wanted.numel() * (taps + (0 if x.shape == wanted.shape else x.shape[1]))
        yield {
            "work": "block", "block": index, "shape": [*x.shape], "out": [*wanted.shape], "us": us,
            "speedup": round(us["inductor"][0] / us["fused"][0], 3), "error": error,
            "launches": launches, "launch": min(launches, key=lambda n: launches[n][0]),
            "mb": round(moved / 1e6, 2), "gflop": round(2 * macs / 1e9, 2),
        }  # fmt: skip


def accuracy(call: Callable[[Tensor], Tensor], subject: Subject, dtype: torch.dtype) -> float:
    """Of the packed test images, in batches of the size that was built; the last one overlaps."""
    images, labels = subject.test.images.cuda(), subject.test.labels.cuda()
    batch, right, known = len(subject.images), 0, 0
    for start in range(0, len(images), batch):
        first = max(0, min(start, len(images) - batch))
        x = images[first : first + batch].to(dtype).contiguous(memory_format=torch.channels_last)
        found = call(x).argmax(1) == labels[first : first + batch]
        right += int(found[known - first :].sum())
        known = first + len(x)
    return right / len(images)


def network_rows(subject: Subject, *, autotune: bool) -> Iterator[dict[str, Any]]:
    for index in BLOCKS:
        block = Fused(subject.folded[index], torch.float16)
        x = subject.block_input(index, torch.float16)
        if block.key(x) not in kernels._CHOSEN:  # noqa: SLF001
            choose(subject, index)
    contenders: dict[str, SelfTimed] = {}
    right, difference, seconds, inside = {}, {}, {}, {}
    wanted = copy.deepcopy(subject.model).double().cuda()(subject.images.double())
    parts = [[(d, n, None) for d in DTYPES for n in NAMES]]
    if autotune:
        parts.append([(torch.float16, n, AUTOTUNE) for n in NAMES])
    for builds in parts:
        for dtype, name, mode in builds:
            label = f"{name} {'autotune ' if mode else ''}{short(dtype)}"
            start = time.perf_counter()
            call = compiled(subject.network(dtype, is_fused=name == "fused"), mode)
            x = subject.images.to(dtype)
            timed = Recorded(lambda f=call, a=x: f(a), 5)  # type: ignore[misc]
            timed()
            seconds[label] = round(time.perf_counter() - start, 1)
            contenders[label] = timed
            difference[label] = float((timed.kept.double() - wanted).abs().max())
            right[label] = accuracy(call, subject, dtype)
            if dtype == torch.float16:
                inside[label] = kernel_us(lambda f=call, a=x: f(a))  # type: ignore[misc]
        us = times_of(contenders)
        best = {n: min(v[0] for k, v in us.items() if k.startswith(n)) for n in NAMES}
        yield {
            "work": "network", "batch": len(subject.images), "us": us,
            "speedup": round(best["inductor"] / best["fused"], 3), "accuracy": right,
            "largest_difference": difference, "largest_logit": float(wanted.abs().max()),
            "build_s": seconds, "kernels": inside,
        }  # fmt: skip


def warm(subject: Subject, part: int) -> None:
    """Compile what one part needs; calls of the caches on disk find it."""
    if part < len(BLOCKS):
        index = BLOCKS[part]
        for dtype in DTYPES:
            x = subject.block_input(index, dtype)
            block = Fused(subject.folded[index], dtype)
            for launch in block.launches():
                block.launched(x, launch)
            if dtype == torch.float16:
                compiled(subject.plain(index, dtype))(x)
        return
    dtype = DTYPES[part - len(BLOCKS)]
    compiled(subject.network(dtype, is_fused=False))(subject.images.to(dtype))


def warm_all(batch: int) -> None:
    command = [sys.executable, "-m", "benchmarks.narrow_block", "--batch", str(batch), "--warm"]
    parts = [
        subprocess.Popen([*command, str(i)])  # noqa: S603 - this file
        for i in range(len(BLOCKS) + len(DTYPES))
    ]
    codes = [p.wait() for p in parts]
    print("warmed", codes, "after", round(time.perf_counter() - START), flush=True)


def summary(row: dict[str, Any]) -> str:
    """A line of a terminal."""
    us = ", ".join(f"{n} {v[0]:.1f}" for n, v in row["us"].items())
    right = sorted({round(100 * a, 2) for a in row.get("accuracy", {}).values()})
    what = "x".join(map(str, row.get("out", [row.get("batch")])))
    seconds = round(time.perf_counter() - START)
    return f"{row['work']} {what}: {row['speedup']}x; us: {us}; right {right} %; {seconds} s"[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--work", default="network,blocks")
    parser.add_argument("--autotune", action="store_true")
    parser.add_argument("--warm", type=int, default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; this benchmark is for a card")
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    if options.warm is not None:
        warm(Subject(options.batch), options.warm)
        return
    warm_all(options.batch)
    subject = Subject(options.batch)
    card = {**facts("cuda"), "torch": torch.__version__, "triton": triton.__version__}

    def rows() -> Iterator[dict[str, Any]]:
        if "network" in options.work:
            yield from network_rows(subject, autotune=options.autotune)
        if "blocks" in options.work:
            yield from block_rows(subject)

    for row in rows():
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "card": card}) + "\n")
        print(summary(row), flush=True)


if __name__ == "__main__":
    main()
