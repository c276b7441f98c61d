"""Detectors: what is a graph is captured, what depends on the data stays in Python.

A detector resizes and pads a list of images, computes features and raw predictions, and then
picks boxes, whose number depends on the values. The middle part is nearly all of the time: it
becomes ``core``. Around it the caller's own code runs on, with the backbone and the head replaced
by what the (compressed) core gave.

Found by attributes: ``transform`` and ``backbone``, and a ``head`` that reads the features alone,
or ``rpn.head`` and ``roi_heads``, which read pooled features and stay as they are.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.capture.structures import describe
from tersor.core.errors import DataError
from tersor.core.records import Structure
from tersor.core.structure import count_leaves, unflatten

CORE_PARAMETERS = ("images",)  # of Core.forward: what a core's signature shows


@dataclass(frozen=True, slots=True)
class Detector:
    """A detector in two parts.

    Attributes:
        model: The caller's, not changed.
        core: Images [n, c, h, w] -> features and raw predictions as one flat tuple of tensors.
    """

    model: nn.Module
    core: "Core"

    def inputs(self, images: Any) -> Tensor:
        """What the core gets for a list of images: resized, padded and stacked by the model.

        Raises:
            DataError: No list of images [channels, height, width].
        """
        if not _are_images(images):
            raise DataError(
                f"data: found {type(images).__name__}, wanted what a detector takes: a list of "
                "images [channels, height, width]"
            )
        transform = _shell(self.model.transform)  # type: ignore[arg-type]
        with torch.no_grad():
            batch, _ = transform(list(images), None)
        tensors = batch.tensors
        assert isinstance(tensors, Tensor)
        return tensors

    def attach(self, predict: Callable[[Tensor], Any]) -> "Attached":
        """A function like the original around another core.

        Args:
            predict: Called like ``core``; gives its tensors in the same order.
        """
        return Attached(self.model, self.core, predict)


class Intake:
    """Items of the caller's data as inputs of a detector's core.

    A model may have the parts of a detector and be none, so what is no list of images is passed
    on as it is, and counted.

    Args:
        detector: In two parts.
        to_inputs: The caller's own function of an item.
    """

    def __init__(self, detector: Detector, to_inputs: Callable[[Any], Any] | None) -> None:
        self._detector = detector
        self._to_inputs = to_inputs
        self.taken = 0

    def __call__(self, item: Any) -> Any:
        """What the core takes."""
        images = item if self._to_inputs is None else self._to_inputs(item)
        if not _are_images(images):
            return images
        self.taken += 1
        return self._detector.inputs(images)


def split_input(model: Any, item: Any) -> tuple[Any, Any]:
    """A detector's core with its input for a list of images; other models and items as they are."""
    detector = split_detector(model)
    if detector is None or not _are_images(item):
        return model, item
    return detector.core, detector.inputs(item)


def _are_images(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(image, Tensor) and image.dim() == 3 for image in value)
    )


def split_detector(model: Any) -> Detector | None:
    """The two parts of a detector; None where the model is not made like one."""
    if not isinstance(model, nn.Module):
        return None
    transform, backbone = getattr(model, "transform", None), getattr(model, "backbone", None)
    head, reads_features = getattr(model, "head", None), False
    if head is None:
        head = getattr(getattr(model, "rpn", None), "head", None)
        reads_features = True
        if not isinstance(getattr(model, "roi_heads", None), nn.Module):
            return None
    parts = (transform, backbone, head)
    if not all(isinstance(part, nn.Module) for part in parts):
        return None
    return Detector(model, Core(backbone, head, reads_features=reads_features))  # type: ignore[arg-type]


class Core(nn.Module):
    """Backbone and head: a pure function of the stacked images.

    Args:
        backbone: Images -> features, as a tensor or by name.
        head: List of features -> nested raw predictions.
        reads_features: What follows reads the values of the features. Else it reads their sizes
            only, and gets zeros of one channel: widths of features that nobody reads stay free.
            They are integers, because only float outputs count when outputs are compared.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, *, reads_features: bool) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.reads_features = reads_features

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features (or zeros of their size), then the leaves of the head's output."""
        features, raw = self.parts(images)
        leaves: list[Tensor] = []
        describe(features, leaves)
        describe(raw, leaves)
        return tuple(leaves)

    def parts(self, images: Tensor) -> tuple[Any, Any]:
        """Nested features and nested raw predictions."""
        features = self.backbone(images)
        by_level = list(features.values()) if isinstance(features, Mapping) else [features]
        raw = self.head(by_level)
        return (features if self.reads_features else _each(features, _size_only)), raw


def _each(features: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A function of the features, which are a tensor, or tensors by name."""
    if isinstance(features, Mapping):
        return OrderedDict((k, _each(v, function)) for k, v in features.items())
    return function(features)


def _size_only(features: Tensor) -> Tensor:
    shape = (features.shape[0], 1, *features.shape[2:])
    return features.new_zeros(shape, dtype=torch.int32)


class Attached:
    """Callable like the original detector; calls from several threads run one after the other.

    ``core`` is what runs in the place of the original's core.

    Raises:
        DataError: The core gave another number of tensors than the original's.
    """

    def __init__(self, model: nn.Module, core: Core, predict: Callable[[Tensor], Any]) -> None:
        self._original = core
        self.core = predict
        self._nesting: Structure | None = None
        self._lock = threading.Lock()
        self._backbone, self._head = _Given(self._run), _Given(lambda _: self._raw)
        self._raw: Any = None
        given: dict[int, nn.Module] = {
            id(core.backbone): self._backbone,
            id(core.head): self._head,
        }
        self._shell = _shell(model, given)

    def __call__(self, images: Any) -> Any:
        """Detections for a list of images."""
        with self._lock, torch.no_grad():
            return self._shell(images)

    def _run(self, images: Tensor) -> Any:
        leaves: list[Tensor] = []
        describe(self.core(images), leaves)
        nesting = self._nested(images)
        if len(leaves) != count_leaves(nesting):
            raise DataError(
                f"the detector's core gave {len(leaves)} tensors, wanted {count_leaves(nesting)}; "
                "attach a core that was compressed from this detector"
            )
        features, self._raw = unflatten(nesting, leaves)
        if self._original.reads_features:
            return features
        return _each(features, lambda size: size.to(images.dtype))

    def _nested(self, images: Tensor) -> Structure:
        """How the core's tensors nest, from one run of the original on the first image."""
        if self._nesting is None:
            core = _shell(self._original)
            assert isinstance(core, Core)
            self._nesting = describe(core.parts(images[:1]), [])
        return self._nesting


class _Given(nn.Module):
    """A module in the place of another."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self._function = function
        self.eval()

    def forward(self, value: Any) -> Any:
        return self._function(value)


def _shell(module: nn.Module, given: dict[int, nn.Module] | None = None) -> nn.Module:
    """The same module tree in evaluation mode, tensors shared, with some modules replaced."""
    known = dict(given or {})

    def copied(one: nn.Module) -> nn.Module:
        if id(one) not in known:
            twin = copy.copy(one)
            known[id(one)] = twin
            twin.__dict__["_modules"] = {
                name: None if child is None else copied(child)
                for name, child in one._modules.items()  # noqa: SLF001
            }
            twin.training = False
        return known[id(one)]

    return copied(module)
