"""What the search sees of a plan, seen once: a run that goes on finds it in the store."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tersor.api import looking
from tersor.api.looking import Looks
from tersor.api.proposing import Offers, propose
from tersor.api.quality import Quality
from tersor.api.session import Session, Settings, open_session
from tersor.core.data import Data
from tersor.core.records import Level
from tersor.core.target import Target
from tests.data.zoo import load_fashion, load_lenet5

SAMPLES = 80
TARGET = Target(drop_points=1.0)


def opened(folder: Path, metric: Any = None) -> Session:
    train, test = load_fashion()
    data = Data(
        calibration=[train.images[:64]],
        search=[test.images[:SAMPLES]],
        test=[test.images[100:140]],
        output="logits",
    )
    settings = Settings(
        backend="openvino", methods=("quantize",), cache_dir=folder, progress=False, metric=metric
    )
    return open_session(load_lenet5(), data, settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return opened(folder)


@pytest.fixture(scope="module")
def offered(session: Session) -> Offers:
    return propose(session)


def plan(offered: Offers, *int8: str) -> dict[str, Level]:
    return {site: "int8" if site in int8 else "f32" for site in offered.by_site()}


def looks(session: Session, offered: Offers) -> Looks:
    return Looks(session, offered, Quality(session, TARGET), "stamp")


def test_a_share_is_the_beginning_of_the_whole(session: Session, offered: Offers) -> None:
    seen = looks(session, offered)
    one = plan(offered, "c2")
    few, half, whole = (seen.changes(one, share) for share in (0.25, 0.5, 1.0))
    assert 0 < len(few) < len(half) < len(whole) == SAMPLES
    assert (whole[: len(few)] == few).all()
    assert (whole[: len(half)] == half).all()
    assert (seen.changes(one, 0.25) == few).all()
    # The mean is that of a pass over all samples at once, whatever the order.
    graph = looking.stitched(session, offered, one)
    assert whole.mean() == pytest.approx(seen.quality.error(graph), rel=1e-6)


def test_what_was_seen_is_not_run_again(
    session: Session, offered: Offers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, plans = looks(session, offered), [plan(offered, "c1"), plan(offered, "c1", "f1")]
    before = [(first.evaluate(p), first.changes(p, 0.5).tolist()) for p in plans]
    noise = first.noise(*plans)

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished look was repeated")

    monkeypatch.setattr(looking, "stitched", refuse)
    again = looks(opened(folder), offered)
    assert [(again.evaluate(p), again.changes(p, 0.5).tolist()) for p in plans] == before
    assert again.noise(*plans) == noise
    assert again.clock() == pytest.approx(first.clock(), rel=1e-9)
    assert again.clock() > 0
    with pytest.raises(AssertionError, match="repeated"):
        again.changes(plans[0], 1.0)


def test_noise_is_the_standard_error_of_the_difference(session: Session, offered: Offers) -> None:
    seen = looks(session, offered)
    one, other = plan(offered), plan(offered, "c1", "c2", "f1", "f2")
    assert seen.noise(one, other) == 0.0  # not evaluated: nothing is known
    off = seen.evaluate(other) - seen.evaluate(one)
    n_differ = round(abs(off) / 100 * SAMPLES)
    assert seen.noise(one, one) == 0.0
    if n_differ:
        assert seen.noise(one, other) >= 100 * np.sqrt(n_differ) / SAMPLES * 0.9


def test_noise_of_a_metric_comes_from_the_classes_that_it_asked_for(tmp_path: Path) -> None:
    _, test = load_fashion()
    images, labels = test.images[:SAMPLES], test.labels[:SAMPLES]

    def accuracy(predict: Any) -> float:
        return float((predict(images).argmax(1) == labels).double().mean())

    quality = Quality(opened(tmp_path, accuracy), TARGET)
    one, other = np.zeros(SAMPLES), np.zeros(SAMPLES)
    other[:5] = 1
    # Five of eighty classes differ, in points.
    assert quality.noise(one, other) == pytest.approx(100 * np.sqrt(5 / SAMPLES / SAMPLES))
    _, marks = quality.seen(quality.session.graph)
    assert marks is not None
    assert marks.shape == (SAMPLES,)
    assert set(marks) <= set(range(10))
