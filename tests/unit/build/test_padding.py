"""Padding is tried, not assumed: what masks it passes, everything else is refused."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.build.build import build
from tersor.build.padding import EXACT, padding_error, resized
from tersor.build.reference import GraphExecutable
from tersor.capture.module import capture
from tersor.capture.samples import Call, Samples, varying
from tersor.core.errors import BackendError, ParityError
from tersor.core.records import BackendInfo, Bucket, BuildChoice, Candidate, Structure, Support
from tersor.graph.contracts import Graph
from tests.unit.capturing import random, trained

LONGEST = 12


class Attention(nn.Module):
    """One head over the real places, and the answer at the best of them."""

    def __init__(self, *, is_masked: bool = True, is_best: bool = False) -> None:
        super().__init__()
        self.is_masked, self.is_best = is_masked, is_best
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        seen = mask[:, None, :].bool() if self.is_masked else None
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        mean = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return (y, mean, x[..., 0].argmax(1)) if self.is_best else (y, mean)


def flat(length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(4, length)
    mask[-1, length - 1 :] = 0
    return random(4, length, 8, seed=length), mask


GROUPS = [flat(n) for n in (LONGEST, 9, 7, 4)]


def graph_of(model: nn.Module) -> Graph:
    leaves = (Structure(kind="tensor"),) * 2
    call = Call(Structure(kind="tuple", children=leaves), Structure(kind="dict"))
    samples = Samples(call, GROUPS[0], tuple(GROUPS[1:]))
    return capture(trained(model), samples, varying([samples])).graph


def choice(*pairs: tuple[int, int]) -> BuildChoice:
    buckets = [Bucket(sizes={"length_1": n}, least={"length_1": low}) for low, n in pairs]
    return BuildChoice(backend="torch", batch=4, shapes="padded", buckets=tuple(buckets))


PADDED = choice((3, 7), (8, LONGEST))


def test_what_is_masked_changes_nothing() -> None:
    error = padding_error(graph_of(Attention()), PADDED, GROUPS)
    assert 0 < error < EXACT * 1e-6  # float32 sums in another order; 0: nothing was padded


def test_what_is_not_masked_is_found_out() -> None:
    graph = graph_of(Attention(is_masked=False))
    assert padding_error(graph, PADDED, GROUPS) > 1e-3
    assert padding_error(graph, PADDED, [GROUPS[0], GROUPS[2]]) == 0  # at their buckets' sizes


def test_integers_have_to_be_the_same() -> None:
    """The best place of all: zeros behind the end can be it."""
    graph = graph_of(Attention(is_best=True))
    above = [(x.abs(), mask) for x, mask in GROUPS]
    assert padding_error(graph, PADDED, above) < EXACT
    assert padding_error(graph, PADDED, [(-x, mask) for x, mask in above]) == math.inf


def test_an_output_that_is_not_cut_back_is_another_shape() -> None:
    """Its specification does not say that it follows the length."""
    graph = graph_of(Attention())
    outputs = tuple(replace(spec, dynamic=()) for spec in graph.signature.outputs)
    silent = replace(graph, signature=replace(graph.signature, outputs=outputs))
    assert padding_error(silent, PADDED, [GROUPS[0]]) == 0
    assert padding_error(silent, PADDED, [GROUPS[1]]) == math.inf


def test_samples_at_other_sizes() -> None:
    graph = graph_of(Attention())
    x, mask = flat(5)
    short = resized((x, mask), graph.signature, {"length_1": 3})
    assert torch.equal(short[0], x[:, :3])
    assert torch.equal(short[1], mask[:, :3])
    longer = resized((x, mask), graph.signature, {"length_1": 7})
    assert torch.equal(longer[0], torch.cat([x, x[:, :2]], dim=1))


@dataclass
class Torch:
    """A backend that runs the graph; it remembers for which sizes it was asked."""

    asked: list[Any]
    change: float = 0.0
    at_size: int = 0

    def describe(self) -> BackendInfo:
        return BackendInfo(name="torch", available=True)

    def supports(self, candidate: Candidate) -> Support:
        return Support(ok=candidate.level == "f32")

    def build(self, graph: Graph, shapes: Any, choice: BuildChoice) -> "Built":
        del shapes, choice
        return Built(self, GraphExecutable(graph), 0)

    def load(self, sections: Any, choice: BuildChoice) -> "Built":
        raise BackendError(f"{choice.backend} keeps nothing: {sections}")


@dataclass
class Built:
    backend: Torch
    graph: GraphExecutable
    size: int

    def at(self, shapes: Any) -> "Built":
        return Built(self.backend, self.graph, shapes["x"][1])

    def run(self, inputs: Any) -> Any:
        self.backend.asked.append((self.size, inputs["x"].shape[1]))
        found = self.graph.run(inputs)
        if self.size and self.size == self.backend.at_size:
            return {name: a * (1 + self.backend.change) for name, a in found.items()}
        return found

    def profile(self) -> dict[str, float]:
        return {}

    def serialize(self) -> dict[str, bytes]:
        return {}


def test_every_bucket_is_compared_with_the_graph() -> None:
    graph = graph_of(Attention())
    backend = Torch([])
    built = build(graph, backend, PADDED, GROUPS[0], GROUPS[3:])
    assert built.difference < EXACT
    # The given groups; then both buckets, each full and at its most padding.
    assert backend.asked == [(12, 12), (7, 7), (7, 7), (7, 7), (12, 12), (12, 12)]
    for size in (7, 12):
        wrong = Torch([], change=0.01, at_size=size)
        with pytest.raises(ParityError, match=r"padded to 7 \| 12 build differs from its graph"):
            build(graph, wrong, PADDED, GROUPS[0])


def test_a_model_that_padding_changes_is_not_built_padded() -> None:
    graph = graph_of(Attention(is_masked=False))
    with pytest.raises(ParityError, match="differs from its graph"):
        build(graph, Torch([]), PADDED, GROUPS[0])
