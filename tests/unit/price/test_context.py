from dataclasses import replace
from typing import Literal

import pytest

from tersor.core.records import Level, Site
from tersor.graph.facts import NodeFacts
from tersor.price.context import alone, in_context, rivals, with_additions, writers
from tersor.price.facts import WidthFacts
from tersor.price.laws import Context, Law, Laws, NodeTime, fit_laws, warm_nodes
from tersor.price.observation import Observation
from tersor.price.terms import spread
from tersor.price.ways import Ways, followers

ORDER = ("x", "first", "relu", "last", "down", "plus", "relu_1", "next")
WAYS = Ways(precision="bf16")


def site(name: str, tensor: str | None, op_kind: Literal["conv", "add"] = "conv") -> Site:
    return Site(
        name=f"{op_kind}:{name}",
        kind="format",
        ops=(name,),
        op_kind=op_kind,
        weight="",
        shape=(),
        groups=1,
        units=0,
        unit_kind="",
        exactness="",
        members=(),
        tensor=tensor,
        macs=0,
        size_bytes=0,
        pinned=None,
    )


# A block whose shortcut has a convolution of its own: both results go into one addition.
SITES = (
    site("first", "x"),
    site("last", "relu"),
    site("down", "x"),
    site("plus", None, "add"),
    site("next", "relu_1"),
)
FACTS = WidthFacts(
    nodes={n: NodeFacts(kind="elementwise" if n == "plus" else "conv", out_elements=1000)
           for n in ORDER},
    full={},
    levels={},
    branches=frozenset(),
    ratios={},
    rules={},
)  # fmt: skip
AFTER = {
    "conv:first": "conv:last",
    "conv:last": "add:plus",
    "conv:down": "add:plus",
    "add:plus": "conv:next",
}


def built(**levels: Level) -> Observation:
    assignment = {s.name: levels.get(s.ops[0], "bf16") for s in SITES}
    # The addition stands alone where no convolution in front of it has its format.
    mine = assignment["add:plus"]
    fused = mine in (assignment["conv:last"], assignment["conv:down"])
    return Observation(
        assignment=assignment,
        node_ms={n: 0.0 if n == "plus" and fused else 1.0 for n in ORDER},
        measured_ms=8.0,
    )


def test_results_go_into_the_addition_in_front_of_the_next_layer() -> None:
    assert followers(SITES, FACTS) == AFTER
    assert writers(AFTER)["add:plus"] == ("conv:last", "conv:down")
    assert rivals("conv:down", AFTER) == ("conv:last",)
    assert rivals("conv:last", AFTER) == ()
    kept = tuple(replace(s, pinned="keep") if s.op_kind == "add" else s for s in SITES)
    assert "conv:last" not in followers(kept, FACTS)  # nothing that a plan chooses reads it


@pytest.mark.parametrize(
    ("levels", "last", "down"),
    [
        ({}, (True, False), (False, False)),  # the first one computes the addition
        ({"last": "int8"}, (False, False), (True, False)),
        ({"last": "int8", "plus": "int8"}, (True, False), (False, False)),
        ({"plus": "int8"}, (False, False), (False, False)),
    ],
)
def test_an_addition_is_computed_by_the_first_layer_of_its_format(
    levels: dict[str, Level], last: tuple[bool, bool], down: tuple[bool, bool]
) -> None:
    found = {row.node: row.context for row in contexts(built(**levels))}
    assert (found["last"].is_added, found["last"].is_changed) == last
    assert (found["down"].is_added, found["down"].is_changed) == down
    assert found["first"].is_changed is (levels.get("last") == "int8")


def contexts(observation: Observation) -> list[NodeTime]:
    owners = {s.ops[0]: s for s in SITES}
    rows = [
        NodeTime(
            node=n,
            format="int8" if observation.assignment[owners[n].name] == "int8" else "bf16",
            build=0,
            facts=FACTS.nodes[n],
            ms=1.0,
        )
        for n in ORDER
        if n in owners
    ]
    return in_context(rows, owners, AFTER, [observation])


def test_a_kernel_is_warm_from_its_second_run() -> None:
    again = {row.node: row.context.is_again for row in contexts(built(down="int8"))}
    assert again == {"first": False, "last": True, "down": False, "plus": False, "next": True}


def test_an_addition_stands_alone_where_no_layer_in_front_has_its_format() -> None:
    builds = [built(), built(last="int8"), built(plus="int8"), built(last="int8", plus="int8")]
    found = alone(SITES, AFTER, builds, FACTS, WAYS)
    assert found["plus", "bf16", True] == 0.0
    assert found["plus", "int8", True] == 0.0
    assert found["plus", "int8", False] == 1.0
    assert ("plus", "bf16", False) not in found  # no build of any addition has shown it


def test_an_addition_that_was_never_alone_takes_what_others_of_its_kind_take() -> None:
    law = Law(input_tile=8, output_tile=8, weights=(1.0,) * 26)
    laws = Laws(
        laws={("elementwise", "int8"): law, ("conv", "int8"): law},
        levels={("relu", "int8"): 7.0, ("other", "int8"): 3.0},
    )
    facts = replace(FACTS, nodes={**FACTS.nodes, "other": FACTS.nodes["plus"]})
    assert with_additions(laws, SITES, facts).levels["plus", "int8"] == 3.0
    assert ("plus", "bf16") not in with_additions(laws, SITES, facts).levels


def linear(inp: int, out: int) -> NodeFacts:
    return NodeFacts(
        kind="linear",
        macs=100 * inp * out,
        weight_elements=inp * out,
        in_elements=100 * inp,
        out_elements=100 * out,
        inputs=inp,
        outputs=out,
    )


def test_what_warm_code_and_another_reader_cost_is_told_from_the_sizes() -> None:
    cold, changed = 0.02, 3e-6
    full = linear(64, 64)

    def row(build: int, node: int) -> NodeTime:
        out = 64 if (build + node) % 2 else 16 * (1 + build % 3)
        context = Context(is_again=bool(build % 2), is_changed=build % 3 == 0)
        facts = linear(64, out)
        ms = 1e-7 * facts.macs + cold * (not context.is_again)
        ms += changed * facts.out_elements * context.is_changed
        return NodeTime(
            node=f"n{node}", format="int8", build=build, facts=facts, ms=ms, context=context
        )

    rows = [row(build, node) for build in range(12) for node in range(4)]
    laws = fit_laws(rows)
    native = {f"n{node}": full for node in range(4)}
    before = laws.ms("n0", "int8", full)
    laws = replace(laws, warm=warm_nodes([r for r in rows if r.build % 2], native))
    after = laws.ms("n0", "int8", full)
    assert before is not None
    assert after is not None
    assert before - after == pytest.approx(cold, rel=0.05)
    added, per_element = laws.laws["linear", "int8"].per_written()
    assert added == 0.0
    assert per_element * laws.levels["n0", "int8"] == pytest.approx(changed, rel=0.05)


def test_heads_multiply_what_the_sizes_of_queries_and_values_add_up_to() -> None:
    counts = {"heads": (12, 6, 2), "queries": (32, 16, 4), "values": (32, 16, 4)}
    ratios = {w: {n: (n / c[0],) * 6 for n in c} for w, c in counts.items()}
    # As in a product of queries and keys with values: the values' size moves outputs alone.
    ratios["values"] = {n: (n / 32, 1, 1, n / 32, 1, n / 32) for n in (32, 16, 4)}
    facts = replace(
        FACTS,
        nodes={"attention": NodeFacts(kind="attention", macs=1000)},
        full={w: c[0] for w, c in counts.items()},
        levels=counts,
        ratios={"attention": ratios},
    )
    assert facts.pivot(["attention"]) == "values"

    def cost(at: dict[str, Level]) -> float:
        heads, queries, values = (int(at.get(w, c[0])) for w, c in counts.items())
        return heads * (5.0 + queries + 2.0 * values)

    terms = spread("attention", ["attention"], {}, facts, cost)  # type: ignore[arg-type]
    assert all("heads" in term.sites for term in terms)
    for at in ({"heads": 2, "queries": 4, "values": 4}, {"heads": 6, "queries": 4, "values": 16}):
        assert sum(term.at(at) for term in terms) == pytest.approx(cost(at))  # type: ignore[arg-type]
