"""Detectors in two parts: a small one of our own, made like those of torchvision, without its ops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.build.reference import GraphExecutable
from tersor.capture.detector import Detector, split_detector
from tersor.capture.module import capture, evaluation_mode
from tersor.capture.samples import collect, varying
from tersor.core.data import Data
from tersor.core.errors import DataError
from tersor.runtime.runner import Runner
from tests.data.detectors import Backbone, OneStage, Proposals, Transform, TwoStages
from tests.unit.capturing import random, scale_error, trained

ROUNDINGS = 1e-5

DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "one stage": OneStage,
    "one level": lambda: OneStage(single=True),
    "two stages": TwoStages,
}
LISTS = [
    [random(3, 24, 40), random(3, 32, 30, seed=1)],
    [random(3, 40, 24, seed=2)],
    [random(3, 48, 48, seed=3)] * 2,
]


def core_of(detector: Detector) -> Runner:
    inputs = [detector.inputs(images) for images in LISTS]
    parts = collect(Data(calibration=inputs, search=inputs, test=inputs), 0, ragged=True)
    graph = capture(detector.core, parts["calibration"], varying(parts.values())).graph
    return Runner(GraphExecutable(graph), graph.signature, 2)


def same(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert list(one) == list(other)
        for key in other:
            assert one[key].shape == other[key].shape
            assert not other[key].numel() or scale_error(one[key], other[key]) <= ROUNDINGS


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_around_a_captured_core(name: str) -> None:
    model = trained(DETECTORS[name]())
    detector = split_detector(model)
    assert detector is not None
    attached = detector.attach(core_of(detector))
    counts = set()
    for images in [*LISTS, [random(3, 56, 40, seed=9), random(3, 20, 20, seed=8)]]:
        with torch.no_grad():
            wanted = model(images)
        same(attached(images), wanted)
        counts |= {len(row["boxes"]) for row in wanted}
    assert len(counts) > 2  # the number of boxes depends on the values


def test_the_answer_is_the_cores() -> None:
    model = trained(OneStage())
    detector = split_detector(model)
    assert detector is not None

    def nothing(images: Tensor) -> tuple[Tensor, ...]:
        *sizes, _, boxes = detector.core(images)
        return *sizes, -torch.ones(boxes.shape[:2]), boxes

    found = detector.attach(nothing)(LISTS[0])
    assert [len(row["boxes"]) for row in found] == [0, 0]


def test_the_model_is_not_changed() -> None:
    model = trained(TwoStages())
    model.train()
    modules = dict(model.named_modules())
    detector = split_detector(model)
    assert detector is not None

    def predict(images: Tensor) -> tuple[Tensor, ...]:
        with evaluation_mode(detector.core):
            return detector.core(images)

    attached = detector.attach(predict)
    first = attached(LISTS[0])
    same(attached(LISTS[0]), first)  # no dropout
    assert all(m.training for m in model.modules())
    assert dict(model.named_modules()) == modules
    model.eval()
    with torch.no_grad():
        same(first, model(LISTS[0]))


def test_features_that_nobody_reads_are_zeros_of_their_size() -> None:
    one, two = split_detector(trained(OneStage())), split_detector(trained(TwoStages()))
    assert one is not None
    assert two is not None
    images = one.inputs(LISTS[0])
    assert images.shape == (2, 3, 32, 40)
    sizes = one.core(images)
    assert [tuple(t.shape) for t in sizes[:2]] == [(2, 1, 8, 10), (2, 1, 4, 5)]
    assert not any(t.any() for t in sizes[:2])
    assert [tuple(t.shape) for t in two.core(images)[:2]] == [(2, 8, 8, 10), (2, 8, 4, 5)]
    assert len(two.core(images)) == 6


def test_a_core_of_another_detector_is_refused() -> None:
    one, two = split_detector(trained(OneStage())), split_detector(trained(TwoStages()))
    assert one is not None
    assert two is not None
    with pytest.raises(DataError, match="core gave 6 tensors, wanted 4; attach a core"):
        one.attach(two.core)(LISTS[0])


def test_inputs_that_are_no_list_of_images() -> None:
    detector = split_detector(trained(OneStage()))
    assert detector is not None
    with pytest.raises(DataError, match=r"found Tensor, wanted .* a list of images"):
        detector.inputs(random(3, 8, 8))
    with pytest.raises(DataError, match="list of images"):
        detector.inputs([random(8, 8)])


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform, self.backbone, self.rpn = Transform(), Backbone(), Proposals()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Backbone(), Headless(), 3])
def test_what_is_no_detector(model: Any) -> None:
    assert split_detector(model) is None
