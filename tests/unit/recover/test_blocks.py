"""Recovery: closer to the original, never worse, the same with a seed, and on behind a stop."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.core.recovery import Recover
from tersor.graph.apply import apply
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.axes.matching import counterparts
from tersor.graph.axes.slicing import gone_from
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import parameters_by_name
from tersor.graph.frontiers import BlockSize
from tersor.graph.geometry import output_error
from tersor.recover.blocks import Hooks, Progressed, Reconstructed, part_count, reconstruct
from tersor.recover.goals import Teacher
from tests.unit.capturing import graph_of, random, site_of, trained

QUICK = Recover(steps=30, batch=16)
SIZE = BlockSize(least=2)  # the stem with the first residual block, the second, the classifier


class Residual(nn.Module):
    """A stem, two blocks, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(6, 8, 3, padding=1) for _ in range(2)])
        self.down = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=1) for _ in range(2)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for up, down in zip(self.up, self.down, strict=True):
            x = (x + down(up(x).relu())).relu()
        return self.head(x.mean((2, 3)))


class Reader(nn.Module):
    """One layer of attention over masked tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        x = self.layer(x, src_key_padding_mask=attention_mask == 0)
        return self.head(x[:, 0])


def batches_of(images: Tensor, size: int = 16) -> list[tuple[Tensor, ...]]:
    return [(images[i : i + size],) for i in range(0, len(images), size)]


@pytest.fixture(scope="module")
def original() -> Graph:
    return graph_of(trained(Residual()), random(4, 1, 6, 6))


@pytest.fixture(scope="module")
def cut(original: Graph) -> tuple[Teacher, Graph]:
    axes = analyse_axes(original)
    keep = {"up.0": [0, 2, 4, 6], "up.1": [1, 2, 3], "stem": [0, 1, 2, 4]}
    small = keep_units(original, axes, keep)
    known = counterparts(axes, axes.removed(gone_from(axes, keep)))
    return Teacher(graph=original, kind="logits", counterparts=known), small


@pytest.fixture(scope="module")
def images() -> list[tuple[Tensor, ...]]:
    return batches_of(random(136, 1, 6, 6, seed=3))


def run(
    cut: tuple[Teacher, Graph],
    images: Sequence[tuple[Tensor, ...]],
    config: Recover = QUICK,
    seed: int = 0,
    **more: object,
) -> Reconstructed:
    return reconstruct(*cut, images, config, seed=seed, size=SIZE, **more)  # type: ignore[arg-type]


def same_tensors(one: Graph, other: Graph) -> bool:
    left, right = (parameters_by_name(g.module) for g in (one, other))
    return left.keys() == right.keys() and all(torch.equal(t, right[n]) for n, t in left.items())


def error(found: Graph, wanted: Graph, flat: tuple[Tensor, ...]) -> float:
    return float(output_error(found.run(flat), wanted.run(flat), "logits").mean())


def test_a_cut_graph_comes_closer_on_new_samples(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    before = {n: t.clone() for n, t in parameters_by_name(cut[1].module).items()}
    found = run(cut, images)
    new = (random(64, 1, 6, 6, seed=9),)
    assert error(found.graph, cut[0].graph, new) < 0.5 * error(cut[1], cut[0].graph, new)
    record = found.recovery
    assert record.is_kept
    assert record.after < record.before
    assert (record.samples, record.held_out) == (120, 16)
    assert [p.part for p in record.parts] == ["moments"] + ["block"] * 3 + ["whole"]
    assert all(p.after <= p.before for p in record.parts)
    assert record.steps == 4 * 30
    assert part_count(cut[1], cut[0], SIZE) == 5
    stored = parameters_by_name(cut[1].module)
    assert all(torch.equal(t, stored[n]) for n, t in before.items())  # what was given stays


def test_samples_that_lie_apart_decide(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    """Where they say that nothing is gained, nothing is kept, however well the others are fitted."""
    found = run(cut, images[:6], apart=images[6:])
    assert (found.recovery.samples, found.recovery.held_out) == (96, 40)
    assert found.recovery.is_kept
    strange = [(100.0 * random(16, 1, 6, 6, seed=5),)]
    wild = run(cut, images[:6], replace(QUICK, whole=0.0), apart=strange)
    record = wild.recovery
    assert record.held_out == 16
    new, wanted = wild.graph.run(strange[0]), cut[0].graph.run(strange[0])
    assert float(output_error(new, wanted, "logits").mean()) == pytest.approx(
        record.after, rel=1e-4
    )
    assert record.after <= record.before


def test_the_same_seed_gives_the_same_tensors(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    one, other, third = (run(cut, images, seed=s) for s in (0, 0, 1))
    assert same_tensors(one.graph, other.graph)
    assert not same_tensors(one.graph, third.graph)


def test_a_stop_after_any_part_changes_nothing(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    kept: list[Progressed] = []

    def keep(done: Progressed) -> None:
        kept.append(replace(done, tensors={n: t.clone() for n, t in done.tensors.items()}))

    whole = run(cut, images, hooks=Hooks(keep=keep))
    assert [len(done.parts) for done in kept] == [1, 2, 3, 4, 5]
    for done in kept:
        again = run(cut, images, done=done)
        assert same_tensors(again.graph, whole.graph)
        assert again.recovery.parts == whole.recovery.parts


def test_what_does_not_help_is_undone(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    wild = run(cut, images, replace(QUICK, rate=1.0, steps=3))
    assert wild.recovery.after <= wild.recovery.before
    right = reconstruct(
        Teacher(graph=cut[0].graph, kind="logits"), cut[0].graph, images, QUICK, seed=0
    )
    assert right.graph is cut[0].graph  # nothing is closer to the original than itself
    assert not right.recovery.is_kept
    assert right.recovery.steps == 0
    assert "no closer" in right.recovery.reason


def test_steps_that_are_far_too_large_become_smaller(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    """A full step changes each weight by its own size: without smaller ones nothing is gained."""
    found = run(cut, images, Recover(steps=60, batch=16, rate=1.0, whole=0.0))
    assert found.recovery.is_kept
    blocks = found.recovery.parts
    assert sum(p.after < 0.9 * p.before for p in blocks) >= 2


def test_time_is_the_caller_s_clock(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    now = iter(range(10**6))

    def clock() -> float:
        return float(next(now))

    found = run(cut, images, Recover(seconds=300, batch=16), hooks=Hooks(clock=clock))
    assert 100 < found.recovery.seconds <= 330  # of one tick a look at the clock
    assert found.recovery.steps > 50
    late = run(cut, images, Recover(seconds=1, batch=16), hooks=Hooks(clock=clock))
    assert late.recovery.steps <= 2


def test_layers_that_are_fixed_stay(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    (head,) = [n for n in cut[1].module.graph.nodes if str(n.target) == "aten.linear.default"]
    found = run(cut, images, fixed={head.name})
    before, after = (parameters_by_name(g.module) for g in (cut[1], found.graph))
    same = {n for n, t in before.items() if torch.equal(t, after[n])}
    assert same == {"head.weight", "head.bias"}


def test_one_batch_leaves_nothing_to_check_on(
    cut: tuple[Teacher, Graph], images: list[tuple[Tensor, ...]]
) -> None:
    found = run(cut, images[:1])
    assert found.graph is cut[1]
    assert "one batch" in found.recovery.reason


def int8(graph: Graph, name: str, low: float = -1.0) -> SiteChange:
    """An op with 4-bit codes in int8, coarse enough to leave something to recover."""
    site = site_of(graph, name)
    weight = parameters_by_name(graph.module)[f"{name}.weight"]
    scale = weight.reshape(len(weight), -1).abs().amax(1) / 7
    rows = scale.reshape(-1, *[1] * (weight.dim() - 1))
    quantizer = Quantizer(step=0.1, low=0 if low >= 0 else -128, high=255 if low >= 0 else 127)
    return SiteChange(
        site=site,
        level="int8",
        codes=(weight / rows).round().to(torch.int8),
        scale=scale,
        quantizer=quantizer,
    )


def test_codes_stay_and_scales_move(original: Graph, images: list[tuple[Tensor, ...]]) -> None:
    rounded = apply(original, [int8(original, "up.0"), int8(original, "down.1")])
    teacher = Teacher(graph=original, kind="logits")
    found = reconstruct(teacher, rounded, images, QUICK, seed=0)
    assert found.recovery.is_kept
    assert found.recovery.what == "rounded"
    before, after = (parameters_by_name(g.module) for g in (rounded, found.graph))
    moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert "up.0.weight_scale" in moved
    assert not any(n.endswith("_codes") for n in moved)
    assert bool((after["up.0.weight_scale"] > 0).all())
    new = (random(64, 1, 6, 6, seed=9),)
    assert error(found.graph, original, new) < error(rounded, original, new)


def shifted(graph: Graph, name: str, change: Callable[[Tensor], Tensor]) -> Graph:
    return apply(
        graph,
        [SiteChange(site=site_of(graph, name), level="f32",
                    weight=change(parameters_by_name(graph.module)[f"{name}.weight"]))],
    )  # fmt: skip


def test_masked_tokens_of_several_lengths() -> None:
    generator = torch.Generator().manual_seed(0)

    def batch(length: int) -> tuple[Tensor, ...]:
        mask = torch.ones(8, length, dtype=torch.int64)
        mask[::2, length // 2 :] = 0
        return torch.randint(0, 11, (8, length), generator=generator), mask

    model = trained(Reader())
    graph = graph_of(model, *batch(6))
    hurt = shifted(graph, "layer.linear1", lambda w: 0.5 * w)
    teacher = Teacher(graph=graph, kind="values")
    found = reconstruct(
        teacher, hurt, [batch(6) for _ in range(10)], Recover(steps=40, batch=8), seed=0
    )
    assert found.recovery.is_kept
    assert found.recovery.after < 0.5 * found.recovery.before
