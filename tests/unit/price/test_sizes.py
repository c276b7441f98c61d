from dataclasses import replace
from types import ModuleType

from tersor.core.records import Term
from tersor.graph.facts import NodeFacts
from tersor.price.facts import learn_facts
from tersor.price.terms import size_terms


def by_name(net) -> dict[str, Term]:  # noqa: ANN001
    facts = learn_facts(net.facts, net.sites, net.levels, "bf16")
    levels = {s.name: ("f32", "bf16", "int8", "int8_weight") for s in net.sites}
    return {t.name: t for t in size_terms(facts, net.sites, levels)}


def at(term: Term, stem: int, inner: int, level: str) -> float:
    return term.at({"width:stem": stem, "width:b0": inner, term.name: level})


def test_bytes_of_a_convolution(lab: ModuleType) -> None:
    term = by_name(lab.Network())["b0a"]
    assert term.sites == ("width:stem", "width:b0", "b0a")
    assert at(term, 128, 128, "f32") == at(term, 128, 128, "bf16") == 4 * (128 * 128 * 9 + 128)
    assert at(term, 64, 32, "f32") == 4 * (64 * 32 * 9 + 32)
    assert at(term, 128, 128, "int8") == 128 * 128 * 9 + 8 * 128
    assert at(term, 64, 32, "int8") == at(term, 64, 32, "int8_weight") == 64 * 32 * 9 + 8 * 32


def test_outputs_that_no_width_moves_keep_their_rows(lab: ModuleType) -> None:
    term = by_name(lab.Network())["head"]
    assert term.sites == ("width:stem", "head")
    assert term.at({"width:stem": 32, "head": "int8"}) == 1000 * 32 + 8 * 1000
    assert term.at({"width:stem": 32, "head": "f32"}) == 4 * (1000 * 32 + 1000)


def test_half_precision_without_a_bias(lab: ModuleType) -> None:
    net = lab.Network()
    net.sites = tuple(
        replace(s, size_bytes=2 * 128 * 128 * 9) if s.name == "b0a" else s for s in net.sites
    )
    term = by_name(net)["b0a"]
    assert at(term, 128, 128, "f32") == 2 * 128 * 128 * 9
    assert at(term, 64, 32, "bf16") == 2 * 64 * 32 * 9
    assert at(term, 64, 32, "int8") == 64 * 32 * 9 + 8 * 32  # quantising adds a bias


def test_a_pinned_site_has_bytes_by_width_only(lab: ModuleType) -> None:
    net = lab.Network()
    net.sites = tuple(replace(s, pinned="keep") if s.name == "head" else s for s in net.sites)
    term = by_name(net)["head"]
    assert term.sites == ("width:stem",)
    assert term.at({"width:stem": 64}) == 4 * (1000 * 64 + 1000)


def test_rows_of_an_embedding_stay_and_there_is_no_bias(lab: ModuleType) -> None:
    net = lab.Network()
    table = replace(
        net.sites[0],
        name="words",
        op_kind="embedding",
        ops=("words",),
        shape=(500, 128),
        size_bytes=4 * 500 * 128,
    )

    def facts(assignment: dict) -> dict[str, NodeFacts]:
        kept = int(assignment.get("width:stem", 128))
        words = NodeFacts(
            kind="embedding", weight_elements=500 * kept, out_elements=10 * kept, outputs=kept
        )
        return {"words": words}

    learned = learn_facts(facts, (table, *net.sites), net.levels, "bf16")
    (term,) = size_terms(learned, (table,), {"words": ("bf16", "int8_weight")})
    assert term.at({"width:stem": 64, "words": "bf16"}) == 4 * 500 * 64
    assert term.at({"width:stem": 64, "words": "int8_weight"}) == 500 * 64 + 4 * 500


def test_a_width_that_moves_no_weight_has_no_term(lab: ModuleType) -> None:
    net = lab.Network()
    net.sites = tuple(replace(s, pinned="keep") if s.kind == "width" else s for s in net.sites)
    assert by_name(net) == {}
