"""A build must compute what its graph computes: the limit, with a backend that lies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tersor.build.build import build, parity, shapes_of
from tersor.build.reference import GraphExecutable
from tersor.core.errors import BackendError, ParityError
from tersor.core.records import BackendInfo, BuildChoice, Candidate, Support
from tersor.graph.apply import apply
from tersor.graph.contracts import Backend, Executable, Graph, Quantizer, Shapes, SiteChange
from tests.unit.capturing import graph_of, random, site_of, trained

Arrays = dict[str, NDArray[Any]]
CHOICE = BuildChoice(backend="fake", batch=2)


@dataclass
class Fake:
    """Runs the graph in torch and changes what comes out."""

    change: Callable[[NDArray[Any]], NDArray[Any]] = lambda y: y
    shapes: list[Shapes] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def describe(self) -> BackendInfo:
        return BackendInfo(name="fake", available=True)

    def supports(self, candidate: Candidate) -> Support:
        return Support(ok=candidate.level == "f32")

    def build(self, graph: Graph, shapes: Shapes, choice: BuildChoice) -> Executable:
        if choice.threads > 1:
            raise BackendError("one thread only")
        self.shapes.append(shapes)
        return _Executable(self, GraphExecutable(graph))

    def load(self, sections: Mapping[str, bytes], choice: BuildChoice) -> Executable:
        raise BackendError(f"{choice.backend} keeps nothing: {sorted(sections)}")


@dataclass
class _Executable:
    backend: Fake
    graph: GraphExecutable

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self.backend.batches.append(len(next(iter(inputs.values()))))
        found = self.graph.run(inputs)
        return {k: self.backend.change(v) if v.dtype == np.float32 else v for k, v in found.items()}

    def profile(self) -> dict[str, float]:
        return {}

    def serialize(self) -> dict[str, bytes]:
        return {}


class Two(nn.Module):
    """Outputs of very different sizes, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.a(x)
        return y, y.sum(1) * 1000, y.argmax(1)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(trained(Two()), random(4, 4))


@pytest.fixture(scope="module")
def quantized(graph: Graph) -> Graph:
    change = SiteChange(
        site=site_of(graph, "a"),
        level="int8",
        codes=torch.ones(6, 4, dtype=torch.int8),
        scale=torch.ones(6),
        quantizer=Quantizer(step=0.02, low=-128, high=127),
    )
    return apply(graph, [change])


FLAT = (random(7, 4, seed=3),)


def relative(error: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """A normalised squared error of this size, in every output."""
    return lambda y: y * np.float32(1 + error**0.5)


def test_an_honest_build_passes(graph: Graph) -> None:
    backend = Fake()
    assert isinstance(backend, Backend)
    built = build(graph, backend, CHOICE, FLAT)
    assert built.difference == 0
    assert built.choice is CHOICE
    assert backend.shapes == [{"x": (2, 4)}]
    assert backend.batches == [2, 2]  # four samples at the built batch
    assert shapes_of(graph.signature, 5) == {"x": (5, 4)}


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_samples_fill_the_built_batch(graph: Graph, batch: int) -> None:
    backend = Fake()
    build(graph, backend, BuildChoice(backend="fake", batch=batch), (FLAT[0][:2],))
    assert set(backend.batches) == {batch}


@pytest.mark.parametrize(
    ("precision", "is_quantized", "limit"),
    [("f32", False, 1e-6), ("bf16", False, 1e-2), ("f32", True, 1e-2)],
)
def test_the_limit(
    graph: Graph, quantized: Graph, precision: Any, is_quantized: bool, limit: float
) -> None:
    choice = BuildChoice(backend="fake", batch=2, precision=precision)
    used = quantized if is_quantized else graph
    found = build(used, Fake(relative(limit * 0.8)), choice, FLAT)
    assert found.difference == pytest.approx(limit * 0.8, rel=0.05)
    with pytest.raises(ParityError, match=f"fake {precision}.*wanted at most {limit:g}"):
        build(used, Fake(relative(limit * 1.2)), choice, FLAT)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_never_pass(graph: Graph, value: float) -> None:
    def spoil(y: NDArray[Any]) -> NDArray[Any]:
        y = y.copy()
        y.reshape(-1)[-1] = value
        return y

    with pytest.raises(ParityError, match="differs from its graph"):
        build(graph, Fake(spoil), BuildChoice(backend="fake", precision="bf16", batch=2), FLAT)


def test_the_worst_output_counts(graph: Graph) -> None:
    backend = Fake(lambda y: y if y.ndim == 2 else y * np.float32(1.1))
    executable = backend.build(graph, shapes_of(graph.signature, 2), CHOICE)
    assert parity(graph, executable, 2, FLAT) == pytest.approx(0.01, rel=1e-3)


def test_another_sample_order_does_not_pass(graph: Graph) -> None:
    with pytest.raises(ParityError):
        build(graph, Fake(lambda y: y[::-1].copy()), CHOICE, FLAT)


def test_what_the_backend_says_goes_through(graph: Graph) -> None:
    with pytest.raises(BackendError, match="one thread only"):
        build(graph, Fake(), BuildChoice(backend="fake", threads=2), FLAT)


def test_the_reference_takes_arrays_by_name(graph: Graph) -> None:
    found = GraphExecutable(graph).run({"x": FLAT[0].numpy()[::-1]})  # not contiguous
    names = [spec.name for spec in graph.signature.outputs]
    assert list(found) == names
    wanted = graph.run([FLAT[0].flip(0)])
    assert all(np.array_equal(found[n], t.numpy()) for n, t in zip(names, wanted, strict=True))
