"""Edits against simulations that are written out by hand, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.errors import ShapeError
from tersor.core.records import Site
from tersor.graph.apply import apply, quantize_node_name
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.quantizer import rounded, scaled
from tests.unit.capturing import (
    graph_of,
    random,
    scale_error,
    site_of,
    tensor_of,
    trained,
)

# One multiplication and one addition in another order, each a float32 rounding.
ROUNDINGS = 4 * torch.finfo(torch.float32).eps
QUANTIZER = Quantizer(step=0.02, low=-128, high=127)


def codes_of(site: Site, seed: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, site.shape, generator=generator).to(torch.int8)
    return {"codes": codes, "scale": torch.rand(site.shape[0], generator=generator) / 100 + 0.001}


def change(graph: Graph, name: str, **fields: Any) -> SiteChange:
    return SiteChange(site=site_of(graph, name), level="int8", **fields)


def weight(fields: dict[str, Any]) -> Tensor:
    codes, scale = fields["codes"], fields["scale"]
    return codes.float() * scale.reshape(-1, *[1] * (codes.dim() - 1))


def on_grid(x: Tensor, q: Quantizer) -> Tensor:
    return (x * (1.0 / q.step)).round().clamp(q.low, q.high) * q.step


class Pair(nn.Module):
    """Two readers of one tensor, then one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.a = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        return self.last(self.z(y) * self.a(y))


@pytest.fixture(scope="module")
def pair() -> Graph:
    return graph_of(trained(Pair()), random(4, 4))


def test_integer_weights_alone(pair: Graph) -> None:
    fields = codes_of(site_of(pair, "last"))
    edited = apply(pair, [change(pair, "last", **fields)])
    x = random(5, 4)
    y = x.tanh()
    hidden = F.linear(y, tensor_of(pair, "z.weight"), tensor_of(pair, "z.bias"))
    hidden = hidden * F.linear(y, tensor_of(pair, "a.weight"))
    assert torch.equal(
        edited.run([x])[0], F.linear(hidden, weight(fields), tensor_of(pair, "last.bias"))
    )


@pytest.mark.parametrize("unsigned", [False, True])
def test_integer_activations_and_weights_of_two_readers(pair: Graph, unsigned: bool) -> None:
    q = replace(QUANTIZER, low=0, high=255) if unsigned else QUANTIZER
    z, a = codes_of(site_of(pair, "z")), codes_of(site_of(pair, "a"), seed=4)
    bias = random(6, seed=5)
    # In the reverse order of the graph: the quantiser still stands before both readers.
    changes = [
        change(pair, "a", **a, bias=bias, quantizer=q),
        change(pair, "z", **z, bias=bias + 1, quantizer=replace(q)),
    ]
    edited = apply(pair, changes)
    x = random(5, 4)
    y = on_grid(x.tanh(), q)
    hidden = F.linear(y, weight(z), bias + 1) * F.linear(y, weight(a), bias)
    wanted = F.linear(hidden, tensor_of(pair, "last.weight"), tensor_of(pair, "last.bias"))
    assert torch.equal(edited.run([x])[0], wanted)
    names = [n.name for n in edited.module.graph.nodes if "quantize_per_tensor" in str(n.target)]
    assert names == [quantize_node_name("tanh"), "tanh_dequantize"]
    kinds = [n.args[5] for n in edited.module.graph.nodes if n.name == "tanh_quantize"]
    assert kinds == [torch.uint8 if unsigned else torch.int8]


def test_smoothing_and_shift_of_a_linear(pair: Graph) -> None:
    inverse = torch.tensor([0.5, 1.0, 2.0, 1.5])
    q = Quantizer(step=0.015, low=0, high=255, inverse_scale=inverse, shift=0.7)
    fields = codes_of(site_of(pair, "z"))
    edited = apply(pair, [change(pair, "z", **fields, bias=random(6), quantizer=q)])
    x = random(5, 4)
    y = x.tanh()
    hidden = F.linear(on_grid(y * inverse + 0.7, q), weight(fields), random(6))
    hidden = hidden * F.linear(y, tensor_of(pair, "a.weight"))
    wanted = F.linear(hidden, tensor_of(pair, "last.weight"), tensor_of(pair, "last.bias"))
    assert torch.equal(edited.run([x])[0], wanted)


@pytest.mark.parametrize("groups", [1, 2])
def test_channel_scale_of_a_convolution_without_bias(groups: int) -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=False), nn.Tanh())
    graph = graph_of(trained(module), random(4, 4, 5, 5))
    inverse = torch.tensor([0.5, 1.0, 2.0, 1.5])
    q = Quantizer(step=0.02, low=-128, high=127, inverse_scale=inverse, channel_dim=1)
    fields, bias = codes_of(site_of(graph, "0")), random(6, seed=7)
    edited = apply(graph, [change(graph, "0", **fields, bias=bias, quantizer=q)])
    x = random(3, 4, 5, 5)
    seen = on_grid(x * inverse.reshape(1, 4, 1, 1), q)
    wanted = F.conv2d(seen, weight(fields), bias, padding=1, groups=groups).tanh()
    assert torch.equal(edited.run([x])[0], wanted)


def test_a_float_weight_and_a_bias_where_there_was_none(pair: Graph) -> None:
    new, bias = random(6, 4, seed=8), random(6, seed=9)
    edited = apply(pair, [change(pair, "a", weight=new, bias=bias)])
    x = random(5, 4)
    y = x.tanh()
    hidden = F.linear(y, tensor_of(pair, "z.weight"), tensor_of(pair, "z.bias"))
    hidden = hidden * F.linear(y, new, bias)
    wanted = F.linear(hidden, tensor_of(pair, "last.weight"), tensor_of(pair, "last.bias"))
    assert torch.equal(edited.run([x])[0], wanted)


def test_an_embedding_keeps_its_rows_scales() -> None:
    graph = graph_of(
        trained(nn.Sequential(nn.Embedding(7, 3), nn.Tanh())), torch.tensor([[1, 2], [3, 4]])
    )
    fields = codes_of(site_of(graph, "0"))
    edited = apply(graph, [change(graph, "0", **fields)])
    assert torch.equal(
        edited.run([torch.tensor([[6], [0]])])[0][:, 0], weight(fields)[[6, 0]].tanh()
    )


class Own(nn.Module):
    """A parameter of the model itself, read twice with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w, self.b).tanh(), self.w, self.b)


def test_a_shared_weight_changes_at_every_op() -> None:
    graph = graph_of(trained(Own()), random(4, 4))
    new, bias = random(4, 4, seed=5), random(4, seed=6)
    edited = apply(graph, [change(graph, "w", weight=new, bias=bias)])
    x = random(3, 4)
    assert torch.equal(edited.run([x])[0], F.linear(F.linear(x, new, bias).tanh(), new, bias))
    assert [n.name for n in edited.module.graph.nodes if str(n.target).startswith("w_new")] == [
        "w_new"
    ]


def test_the_base_graph_is_unchanged_and_what_stays_is_shared(pair: Graph) -> None:
    x = random(5, 4)
    before, text = pair.run([x])[0], str(pair.module.graph)
    fields = codes_of(site_of(pair, "z"))
    edited = apply(pair, [change(pair, "z", **fields, bias=random(6), quantizer=QUANTIZER)])
    assert str(pair.module.graph) == text
    assert torch.equal(pair.run([x])[0], before)
    assert tensor_of(edited, "a.weight").data_ptr() == tensor_of(pair, "a.weight").data_ptr()
    assert not hasattr(edited.module.z, "weight")
    assert apply(pair, []).run([x])[0].equal(before)
    assert edited.parameter_bytes() == pair.parameter_bytes() - 6 * 4 * 3 + 6 * 4  # codes; scales


@pytest.mark.parametrize(
    "other",
    [
        replace(QUANTIZER, step=0.03),
        replace(QUANTIZER, shift=0.1),
        replace(QUANTIZER, low=0, high=255),
        replace(QUANTIZER, inverse_scale=torch.ones(4)),
    ],
)
def test_readers_with_different_quantisers_are_refused(pair: Graph, other: Quantizer) -> None:
    changes = [
        change(pair, name, **codes_of(site_of(pair, name)), quantizer=q)
        for name, q in (("z", QUANTIZER), ("a", other))
    ]
    with pytest.raises(ShapeError, match="readers of tanh carry different quantisers; wanted one"):
        apply(pair, changes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"codes": torch.ones(6, 3, dtype=torch.int8), "scale": torch.ones(6)}, r"codes \(6, 3\)"),
        ({"codes": torch.ones(6, 4, dtype=torch.int8)}, "one scale a row"),
        ({"weight": torch.ones(4, 6)}, r"weight \(4, 6\), wanted \(6, 4\)"),
    ],
)
def test_a_weight_of_another_shape_is_refused(
    pair: Graph, fields: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        apply(pair, [change(pair, "z", **fields)])


@pytest.mark.parametrize(
    "quantizer",
    [
        QUANTIZER,
        Quantizer(step=0.013, low=0, high=255, shift=0.3),
        Quantizer(step=0.02, low=-128, high=127, inverse_scale=torch.tensor([0.5, 1, 2, 3])),
    ],
)
def test_the_simulation_in_torch_is_what_the_graph_computes(
    pair: Graph, quantizer: Quantizer
) -> None:
    fields = codes_of(site_of(pair, "z"))
    edited = apply(pair, [change(pair, "z", **fields, quantizer=quantizer)])
    values: dict[str, Tensor] = {}
    interpreter = torch.fx.Interpreter(edited.module, garbage_collect_values=False)
    x = random(64, 4)
    interpreter.run(x)
    values = {node.name: value for node, value in interpreter.env.items()}
    found = rounded(values["tanh"], quantizer) + quantizer.shift
    assert scale_error(found, values["tanh_dequantize"]) <= ROUNDINGS


def test_channels_in_the_middle() -> None:
    x = random(2, 3, 4, 5)
    q = Quantizer(step=1.0, low=-8, high=7, inverse_scale=torch.tensor([1.0, 2, 3]), channel_dim=1)
    assert torch.equal(scaled(x, q)[:, 2], x[:, 2] * 3)


def test_ops_without_a_stored_weight_are_refused(pair: Graph) -> None:
    site = replace(site_of(pair, "z"), ops=("tanh",))
    with pytest.raises(ShapeError, match="node tanh has no stored weight"):
        apply(pair, [SiteChange(site=site, level="int8")])
