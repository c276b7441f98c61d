import itertools
from dataclasses import replace
from types import ModuleType

import pytest

from tersor.core.errors import ConfigError
from tersor.price.variants import (
    counted,
    counts_between,
    draw_variants,
    full_assignment,
    native_assignment,
    quantizable,
)


def draw(lab: ModuleType, n: int = 12, **more: object) -> tuple:
    sites = lab.make_sites(n, pinned=(0,))
    settings = {"k": 10, "held_out": 4, "seed": 0, **more}
    return draw_variants(sites, lab.all_levels(sites), "bf16", **settings)


def test_the_extremes_come_first(lab: ModuleType) -> None:
    first, second, *_ = draw(lab)
    assert set(first.assignment.values()) == {"bf16"}
    assert second.assignment["s0"] == "bf16"  # pinned
    assert {v for s, v in second.assignment.items() if s != "s0"} == {"int8"}
    assert not first.held_out
    assert not second.held_out


def test_counts_and_distinctness(lab: ModuleType) -> None:
    variants = draw(lab)
    assert [v.held_out for v in variants] == [False] * 10 + [True] * 4
    keys = {tuple(sorted(v.assignment.items())) for v in variants}
    assert len(keys) == 14
    assert all(len(v.assignment) == 12 for v in variants)


def test_a_seed_fixes_the_draw_and_another_changes_it(lab: ModuleType) -> None:
    assert draw(lab) == draw(lab)
    assert draw(lab) != draw(lab, seed=1)


def test_held_out_builds_do_not_depend_on_the_fit(lab: ModuleType) -> None:
    few = [v for v in draw(lab, k=3) if v.held_out]
    many = [v for v in draw(lab, k=20) if v.held_out]
    assert few == many


def test_mixtures_have_several_shares_and_numbers_of_boundaries(lab: ModuleType) -> None:
    levels = [list(v.assignment.values())[1:] for v in draw(lab, n=31, k=24)][2:]
    shares = [row.count("int8") / 30 for row in levels]
    assert min(shares) < 0.35
    assert max(shares) > 0.65
    boundaries = [sum(a != b for a, b in itertools.pairwise(row)) for row in levels]
    assert min(boundaries) <= 2  # a block
    assert max(boundaries) >= 10  # coin flips


def test_small_models_run_out_of_assignments(lab: ModuleType) -> None:
    variants = draw(lab, n=3)  # two sites may be int8: four assignments
    assert len(variants) == 4
    assert sum(v.held_out for v in variants) == 2
    assert len(draw(lab, n=1)) == 1


def test_only_sites_that_offer_int8_and_are_not_pinned(lab: ModuleType) -> None:
    sites = lab.make_sites(4, pinned=(1,))
    levels = {**lab.all_levels(sites), "s2": ("bf16", "int8_weight")}
    assert quantizable(sites, levels) == {"s0": "int8", "s3": "int8"}
    assert full_assignment(sites, levels, "f32") == {
        "s0": "int8",
        "s1": "f32",
        "s2": "f32",
        "s3": "int8",
    }
    levels["s3"] = ("f32", "fp8")  # a layer's own format of 8 bits
    assert full_assignment(sites, levels, "f32")["s3"] == "fp8"
    drawn = draw_variants(sites, levels, "f32", k=6, held_out=0, seed=0)
    assert {v.assignment["s3"] for v in drawn} == {"f32", "fp8"}
    assert {v.assignment["s0"] for v in drawn} == {"f32", "int8"}


def draw_joint(lab: ModuleType, **more: object) -> tuple:
    net = lab.Network()
    settings = {"k": 20, "held_out": 4, "seed": 0, **more}
    return draw_variants(net.sites, net.levels, "bf16", **settings)


def widths_of(variant) -> list[int]:  # noqa: ANN001
    return [v for s, v in variant.assignment.items() if s.startswith("width")]


def formats_of(variant) -> set[str]:  # noqa: ANN001
    return {v for s, v in variant.assignment.items() if not s.startswith("width")}


def test_extremes_of_widths_and_formats_are_crossed(lab: ModuleType) -> None:
    first = draw_joint(lab)[:6]
    assert [set(widths_of(v)) for v in first] == [{128}, {128}, {16}, {16}, {64}, {64}]
    assert [formats_of(v) for v in first] == [{"bf16"}, {"int8"}] * 3


def test_joint_mixtures_are_distinct_and_held_out_ones_fixed(lab: ModuleType) -> None:
    variants = draw_joint(lab)
    assert [v.held_out for v in variants] == [False] * 20 + [True] * 4
    assert len({tuple(sorted(v.assignment.items(), key=str)) for v in variants}) == 24
    assert draw_joint(lab, k=9)[9:] == variants[20:]
    assert len(draw_joint(lab, k=2)) == 6
    assert draw_joint(lab) == variants
    assert draw_joint(lab, seed=1) != variants


def test_joint_mixtures_show_many_counts_and_pure_formats(lab: ModuleType) -> None:
    mixtures = draw_joint(lab, k=46)[6:46]
    full = [widths_of(v).count(128) / 5 for v in mixtures]
    assert min(full) <= 0.2
    assert max(full) >= 0.8
    assert {count for v in mixtures for count in widths_of(v)} == set(lab.COUNTS)
    assert {"bf16"} in map(formats_of, mixtures)
    assert {"int8"} in map(formats_of, mixtures)
    assert sum(len(formats_of(v)) == 2 for v in mixtures) > 20


def test_builds_of_the_fit_have_counts_between_those_on_offer(lab: ModuleType) -> None:
    net = lab.Network()
    widths = counted(net.sites, net.levels)
    between = counts_between(widths, list(widths), seed=0)
    assert set(between) == set(widths)
    for width, counts in between.items():
        assert len(counts) == 4
        assert (
            sum(c % 8 == 0 for c in counts) == 2
        )  # odd numbers of blocks have a cost of their own
        assert not set(counts) & set(widths[width])
        assert min(widths[width]) < min(counts)
        assert max(counts) < max(widths[width])
    variants = draw_joint(lab, k=46, between=between)
    others = {c for counts in between.values() for c in counts}
    assert not {c for v in variants[:6] for c in widths_of(v)} & others
    mixed = [c in others for v in variants[6:46] for c in widths_of(v) if c != 128]
    assert 0.4 < sum(mixed) / len(mixed) < 0.75
    assert variants[46:] == draw_joint(lab)[20:]  # held-out ones are on offer, as plans are


def test_every_third_mixture_of_a_fit_is_narrow_everywhere(lab: ModuleType) -> None:
    net = lab.Network()
    widths = counted(net.sites, net.levels)
    between = counts_between(widths, list(widths), seed=0)
    variants = draw_joint(lab, k=26, between=between)
    narrow = [max(widths_of(v)) <= 80 for v in variants[6:26]]  # of 16 to 128 and what is between
    assert narrow[2::3] == [True] * 6
    assert sum(narrow) < 10
    branch = replace(net.sites[0], name="branch", kind="branch", ops=(), units=1)
    levels = {**net.levels, "branch": (1, 0)}
    drawn = draw_variants(
        (*net.sites, branch), levels, "bf16", k=46, held_out=0, seed=0, between=between
    )
    # A branch is no width: what is in it is not gone in all of them.
    assert {v.assignment["branch"] for v in drawn[8::3]} == {0, 1}


def test_a_width_without_room_has_no_counts_between() -> None:
    assert counts_between({"w": (3, 2, 1)}, ["w"], seed=0) == {}


def test_branches_stay_in_the_extremes_and_are_drawn_in_mixtures(lab: ModuleType) -> None:
    net = lab.Network()
    branch = replace(net.sites[0], name="branch", kind="branch", ops=(), units=1)
    levels = {**net.levels, "branch": (1, 0)}
    variants = draw_variants((*net.sites, branch), levels, "bf16", k=30, held_out=0, seed=0)
    assert {v.assignment["branch"] for v in variants[:6]} == {1}
    assert {v.assignment["branch"] for v in variants[6:]} == {0, 1}


def test_a_pinned_width_and_one_without_choice_stay_full(lab: ModuleType) -> None:
    net = lab.Network()
    sites = tuple(replace(s, pinned="keep") if s.name == "width:b0" else s for s in net.sites)
    levels = {**net.levels, "width:b1": (128,)}
    levels.pop("width:b2")
    assert set(counted(sites, levels)) == {"width:stem", "width:b3"}
    for variant in draw_variants(sites, levels, "bf16", k=12, held_out=2, seed=0):
        assert [variant.assignment[f"width:b{i}"] for i in range(3)] == [128] * 3


def test_the_native_level_of_a_branch_is_its_highest(lab: ModuleType) -> None:
    branch = replace(lab.Network().sites[0], name="branch", kind="branch", ops=(), units=2)
    assert native_assignment([branch], "bf16") == {"branch": 2}
    levels = {"branch": (0, 1, 2)}
    assert counted([branch], levels) == {"branch": (2, 1, 0)}
    with pytest.raises(ConfigError, match=r"branch: found the levels \[1, 0\], wanted kept counts"):
        counted([branch], {"branch": (1, 0)})
