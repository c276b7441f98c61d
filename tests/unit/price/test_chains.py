"""Prices of ranks: read off builds that had some, right at others, in products with widths."""

from collections.abc import Mapping, Sequence
from itertools import product as every

import numpy as np
import pytest

from tersor.core.rank_levels import RankLevel, is_eight_bit, rank_of
from tersor.core.records import BuildChoice, Candidate, Level, Site
from tersor.graph.facts import NodeFacts
from tersor.price.chains import middle, ranked
from tersor.price.facts import WidthFacts, learn_facts
from tersor.price.observation import Observation
from tersor.price.refuse import refused
from tersor.price.table import fit_table
from tersor.price.terms import size_terms
from tersor.price.variants import draw_variants, with_ranks

CHOICE = BuildChoice(backend="fake")
RANKS = (64, 48, 32, 16)
LEVELS: tuple[Level, ...] = (
    "f32", "int8", *(RankLevel.of(f, r) for f in ("f32", "int8") for r in RANKS)  # type: ignore[arg-type]
)  # fmt: skip
N, TOKENS, INNER = 4, 32, 256


def sites(*, widths: bool = False) -> tuple[Site, ...]:
    """Pairs of linear layers 128 -> 256 -> 128, with the width between as a site where asked for."""
    found: list[Site] = []
    for i in range(N):
        for name, shape in ((f"up{i}", (INNER, 128)), (f"down{i}", (128, INNER))):
            size = 4 * shape[0] * shape[1] + 4 * shape[0]
            found.append(
                Site(name=name, kind="format", ops=(f"op_{name}",), op_kind="linear", shape=shape,
                     tensor=f"x_{name}", size_bytes=size)
            )  # fmt: skip
    if widths:
        found += [
            Site(name=f"width:{i}", kind="width", ops=(f"op_down{i}",), units=INNER,
                 unit_kind="neurons") for i in range(N)
        ]  # fmt: skip
    return tuple(found)


def linear(inputs: int, outputs: int) -> NodeFacts:
    return NodeFacts(
        kind="linear",
        macs=TOKENS * inputs * outputs,
        weight_elements=inputs * outputs,
        in_elements=TOKENS * inputs,
        out_elements=TOKENS * outputs,
        inputs=inputs,
        outputs=outputs,
    )


def graph_facts(assignment: Mapping[str, Level]) -> dict[str, NodeFacts]:
    """What a graph of such layers would tell."""
    found: dict[str, NodeFacts] = {}
    for i in range(N):
        inner = assignment.get(f"width:{i}", INNER)
        assert isinstance(inner, int)
        for name, (inputs, outputs) in {f"up{i}": (128, inner), f"down{i}": (inner, 128)}.items():
            rank = rank_of(assignment.get(name))
            if rank:
                found[f"op_{name}_factor0"] = linear(inputs, rank)
            found[f"op_{name}"] = linear(rank or inputs, outputs)
    return found


def observation(assignment: Mapping[str, Level], *, held_out: bool = False) -> Observation:
    """Times of a machine: a call, MACs at a rate by format, and a quantiser's elements."""
    facts, node_ms = graph_facts(assignment), {"outside": 0.02}
    for name, f in facts.items():
        level = assignment.get(name.removeprefix("op_").removesuffix("_factor0"))
        node_ms[name] = 0.004 + f.macs * (2e-8 if is_eight_bit(level) else 6e-8)
        if is_eight_bit(level):
            node_ms[f"{name}_quantize"] = 0
            tensor = name if name.endswith("_factor0") else f"x_{name.removeprefix('op_')}"
            node_ms[f"{tensor}_quantize"] = 0.001 + 1e-7 * f.out_elements
    total = sum(node_ms.values())
    return Observation(assignment=assignment, node_ms=node_ms, measured_ms=total, held_out=held_out)


def builds(every_site: Sequence[Site], levels: Mapping[str, Sequence[Level]]) -> list[Observation]:
    drawn = draw_variants(every_site, levels, "f32", k=16, held_out=6, seed=0)
    drawn = with_ranks(drawn, ranked(every_site, levels), k=16, held_out=6, seed=0)
    return [observation(v.assignment, held_out=v.held_out) for v in drawn]


def learned(every_site: Sequence[Site], levels: Mapping[str, Sequence[Level]]) -> WidthFacts:
    return learn_facts(graph_facts, every_site, levels, "f32")


def quantize(tensor: str) -> tuple[str, ...]:
    return (f"{tensor}_quantize",)


@pytest.mark.usefixtures("how_sure")
def test_every_rank_is_priced_from_builds_with_some() -> None:
    own = sites()
    levels = {s.name: LEVELS for s in own}
    table = fit_table(CHOICE, own, builds(own, levels), quantize, learned(own, levels))
    tensors = {s.name: str(s.tensor) for s in own}
    assert set(table.ops["up0"]) >= {str(level) for level in LEVELS}
    rng = np.random.default_rng(1)
    for _ in range(20):
        plan = {s.name: LEVELS[int(rng.integers(len(LEVELS)))] for s in own}
        wanted = observation(plan).measured_ms
        assert table.predict_ms(plan, tensors) == pytest.approx(wanted, rel=0.04)
    assert all(b.predicted_ms == pytest.approx(b.measured_ms, rel=0.04) for b in table.builds)
    assert table.uncertainty is not None


def test_ranks_multiply_with_widths() -> None:
    own = sites(widths=True)
    counts = (256, 192, 128)
    levels: dict[str, Sequence[Level]] = {
        s.name: counts if s.kind == "width" else LEVELS for s in own
    }
    facts = learned(own, levels)
    table = fit_table(CHOICE, own, builds(own, levels), quantize, facts)
    tensors = {s.name: str(s.tensor) for s in own if s.tensor}
    rng = np.random.default_rng(2)
    for _ in range(20):
        plan = {s.name: levels[s.name][int(rng.integers(len(levels[s.name])))] for s in own}
        wanted = observation(plan).measured_ms
        assert table.predict_ms(plan, tensors) == pytest.approx(wanted, rel=0.06)
    sizes = size_terms(facts, own, levels)
    for level, count in every(LEVELS, counts):
        found = sum(t.at({"up0": level, "width:0": count}) for t in sizes if t.name == "up0")
        rank = rank_of(level)
        elements = rank * (128 + count) if rank else 128 * count
        wanted_bytes = 4 * (elements + count)
        if level == "int8":
            wanted_bytes = elements + 8 * count
        elif is_eight_bit(level):  # steps and biases of both ops
            wanted_bytes = elements + 8 * (count + rank)
        assert found == wanted_bytes


def test_what_no_build_showed_has_no_price() -> None:
    own = sites()
    levels = {s.name: LEVELS for s in own}
    floats = {s.name: tuple(v for v in LEVELS if v == "f32" or not is_eight_bit(v)) for s in own}
    table = fit_table(CHOICE, own, builds(own, floats), quantize, learned(own, levels))
    assert "f32_rank32" in table.ops["up0"]
    assert "int8_rank32" not in table.ops["up0"]
    rows = {"up0": [candidate(v) for v in LEVELS]}
    out = {r.level: r.reason for r in refused(rows, [table], {})}
    assert out["int8_rank16"] == "no build showed what it costs"


def candidate(level: Level, size: int = 10, error: float = 0.1) -> Candidate:
    return Candidate(site="up0", level=level, method="x", size_bytes=size, error=error)


@pytest.mark.parametrize(
    ("size", "error", "ms", "is_refused"),
    [
        (100, 0.2, 3.0, True),  # int8 is no larger, better and faster
        (99, 0.2, 3.0, False),  # smaller
        (100, 0.2, 1.0, False),  # faster
        (100, 0.05, 3.0, False),  # loses less
    ],
)
def test_a_rank_that_is_neither_faster_nor_smaller_is_refused(
    size: int, error: float, ms: float, *, is_refused: bool
) -> None:
    from tersor.core.records import PriceTable

    rank = RankLevel("f32_rank8")
    prices = {"up0": {"f32": 4.0, "int8": 2.0, str(rank): ms}}
    table = PriceTable(choice=CHOICE, ops=prices, quantizers={}, glue_ms=1.0)
    row = [candidate("f32", 400, 0.0), candidate("int8", 100), candidate(rank, size, error)]
    found = refused({"up0": row}, [table], {})
    assert [r.level for r in found] == ([rank] if is_refused else [])
    if is_refused:
        assert found[0].reason.startswith("int8 is no larger (100 against 100 bytes), errs no more")


def test_builds_with_ranks() -> None:
    own = sites()
    levels = {s.name: LEVELS for s in own}
    ranks = ranked(own, levels)
    drawn = draw_variants(own, levels, "f32", k=8, held_out=3, seed=0)
    found = with_ranks(drawn, ranks, k=8, held_out=3, seed=0)
    assert found == with_ranks(drawn, ranks, k=8, held_out=3, seed=0)
    assert found[:2] == drawn[:2]
    assert len(found) == len(drawn) + 2
    assert [v.held_out for v in found].count(True) == 3
    for variant, form in zip(found[2:4], ("f32", "int8"), strict=True):
        assert all(v.startswith(f"{form}_rank") for v in variant.assignment.values())  # type: ignore[union-attr]
    for variant in found[4:]:
        assert any(rank_of(v) for v in variant.assignment.values())
    # Without int8 there is nothing to mix but ranks.
    floats = {s.name: ("f32", *(RankLevel.of("f32", r) for r in RANKS)) for s in own}
    alone = draw_variants(own, floats, "f32", k=8, held_out=3, seed=0)
    assert len(alone) == 1
    found = with_ranks(alone, ranked(own, floats), k=8, held_out=3, seed=0)
    assert [v.held_out for v in found] == [False] * 9 + [True] * 3
    assert len({tuple(v.assignment.items()) for v in found}) > 9
    assert with_ranks(drawn, {}, k=8, held_out=3, seed=0) == drawn


def test_middle_ranks() -> None:
    own = [v for v in LEVELS if isinstance(v, RankLevel)]
    assert middle(own, int8=False) == "f32_rank48"
    assert middle(own, int8=True) == "int8_rank48"
    assert middle([], int8=True) is None
