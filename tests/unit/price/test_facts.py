from collections.abc import Mapping

import pytest

from tersor.core.errors import ConfigError
from tersor.core.records import Level, Site
from tersor.graph.facts import NodeFacts
from tersor.price.facts import learn_facts
from tersor.price.terms import spread


def width(name: str, units: int) -> Site:
    return Site(name=name, kind="width", ops=(), units=units)


SITES = (
    width("a", 32),
    width("b", 64),
    width("c", 16),
    width("s", 24),
    Site(name="gone", kind="branch", ops=(), units=1),
)
LEVELS: dict[str, tuple[Level, ...]] = {
    "a": (32, 24, 16, 8),
    "b": (64, 48, 32, 16),
    "c": (16, 8),
    "s": (24, 18, 12, 6),
    "gone": (1, 0),
}


def linear(inp: int, out: int, rows: int = 10) -> NodeFacts:
    return NodeFacts(
        kind="linear",
        macs=rows * inp * out,
        weight_elements=inp * out,
        in_elements=rows * inp,
        out_elements=rows * out,
        inputs=inp,
        outputs=out,
    )


def graph(assignment: Mapping[str, Level]) -> dict[str, NodeFacts]:
    """A product of two widths, a concatenation, a square of one width, a branch."""
    a, b, c, s = (int(assignment.get(n, LEVELS[n][0])) for n in "abcs")
    found = {
        "pair": linear(a, b),
        "concat": NodeFacts(
            kind="move", in_elements=10 * (a + b + 3), out_elements=10 * (a + b + 3)
        ),
        "after": linear(a + b + 3, c),
        "square": linear(s, s),
        "fixed": linear(5, 7),
    }
    if assignment.get("gone", 1):
        found["inside"] = linear(s, 9)
    return found


FACTS = learn_facts(graph, SITES, LEVELS, "f32")


@pytest.mark.parametrize(
    "assignment",
    [
        {},
        {"a": 24, "b": 16, "c": 8, "s": 18},
        {"a": 8, "b": 16, "c": 8, "s": 6},
        {"a": 16, "s": 12, "gone": 1},
        {"b": 48, "s": 18, "gone": 1},
    ],
)
def test_facts_follow_at_any_counts(assignment: dict[str, Level]) -> None:
    for node, wanted in graph(assignment).items():
        assert FACTS.at(node, assignment) == wanted


def test_what_moves_what() -> None:
    assert FACTS.widths(["pair"]) == ("a", "b")
    assert FACTS.widths(["after"]) == ("a", "b", "c")
    assert FACTS.widths(["fixed"]) == ()
    assert FACTS.widths(["square", "pair"]) == ("a", "b", "s")
    assert FACTS.widths(["inside"]) == ("s", "gone")
    assert FACTS.pivot(["after"]) == "c"


def test_few_graphs_are_asked_for() -> None:
    asked: list[Mapping[str, Level]] = []

    def counting(assignment: Mapping[str, Level]) -> dict[str, NodeFacts]:
        asked.append(assignment)
        return graph(assignment)

    learn_facts(counting, SITES, LEVELS, "f32")
    # Native; two counts of a, b, s, one of c and of the branch; all at their least.
    assert len(asked) == 1 + 3 * 2 + 2 + 1
    assert asked[0] == {"a": 32, "b": 64, "c": 16, "s": 24, "gone": 1}


def test_a_node_of_a_removed_branch_has_no_sizes() -> None:
    assert FACTS.at("inside", {"gone": 0, "s": 12}).sizes() == (0,) * 6


def test_a_count_without_facts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pair: width a at 9 has no facts; there are 32, 24"):
        FACTS.at("pair", {"a": 9})


def macs(assignment: Mapping[str, Level]) -> float:
    return float(FACTS.at("after", assignment).macs)


def test_three_widths_are_split_around_the_one_that_multiplies() -> None:
    terms = spread("after", ["after"], {}, FACTS, macs)
    assert [t.sites for t in terms] == [("a", "c"), ("b", "c")]
    # What adds up before it is multiplied is exact at every combination.
    for a in LEVELS["a"]:
        for b in LEVELS["b"]:
            for c in LEVELS["c"]:
                chosen = {"a": a, "b": b, "c": c}
                assert sum(t.at(chosen) for t in terms) == pytest.approx(macs(chosen))


def test_a_term_has_the_format_last() -> None:
    def cost(assignment: Mapping[str, Level]) -> float:
        return FACTS.at("pair", assignment).macs * (0.5 if assignment["op"] == "int8" else 1.0)

    (term,) = spread("pair", ["pair"], {"op": ("f32", "int8")}, FACTS, cost)
    assert term.sites == ("a", "b", "op")
    assert len(term.values) == 4 * 4 * 2
    assert term.at({"a": 16, "b": 32, "op": "int8"}) == 10 * 16 * 32 / 2


def test_levels_that_are_no_counts_are_refused() -> None:
    for bad in [(16, 8), (32, "int8"), (64, 32), (32, -1)]:
        with pytest.raises(ConfigError, match="wanted kept counts, among them the full one, 32"):
            learn_facts(graph, SITES, {**LEVELS, "a": bad}, "f32")


def test_a_branch_with_a_linear_map_has_the_sizes_of_the_map() -> None:
    def block(assignment: Mapping[str, Level]) -> dict[str, NodeFacts]:
        level, inner = assignment["branch"], int(assignment["w"])
        if level == 2:
            return {"up": linear(24, inner), "down": linear(inner, 24)}
        return {"down": linear(24, 24)} if level else {}

    sites = (
        Site(name="branch", kind="branch", ops=(), units=2),
        width("w", 64),
        Site(name="alone", kind="branch", ops=(), units=2),
    )
    facts = learn_facts(block, sites, {"branch": (2, 1, 0), "w": (64, 32)}, "f32")
    assert facts.branches == {"branch"}  # the other one has no choice
    assert facts.at("down", {"branch": 1}) == linear(24, 24)
    assert facts.at("up", {"branch": 1}).sizes() == (0,) * 6
    assert facts.at("down", {"branch": 0}).sizes() == (0,) * 6
    (term,) = spread("down", ["down"], {}, facts, lambda a: facts.at("down", a).macs)
    assert term.sites == ("w", "branch")
    assert facts.pivot(["down"]) == "w"


def test_widths_that_add_up_inside_of_a_branch() -> None:
    """With the branch gone every rule would fit: it is told with the branch kept."""

    def inside(assignment: Mapping[str, Level]) -> dict[str, NodeFacts]:
        a, b = (int(assignment.get(n, LEVELS[n][0])) for n in "ab")
        return {"concat": linear(a + b, 5)} if assignment.get("gone", 1) else {}

    sites = [s for s in SITES if s.name in {"a", "b", "gone"}]
    found = learn_facts(inside, sites, LEVELS, "f32")
    assert found.at("concat", {"a": 8, "b": 32}) == linear(40, 5)
    assert found.at("concat", {"a": 8, "b": 32, "gone": 0}).out_elements == 0
