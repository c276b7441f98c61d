"""Inputs of several sizes, and detectors: compressed, saved and loaded through the public API."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api.judging import runner_for
from tersor.api.latency import measure_calls
from tersor.api.result import Result
from tersor.api.session import Settings, open_session
from tersor.api.stages import build_for
from tersor.capture.detector import split_detector
from tersor.core.errors import DataError
from tersor.core.records import BuildChoice, Timing
from tersor.price.price import PriceConfig
from tersor.timing.protocol import Protocol
from tests.conformance.zoo.torchvision_shim import import_torchvision
from tests.data.detectors import OneStage
from tests.e2e.helpers import error_of, quick_runs
from tests.unit.capturing import random, trained

LENGTHS = (5, 9, 9, 9, 14, 20)  # by how often they occur
LONGEST = 24
# Normalised squared error of a build: an int8 value between two codes may fall to either side.
ROUNDED = 1e-2
QUICK = Protocol(rounds=3, runs=3, max_seconds=3.0)


class Encoder(nn.Module):
    """Token embeddings, one residual block, and their mean over the real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.places = nn.Parameter(torch.zeros(LONGEST, 32))
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids) + self.places[: input_ids.shape[1]]
        x = x + self.down(self.up(x).relu())
        mask = attention_mask.unsqueeze(-1).float()
        return {"tokens": x, "mean": (x * mask).sum(1) / mask.sum(1)}


def sentence(count: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    return [sentence(2, LENGTHS[i % len(LENGTHS)], seed + i) for i in range(count)]


@pytest.fixture(scope="module")
def quick() -> Any:
    """Few builds and few runs: what is measured does not matter here."""
    with quick_runs(PriceConfig(k=3, k_mixed=6, held_out=1)):
        yield


TEST = sentences(24, 300)


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return trained(Encoder())


@pytest.fixture(scope="module")
def encoded(quick: None, encoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Result:
    del quick
    data = tersor.Data(
        calibration=sentences(30, 0), search=sentences(12, 200), test=TEST, output="values"
    )
    target = tersor.Target(size_ratio=2.0, drop_points=5.0)
    cache = tmp_path_factory.mktemp("sizes")
    return tersor.compress(
        encoder, data, target=target, methods="quantize", cache_dir=cache, progress=False
    )


@pytest.mark.parametrize("length", [2, 5, 9, 11, 20, LONGEST])
def test_any_length_within_the_limits(encoded: Result, encoder: nn.Module, length: int) -> None:
    inputs = sentence(3, length, seed=7)
    with torch.no_grad():
        wanted = encoder(**inputs)
    found = encoded.model(**inputs)
    assert list(found) == ["tokens", "mean"]
    assert found["tokens"].shape == (3, length, 32)
    assert 0 < error_of(found.values(), wanted.values()) <= ROUNDED
    assert error_of(found.values(), encoded.module(**inputs).values()) <= ROUNDED


def test_a_length_beyond_them_is_refused(encoded: Result) -> None:
    with pytest.raises(DataError, match=rf"\(length_1\): found size 25, wanted 2 to {LONGEST}"):
        encoded.model(**sentence(1, LONGEST + 1, seed=7))
    both = sentence(1, 9, seed=7) | {"attention_mask": torch.ones(1, 8, dtype=torch.long)}
    with pytest.raises(DataError, match="both are 'length_1'"):
        encoded.model(**both)


def test_the_verdict_is_over_all_lengths(encoded: Result, encoder: nn.Module) -> None:
    scores = []
    for length in sorted(set(LENGTHS)):
        rows = [item for item in TEST if item["input_ids"].shape[1] == length]
        inputs = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        with torch.no_grad():
            wanted = encoder(**inputs)
        scores.append([(encoded.model(**inputs)[k].double(), wanted[k].double()) for k in wanted])
    tokens = [one_minus_error(*pairs[0]) for pairs in scores]
    mean = one_minus_error(*(torch.cat([p[1][side] for p in scores]) for side in (0, 1)))
    # Groups differ in their token outputs, so the mean outputs are compared within them, too.
    means = [one_minus_error(*pairs[1]) for pairs in scores]
    agreement = (torch.cat(tokens) + torch.cat(means)) / 2
    assert len(mean) == len(agreement) == encoded.verdict.test_samples == 2 * len(TEST)
    assert encoded.verdict.agreement == pytest.approx(float(agreement.mean()), abs=1e-6)
    assert encoded.verdict.agreement_p5 < encoded.verdict.agreement < 1


def one_minus_error(found: Tensor, wanted: Tensor) -> Tensor:
    spread = (wanted - wanted.mean(0)).square().mean()
    return 1 - (found - wanted).square().flatten(1).mean(1) / spread


def test_a_saved_one_takes_any_length(encoded: Result, encoder: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "encoder.tersor"
    encoded.save(path)
    runner = tersor.load(path, guards=tersor.Guards())
    for length in (3, 20, LONGEST):
        inputs = sentence(2, length, seed=8)
        wanted = encoded.model(**inputs)
        assert all(torch.equal(runner(**inputs)[k], wanted[k]) for k in wanted)
    assert {c.status for c in tersor.verify(path, model=encoder).checks} <= {"pass", "unknown"}
    encoded.export(tmp_path / "encoder.xml")  # compared with the graph while it is written


def test_a_plan_is_carried_out_on_all_lengths(
    quick: None, encoded: Result, encoder: nn.Module, tmp_path: Path
) -> None:
    del quick
    data = tersor.Data(
        calibration=sentences(30, 0), search=sentences(12, 200), test=TEST, output="values"
    )
    again = tersor.apply_plan(encoder, data, encoded.plan, cache_dir=tmp_path, progress=False)
    assert again.verdict.agreement == pytest.approx(encoded.verdict.agreement, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_widths_are_cut_on_all_lengths(encoder: nn.Module, tmp_path: Path) -> None:
    data = tersor.Data(
        calibration=sentences(60, 0), search=sentences(12, 200), test=TEST, output="values"
    )
    target = tersor.Target(size_ratio=1.5, drop_points=30.0)
    result = tersor.compress(
        encoder, data, target=target, methods="prune", cache_dir=tmp_path, progress=False
    )
    widths = {site: n for site, n in result.plan.assignment.items() if site.startswith("width:")}
    assert min(widths.values()) < 128  # type: ignore[type-var]
    for length in (2, 9, LONGEST):
        inputs = sentence(3, length, seed=7)
        found, wanted = result.model(**inputs), result.module(**inputs)
        assert error_of(found.values(), wanted.values()) <= ROUNDED
    assert result.verdict.test_samples == 2 * len(TEST)
    assert result.verdict.agreement > 0.5  # of chance weights: no more than not broken


def test_latency_is_the_mean_over_the_sizes(
    encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tersor.Data(sentences(60, 0), output="values")
    session = open_session(encoder, data, Settings(cache_dir=tmp_path, progress=False, batch=3))
    ran: list[int] = []

    class Recorder:
        def run(self, inputs: Any) -> dict[str, Any]:
            assert {a.shape for a in inputs.values()} == {(3, inputs["input_ids"].shape[1])}
            ran.append(inputs["input_ids"].shape[1])
            return {}

        def profile(self) -> dict[str, float]:
            return {}

        def serialize(self) -> dict[str, bytes]:
            return {}

    session.caller(Recorder(), 3)()
    lengths = [int(flat[0].shape[1]) for flat in session.parts["calibration"].groups]
    shares = [len(flat[0]) / 72 for flat in session.parts["calibration"].groups]
    assert lengths == [20, 14, 9, 5]
    assert len(ran) == 8
    # A share to the next eighth, rounded to either side.
    assert all(abs(ran.count(n) / 8 - q) <= 1 / 8 for n, q in zip(lengths, shares, strict=True))
    whole = Timing(median_ms=8.0, low_ms=4.0, high_ms=16.0, rounds_ms=(6.0, 10.0), runs=5)
    monkeypatch.setattr("tersor.api.latency.measure", lambda calls, _: dict.fromkeys(calls, whole))
    found = measure_calls(session, {"a": list}, QUICK)["a"]
    assert (found.median_ms, found.low_ms, found.high_ms) == (1.0, 0.5, 2.0)
    assert (found.rounds_ms, found.runs) == ((0.75, 1.25), 5)


def test_a_model_of_one_size_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 3)).eval()
    data = [random(8, 3, 4), random(8, 3, 5)]
    with pytest.raises(DataError, match=r"comes in 2 shapes .* pad or crop to one shape"):
        tersor.compress(
            model, tersor.Data(data, output="values"), target="2x", cache_dir=tmp_path,
            progress=False,
        )  # fmt: skip


SIZES = ((24, 40), (32, 30), (40, 24))


def pictures(count: int, seed: int) -> list[list[Tensor]]:
    return [[random(3, *SIZES[(i + seed) % 3], seed=seed + i)] for i in range(count)]


def any_boxes(predict: Any) -> float:
    """Share of images in which something is found; called like a detector."""
    found = [predict(images) for images in pictures(4, 900)]
    return float(sum(len(row["boxes"]) > 0 for rows in found for row in rows)) / len(found)


def detected(model: nn.Module, data: Any, cache: Path) -> Result:
    target = tersor.Target(size_ratio=1.2, drop_points=30.0)
    return tersor.compress(
        model, data, target=target, metric=any_boxes, methods="quantize", cache_dir=cache,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return trained(OneStage())


@pytest.fixture(scope="module")
def found(quick: None, detector: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Result:
    del quick
    labelled = [(images, [{"boxes": random(1, 4)}]) for images in pictures(60, 0)]
    data = tersor.Data(labelled, to_inputs=lambda pair: pair[0], output="values")
    return detected(detector, data, tmp_path_factory.mktemp("detector"))


def near(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    """Nearly as many boxes; which one of two that overlap is kept hangs on their last digits."""
    pairs = zip(one, other, strict=True)
    return all(
        list(a) == list(b) and abs(len(a["boxes"]) - len(b["boxes"])) <= len(b["boxes"]) // 4
        for a, b in pairs
    )


def test_a_result_is_called_like_the_detector(found: Result, detector: nn.Module) -> None:
    for images in ([random(3, 24, 40), random(3, 48, 48, seed=1)], *pictures(3, 500)):
        with torch.no_grad():
            wanted = detector(images)
        assert any(len(row["boxes"]) > 4 for row in wanted)
        assert near(found.model(images), wanted)
    assert found.model.core.stats()["calls"] >= 4  # type: ignore[union-attr]
    verdict = found.verdict
    assert verdict.metric_original == verdict.metric_result == 1.0
    assert verdict.agreement < 1


def test_a_saved_core_is_attached_again(found: Result, detector: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "core.tersor"
    found.save(path)
    parts = split_detector(detector)
    assert parts is not None
    attached = parts.attach(tersor.load(path))
    images = [random(3, 24, 40), random(3, 48, 48, seed=1)]
    for one, other in zip(attached(images), found.model(images), strict=True):
        assert all(torch.equal(one[k], other[k]) for k in other)
    checks = {c.name: c for c in tersor.verify(path, model=detector).checks}
    assert checks["build against graph"].status == "pass"
    assert checks["agreement with the original"].found > 0.9


def test_a_detector_can_be_inspected(detector: nn.Module) -> None:
    seen = tersor.inspect(detector, [random(3, 24, 40)])
    assert {site.name for site in seen.sites} >= {"backbone.a", "head.boxes"}


class Straight(nn.Module):
    """Has the parts of a detector, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.backbone, self.head = nn.ReLU(), nn.Linear(12, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(self.transform(x)).relu())
        return y


@pytest.mark.usefixtures("quick")
def test_what_only_looks_like_a_detector(tmp_path: Path) -> None:
    model = trained(Straight())
    data = tersor.Data([random(60, 12)], output="values")
    rows = tersor.bench(model, data, cache_dir=tmp_path)
    assert {row.choice is None for row in rows} == {True, False}


def suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression as defined; torchvision's own kernel may be missing here."""
    kept: list[int] = []
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for i in scores.argsort(descending=True).tolist():
        low = torch.maximum(boxes[i, :2], boxes[kept, :2])
        high = torch.minimum(boxes[i, 2:], boxes[kept, 2:])
        shared = (high - low).clamp_min(0).prod(1)
        if not bool((shared / (area[i] + area[kept] - shared) > threshold).any()):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


@pytest.fixture
def make_detector(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Detectors of torchvision by name, with heads that answer something."""
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    detection = import_torchvision().models.detection
    boxes = import_torchvision().ops.boxes
    monkeypatch.setattr(boxes, "_assert_has_ops", lambda: None)
    monkeypatch.setattr(boxes, "nms", suppressed)

    def make(name: str, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(detection, name)(
            weights=None, weights_backbone=None, num_classes=4, score_thresh=0.0,
            detections_per_img=20, topk_candidates=50, **options,
        ).eval()  # fmt: skip
        for module in model.head.modules():  # type: ignore[union-attr]
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return model

    return make


PHOTOS = [[torch.rand(3, *((64, 96), (80, 64))[i % 2])] for i in range(12)]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_detector_of_torchvision_is_compressed(make_detector: Any, tmp_path: Path) -> None:
    model = make_detector("ssdlite320_mobilenet_v3_large")
    result = tersor.compress(
        model, tersor.Data(PHOTOS, output="values"), target=tersor.Target(size_ratio=1.5),
        methods="quantize", cache_dir=tmp_path, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        wanted = model(PHOTOS[0])
    got = result.model(PHOTOS[0])
    assert [list(row) for row in got] == [list(row) for row in wanted]
    assert [row["boxes"].shape for row in got] == [row["boxes"].shape for row in wanted]
    assert result.verdict.agreement > 0.9
    assert result.verdict.test_samples == 2


@pytest.mark.slow
def test_detections_of_one_build_at_several_image_sizes(make_detector: Any, tmp_path: Path) -> None:
    """Scores are the same to rounding; which of two equal ones comes first is not."""
    model = make_detector("retinanet_resnet50_fpn", min_size=96, max_size=128)
    settings = Settings(cache_dir=tmp_path, progress=False)
    session = open_session(model, tersor.Data(PHOTOS, output="values"), settings)
    assert len(session.parts["calibration"].groups) == 2
    built = build_for(session, session.graph, BuildChoice(backend="openvino"))
    attached = session.as_given(runner_for(session, built))
    for images in (PHOTOS[0], PHOTOS[1], [*PHOTOS[0], *PHOTOS[1]], [torch.rand(3, 96, 96)]):
        with torch.no_grad():
            wanted = model(images)
        for one, other in zip(attached(images), wanted, strict=True):
            assert len(other["scores"]) == 20
            assert torch.allclose(one["scores"], other["scores"], rtol=1e-3, atol=1e-5)
