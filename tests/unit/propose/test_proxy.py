"""Predictions of errors against what they predict."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import site_statistics
from tersor.analyse.sites import find_sites
from tersor.core.records import Candidate, Level
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange, WidthStatistics
from tersor.graph.geometry import constant_error
from tersor.graph.suffix import Original
from tersor.methods.quantize import Quantize
from tersor.observe.statistics import observe
from tersor.ops.obs import Consumer
from tersor.propose.propose import measure_errors, offers
from tersor.propose.proxy import (
    Gradients,
    format_proxy,
    layer_change,
    output_gradients,
    thinned,
    width_proxy,
)
from tests.unit.capturing import graph_of, random, trained


class Straight(nn.Module):
    """y = B A x: a linear network, for which the prediction has no second-order error."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_gradients_are_those_of_a_linear_network() -> None:
    graph = graph_of(trained(Straight()), random(4, 5))
    x = random(4000, 5, seed=7)
    batches = [(x[:1500],), (x[1500:],)]
    found = output_gradients(graph, batches, "values", seed=0)
    assert (found.reason, found.useless) == ("", 1.0)
    (y,) = graph.run([x])
    scale = 1 / (3 * float(y.double().var(0).mean()))
    B = graph.module.state_dict()["b.weight"].double()
    wanted = [B.square().sum(0) * scale, torch.full((3,), scale, dtype=torch.float64)]
    for squares, right in zip(found.by_op.values(), wanted, strict=True):
        # a chi^2 of one degree over 4,000 samples: 2.2 %, four times that
        torch.testing.assert_close(squares, right, rtol=0.09, atol=0)
    again = output_gradients(graph, batches, "values", seed=0)
    assert all(torch.equal(found.by_op[n], again.by_op[n]) for n in found.by_op)


def test_gradients_of_logits_are_fishers(lenet5_graph: Graph, images: dict[str, Tensor]) -> None:
    x = images["train"][:400]
    batches = [(part,) for part in x.split(16)] * 10  # other vectors each time
    found = output_gradients(lenet5_graph, batches, "logits", seed=0)
    (y,) = lenet5_graph.run([x])
    p = y.double().softmax(1)
    last = list(found.by_op.values())[-1]
    torch.testing.assert_close(last, (p - p.square()).mean(0) / 2, rtol=0.25, atol=0)
    assert float(last.sum()) == pytest.approx(float((p - p.square()).sum(1).mean() / 2), rel=0.1)
    assert found.useless == pytest.approx(constant_error([(y,)], "logits"), rel=1e-5)


def quantized(graph: Graph, x: Tensor) -> tuple[list, dict]:  # type: ignore[type-arg]
    sites = find_sites(graph)
    statistics = site_statistics(graph, sites, observe(graph, [(x,)], 1, seed=0))
    method = Quantize(weight_limit=31, low_bits=False)
    return offers(sites, statistics, {"q": method}, lambda _: True), statistics


@pytest.mark.parametrize("level", ["int8", "int8_weight"])
def test_a_layers_change_is_that_of_its_op(
    lenet5_graph: Graph, images: dict[str, Tensor], level: Level
) -> None:
    """Of the linear layers, whose row samples hold every row of 64 images."""
    x = images["train"][:64]
    proposals, statistics = quantized(lenet5_graph, x)
    for offer in proposals:
        if offer.candidate.level != level or offer.change.site.op_kind != "linear":
            continue
        (op,) = offer.change.site.ops
        edited = apply(lenet5_graph, [offer.change])
        new = Original(edited).values([x], {op})[op].double()
        old = Original(lenet5_graph).values([x], {op})[op].double()
        found = layer_change(offer.change, statistics[offer.candidate.site])
        # Both sides round to float32 values of size 1 to 10 with changes of 1e-2; where their sums differ in
        # the last bit, as on some processors, one of 64 rows may get the code beside.
        torch.testing.assert_close(found, (new - old).square().mean(0), rtol=5e-2, atol=1e-9)


def test_smoothed_and_shifted_inputs_are_seen_as_the_op_sees_them() -> None:
    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.gelu(self.a(x) * torch.arange(1, 9)))

    graph, x = graph_of(trained(Gelu()), random(4, 6)), random(200, 6, seed=2)
    proposals, statistics = quantized(graph, x)
    seen = set()
    for offer in proposals:
        if offer.candidate.level != "int8":
            continue
        (op,) = offer.change.site.ops
        new = Original(apply(graph, [offer.change])).values([x], {op})[op].double()
        old = Original(graph).values([x], {op})[op].double()
        found = layer_change(offer.change, statistics[offer.candidate.site])
        torch.testing.assert_close(found, (new - old).square().mean(0), rtol=1e-2, atol=1e-9)
        quantizer = offer.change.quantizer
        assert quantizer is not None
        seen |= {quantizer.shift > 0, quantizer.inverse_scale is not None}
    assert True in seen


def test_predictions_are_near_the_errors_of_a_real_network(
    lenet5_graph: Graph, images: dict[str, Tensor]
) -> None:
    x = images["train"]
    proposals, statistics = quantized(lenet5_graph, x[:128])
    batches = [(part,) for part in x[:64].split(16)]
    gradients = output_gradients(lenet5_graph, batches, "logits", seed=0)
    # Few bits are fitted to these 128 samples, fewer than a layer has inputs: on the same samples
    # they look 30 times better than they are.
    edits = [o for o in proposals if o.candidate.level in ("int8", "int8_weight")]
    predicted = [format_proxy(o.change, statistics[o.candidate.site], gradients) for o in edits]
    measured = [c.error for c in measure_errors(lenet5_graph, edits, (x[200:600],), "logits")]
    assert len(edits) == 8
    for p, e in zip(predicted, measured, strict=True):
        assert p is not None
        assert 0.1 < p / e < 10  # what is left out: positions and channels that move together


def test_no_prediction_without_a_backward_pass() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.view(-1, 2, 2).mul_(2)
            return y + 1

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.zeta(self.a(x).abs() + 2, 1.0)

    for module, why in ((Writes(), "it writes in place"), (Steps(), "not implemented")):
        graph = graph_of(trained(module), random(4, 4))
        found = output_gradients(graph, [(random(8, 4),)], "values", seed=0)
        assert why in found.reason
        assert not found.by_op
        assert found.useless == 1.0
        proposals, statistics = quantized(graph, random(32, 4))
        change = next(o.change for o in proposals if o.candidate.level == "int8")
        assert format_proxy(change, statistics["a"], found) is None


def test_a_widths_prediction_weighs_its_readers(lenet5_graph: Graph) -> None:
    site = replace(find_sites(lenet5_graph)[0], kind="width", ops=("x", "y"), units=4)
    eye = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    columns = torch.arange(2).reshape(1, 2, 1)
    consumers = tuple(
        Consumer(weight=eye, second_moment=eye, columns=columns, scale=s) for s in (3.0, 5.0)
    )
    candidate = Candidate(site="w", level=1, method="m", size_bytes=0, detail={"loss": 0.5})
    change = SiteChange(site=site, level=1)
    felt = Gradients(by_op={"x": torch.tensor([1.0, 3.0]), "y": torch.tensor([10.0])})
    known = WidthStatistics(consumers=consumers)
    assert width_proxy(candidate, change, known, felt) == 0.5 * (3 * 2 + 5 * 10) / 2
    assert width_proxy(replace(candidate, detail={}), change, known, felt) is None
    assert width_proxy(candidate, change, known, Gradients()) is None
    assert width_proxy(candidate, change, WidthStatistics(), felt) is None


def offered(level: Level, size: int, proxy: float | None, site: str = "s") -> Candidate:
    return Candidate(site=site, level=level, method="m", size_bytes=size, proxy=proxy)


def test_only_what_is_hopeless_or_dominated_by_far_is_thinned() -> None:
    rows = [
        offered("int8", 10, 8.0),
        offered("int8", 10, 2.0),  # four times less, as large
        offered("int8", 11, 0.1),  # larger than both
        offered("int8_weight", 10, 8.1),  # another format: which is faster is not known
        offered("int8", 10, 9.0, "t"),
        offered("f32", 1, None),
        offered(8, 80, 4.0, "w"),
        offered(4, 40, 1.0, "w"),
        offered(2, 20, 0.5, "w"),  # fewer units, but not by far better than 4
        offered(16, 160, 0.12, "w"),
        offered(9, 9, 150.0, "x"),
    ]
    found = thinned(rows, 1.5)
    assert set(found) == {0, 6, 10}
    assert found[0] == "predicted error 8; int8 by m is no larger or slower, predicted 2"
    assert found[10] == "predicted error 1.5e+02, of an answer that ignores the input 1.5"
    assert set(thinned(rows, math.inf)) == {0, 6}
    assert thinned([], 1.0) == {}
