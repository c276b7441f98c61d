import itertools
from types import ModuleType

from tersor.price.variants import draw_variants, full_assignment, quantizable


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
    assert quantizable(sites, levels) == ("s0", "s3")
    assert full_assignment(sites, levels, "f32") == {
        "s0": "int8",
        "s1": "f32",
        "s2": "f32",
        "s3": "int8",
    }
