"""``tersor.compress`` on a card: ``python -m benchmarks.gpu_compress resnet20 vit minilm [--out FOLDER]``.

resnet20: the checkpoint of ``tests/data`` at batch 512, accuracy on Fashion-MNIST, at most a point lost, and fast
twice as fast as it may. vit: 192 wide, six layers, patches of four, trained here for a minute. minilm: MiniLM-L6's own
weights on sentences padded to 128 tokens. Both at batch 64, mean cosine of the outputs at least .99.

What a row calls the base is the fastest uncompressed build that was found, compiled and recorded as well;
``compiled_ms`` is what torch.compile alone makes of the model in bfloat16, recorded, in both layouts of images, measured
in turn with the result. A card without the packages of MiniLM takes what ``--pack FILE`` wrote elsewhere (``--assets FILE``).
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from benchmarks import record
from benchmarks.gpu_builds import Layer
from benchmarks.outcome import levels_of, widths_of
from benchmarks.prune import read
from tersor.api.latency import measure_calls
from tersor.backends.inductor import InductorBackend
from tersor.build.build import shapes_of
from tersor.core.data import Split
from tersor.core.errors import BackendError
from tersor.core.records import BuildChoice
from tersor.core.target import Target
from tersor.timing.protocol import Protocol, ratio
from tests.data.zoo import load_resnet20

NAME = "gpu_compress"
LENGTH, WORDS, WIDTH, HEADS, INNER = 128, 30522, 384, 12, 1536
PARTS: Mapping[Split, int] = {"calibration": 256, "search": 128, "test": 512}
EPOCHS, TRAINED = 12, 256  # of the ViT, images a step
# Loads the file in a process of its own, with torch imported and a context alive.
FRESH = """
import sys, time
import numpy, torch, tersor
torch.zeros(1, device=sys.argv[2]).cpu()
inputs = dict(numpy.load(sys.argv[3]))
start = time.perf_counter()
model = tersor.load(sys.argv[1], device=sys.argv[2])
model(inputs if len(inputs) > 1 else next(iter(inputs.values())))
print(time.perf_counter() - start)
"""


class Vit(nn.Module):
    """49 patches of 28 x 28 pixels."""

    def __init__(self, width: int = 192, depth: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.places = nn.Parameter(torch.randn(1, 49, width) * 0.02)
        self.layers = nn.ModuleList(
            Layer(width, width // 64, 4 * width, in_front=True) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.first, self.second = (nn.LayerNorm(WIDTH, 1e-12) for _ in range(2))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = [
            f(x).view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        ]
        found = functional.scaled_dot_product_attention(*parts, attn_mask=bias)
        x = self.first(x + self.out(found.transpose(1, 2).reshape(batch, tokens, -1)))
        return self.second(x + self.down(functional.gelu(self.up(x))))


class MiniLM(nn.Module):
    """MiniLM-L6 without its package: unit vectors [b, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, 1e-12)
        self.layers = nn.ModuleList(BertLayer() for _ in range(6))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.to(self.places.dtype)
        bias = (1 - mask)[:, None, None, :] * -1e4
        x = self.norm(self.words(input_ids) + self.places)
        for layer in self.layers:
            x = layer(x, bias)
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1e-9)
        return functional.normalize(pooled, dim=1)


def renamed(bert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BERT's state in the names of ``MiniLM``."""
    inside = {
        "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
        "attention.output.dense": "out", "attention.output.LayerNorm": "first",
        "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "second",
    }  # fmt: skip
    front = "embeddings."
    places = bert[front + "position_embeddings.weight"][:LENGTH]
    found = {
        "words.weight": bert[front + "word_embeddings.weight"],
        "places": places + bert[front + "token_type_embeddings.weight"][0],
        **{f"norm.{p}": bert[f"{front}LayerNorm.{p}"] for p in ("weight", "bias")},
    }
    for i in range(6):
        for theirs, ours in inside.items():
            for part in ("weight", "bias"):
                found[f"layers.{i}.{ours}.{part}"] = bert[f"encoder.layer.{i}.{theirs}.{part}"]
    return found


def pack(path: Path) -> None:
    """Write MiniLM's weights in 16 bits and its sentences' tokens, checked against the package's own model."""
    from tersor.cli.demo.models import minilm

    case = minilm(PARTS)
    state = renamed(case.model.bert.state_dict())  # type: ignore[union-attr]
    model = MiniLM()
    model.load_state_dict(state)
    few = {name: t[:4] for name, t in case.test.items()}  # type: ignore[union-attr, index]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**few), case.model(**few), rtol=1e-4, atol=1e-5)
    data = {part: {n: t.int() for n, t in getattr(case, part).items()} for part in PARTS}
    torch.save({"state": {n: t.half() for n, t in state.items()}, "data": data}, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, its data, and how good an answer is.

    Attributes:
        metric: Of the search, in place of agreement with the original.
        score: Of a predictor, on data that no part of a run has seen, in percent.
    """

    model: nn.Module
    data: tersor.Data
    batch: int
    targets: Sequence[Target]
    score: Callable[[Callable[..., Any]], float]
    metric: Any = None


class Accuracy:
    """Share of right labels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __call__(self, predict: Callable[[Tensor], Tensor]) -> float:
        return float((predict(self.images).argmax(1) == self.labels).double().mean())


def resnet20() -> Subject:
    train, (x, y) = read("train")[0], read("t10k")
    batch = 512
    half = len(x) // 2

    def score(predict: Callable[..., Any]) -> float:
        rows = range(half, len(x) - batch + 1, batch)
        right = [
            int((torch.as_tensor(predict(x[i : i + batch])).argmax(1) == y[i : i + batch]).sum())
            for i in rows
        ]
        return 100 * sum(right) / (len(rows) * batch)

    return Subject(
        model=load_resnet20(),
        data=tersor.Data([train[:4000]], output="logits"),
        batch=batch,
        targets=(Target(speedup=1.5, drop_points=1.0), Target(speedup=2.0)),
        score=score,
        metric=Accuracy(x[:half], y[:half]),
    )


def cosine(model: nn.Module, inputs: Mapping[str, Tensor], batch: int) -> Callable[..., float]:
    """Mean cosine with the original's outputs, in percent."""

    def score(predict: Callable[..., Any]) -> float:
        found = []
        count = len(next(iter(inputs.values()))) // batch * batch
        for i in range(0, count, batch):
            part = {n: t[i : i + batch] for n, t in inputs.items()}
            with torch.no_grad():
                wanted = model(*part.values())
            given = torch.as_tensor(predict(*part.values()))
            found.append(functional.cosine_similarity(given.float(), wanted, dim=1))
        return 100 * float(torch.cat(found).mean())

    return score


def trained_vit(device: str, epochs: int = EPOCHS) -> nn.Module:
    """On all training images, cosine-shaped rates, 16-bit floats on a card."""
    torch.manual_seed(0)
    model = Vit().to(device)
    images, labels = (t.to(device) for t in read("train"))
    steps = epochs * (len(images) // TRAINED)
    chosen = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(chosen, 1e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(images) // TRAINED) == 0:
            order = torch.randperm(len(images), device=device)
        rows = order[(step * TRAINED) % (len(images) - TRAINED) :][:TRAINED]
        x = images[rows]
        x = torch.where(
            (torch.rand(len(x), device=device) < 0.5)[:, None, None, None], x.flip(3), x
        )
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            loss = functional.cross_entropy(model(x).float(), labels[rows], label_smoothing=0.1)
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        rates.step()
    return model.cpu().eval()


def vit(device: str) -> Subject:
    model = trained_vit(device)
    x, y = read("t10k")
    with torch.no_grad():
        right = float((model(x).argmax(1) == y).double().mean())
    print(f"vit: {100 * right:.2f} % of the test images", flush=True)
    train = read("train")[0]
    data = tersor.Data(
        calibration=[train[:1024]], search=[train[1024:2048]], test=[x[:5000]], output="embedding"
    )
    score = cosine(model, {"x": x[5000:]}, 64)
    return Subject(
        model=model, data=data, batch=64, targets=(Target(min_agreement=0.99),), score=score
    )


def minilm(assets: Path) -> Subject:
    if not assets.exists():
        pack(assets)
    found = torch.load(assets, weights_only=True)
    model = MiniLM()
    model.load_state_dict({n: t.float() for n, t in found["state"].items()})
    parts = {part: {n: t.long() for n, t in d.items()} for part, d in found["data"].items()}
    late = {n: t[256:] for n, t in parts["test"].items()}
    parts["test"] = {n: t[:256] for n, t in parts["test"].items()}
    data = tersor.Data(**{part: [d] for part, d in parts.items()}, output="embedding")
    targets = (Target(min_agreement=0.99),)
    score = cosine(model.eval(), late, 64)
    return Subject(model=model.eval(), data=data, batch=64, targets=targets, score=score)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressRow:
    """One result.

    Attributes:
        speedup: The base's median latency over the result's, with 95 % bounds.
        compiled_ms, compiled_speedup: The faster of torch.compile's own builds, and its latency over the result's.
        score, base_score: Accuracy or mean cosine in percent, on data that no part of the run has seen.
        price_errors: |predicted / measured - 1| of builds that no fit saw, by build choice.
        first_answer_s: From ``load`` to the first answer, in a fresh process.
        stages: Stage -> second at which it began.
    """

    name: str
    device: str
    target: str
    choice: str
    status: str
    base_ms: float
    ms: float
    speedup: tuple[float, float, float]
    compiled_ms: float
    compiled_speedup: tuple[float, float, float]
    size_bytes: int
    original_bytes: int
    score: float
    base_score: float
    seconds: float
    first_answer_s: float | None
    levels: Mapping[str, int]
    widths: float
    price_errors: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)


class Clock:
    """Prints stages and notes with their seconds."""

    def __init__(self) -> None:
        self.start, self.stages = time.time(), {}  # type: ignore[var-annotated]

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.setdefault(name, round(time.time() - self.start, 1))
        print(f"[{time.time() - self.start:6.1f} s] {name} {total or ''}", flush=True)

    def advance(self, steps: int = 1) -> None:
        """Nothing is shown."""

    def note(self, text: str) -> None:
        print(f"[{time.time() - self.start:6.1f} s]   {text}", flush=True)

    def close(self) -> None:
        """Nothing is open."""


def rows_of(
    name: str, subject: Subject, device: str, folder: Path, options: Mapping[str, Any]
) -> Any:
    """A row for every target; the first is ``compress``, the others ``resolve``."""
    clock, base_score = Clock(), subject.score(lambda x: as_given(subject.model, x))
    result = None
    for number, target in enumerate(subject.targets):
        start = time.time()
        if result is None:
            result = tersor.compress(
                subject.model, subject.data, target=target, metric=subject.metric, device=device,
                batch=subject.batch, cache_dir=folder / "cache", progress=clock, **options,
            )  # fmt: skip
        else:
            result = result.resolve(target)
        path = folder / f"{name}{number}.tersor"
        result.save(path)
        seconds = time.time() - start
        verdict = result.verdict
        model = tersor.load(path, device=device)
        anchor = against_compiled(result)
        yield CompressRow(
            name=name,
            device=device,
            target=target.describe(),
            choice=result.plan.choice.describe(),
            status=str(verdict.status),
            base_ms=verdict.baseline_latency.median_ms,
            ms=verdict.latency.median_ms,
            speedup=(verdict.speedup, verdict.speedup_low, verdict.speedup_high),
            compiled_ms=anchor[0],
            compiled_speedup=anchor[1],
            size_bytes=verdict.size_bytes,
            original_bytes=verdict.original_bytes,
            score=subject.score(model),
            base_score=base_score,
            seconds=seconds,
            first_answer_s=first_answer(path, device, subject, folder),
            levels=levels_of(result),
            widths=widths_of(result),
            price_errors={
                t.choice.describe(): tuple(
                    abs(b.predicted_ms / b.measured_ms - 1) for b in t.builds if b.held_out
                )
                for t in result._run.prices.tables  # noqa: SLF001
            },
            notes=verdict.notes,
            stages=clock.stages if not number else {},
        )


def against_compiled(result: Any) -> tuple[float, tuple[float, float, float]]:
    """The faster of torch.compile's own builds beside a result: its latency, and the ratio with its bounds."""
    session = result._run.session  # noqa: SLF001 - a benchmark of this package
    backend = InductorBackend.for_device(session.settings.device)
    batch = result.plan.choice.batch
    is_cuda = session.settings.device.startswith("cuda")
    calls = {"result": session.caller(result._final.built.executable, batch)}  # noqa: SLF001
    for layout in ("contiguous", "channels_last"):
        options = {"mode": "compile", "layout": layout, **({"graph": True} if is_cuda else {})}
        choice = BuildChoice(
            backend="inductor",
            device=session.settings.device,
            precision="bf16",
            batch=batch,
            options=options,
        )
        try:
            build = backend.build(session.graph, shapes_of(session.graph.signature, batch), choice)
        except BackendError:  # no images in it
            continue
        calls[layout] = session.caller(build, batch)
    times = measure_calls(session, calls, Protocol(rounds=9, runs=15, max_seconds=20.0))
    best = min((n for n in times if n != "result"), key=lambda n: times[n].median_ms)
    found = ratio(times[best], times["result"])
    return times[best].median_ms, (found.value, found.low, found.high)


def as_given(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The model's own answer."""
    with torch.no_grad():
        found: Tensor = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        return found


def first_answer(path: Path, device: str, subject: Subject, folder: Path) -> float | None:
    """Seconds from ``load`` to an answer in a fresh process."""
    (first, *_) = subject.data.calibration or subject.data.iterable  # type: ignore[misc]
    given = first if isinstance(first, Mapping) else {"x": first}
    batch = {n: t[: subject.batch].numpy() for n, t in given.items()}  # type: ignore[union-attr]
    np.savez(folder / "batch.npz", **batch)
    words = [sys.executable, "-c", FRESH, str(path), device, str(folder / "batch.npz")]
    ran = subprocess.run(  # noqa: S603 - this interpreter
        words, capture_output=True, text=True, timeout=300, check=False
    )
    if ran.returncode:
        print(ran.stderr[-2000:], flush=True)
        return None
    return float(ran.stdout.split()[-1])


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="resnet20, vit, minilm")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="a folder for results, in place of benchmarks/results")
    parser.add_argument("--assets", default="out/minilm.pt", help="of MiniLM, packed")
    parser.add_argument(
        "--work", default="out/gpu_compress", help="a folder for files and the cache"
    )
    parser.add_argument("--pack", help="write MiniLM's assets to this file, and end")
    options = parser.parse_args()
    if options.pack:
        pack(Path(options.pack))
        return
    makers: dict[str, Callable[[], Subject]] = {
        "resnet20": resnet20,
        "vit": lambda: vit(options.device),
        "minilm": lambda: minilm(Path(options.assets)),
    }
    for name in options.names:
        folder = Path(options.work) / name
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows_of(name, makers[name](), options.device, folder, {}):
            print(row, flush=True)
            where = {"folder": Path(options.out)} if options.out else {}
            record.append(NAME, [row], seed=0, settings=vars(options), **where)


if __name__ == "__main__":
    main()
