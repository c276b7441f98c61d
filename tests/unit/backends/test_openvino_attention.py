"""Attention in OpenVINO: products and a softmax of their own, equal to torch's op; what is not plain stays."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.records import BuildChoice
from tests.conformance.test_backends import graph_of, random

pytest.importorskip("openvino")
from tersor.backends.openvino import OpenVINOBackend, to_openvino_model
from tersor.build.build import shapes_of

CHOICE = BuildChoice(backend="openvino", device="cpu", precision="f32", threads=1, batch=1)
BATCH, HEADS, TOKENS, WIDTH = 1, 2, 5, 8
KIND = "ScaledDotProductAttention"


class Attention(nn.Module):
    """Queries, keys and values from one linear, and attention as it is given."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.made = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        parts = self.made(x).reshape(x.shape[0], x.shape[1], 3, HEADS, WIDTH)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


def mask(dtype: torch.dtype) -> Tensor:
    keep = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    keep[..., 3:] = False
    keep[..., 0, 1] = False
    return keep if dtype == torch.bool else torch.zeros(keep.shape).masked_fill(~keep, -7.5)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "boolean mask": {"attn_mask": mask(torch.bool)},
    "added mask": {"attn_mask": mask(torch.float32)},
    "scale": {"scale": 0.7},
    "mask and scale": {"attn_mask": mask(torch.bool), "scale": 0.7},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_op(kind: str) -> None:
    settings = KINDS[kind]
    module = Attention(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, **settings))
    x = random(BATCH, TOKENS, HEADS * WIDTH)
    graph = graph_of(module, x)
    model = to_openvino_model(graph, shapes_of(graph.signature, BATCH), CHOICE)
    found = Counter(node.get_type_name() for node in model.get_ops())
    assert found[KIND] == (kind == "causal")
    assert found["Softmax"] == (kind != "causal")
    if kind == "scale":  # which comes behind a mask of one zero: nothing is added
        named = [n.get_friendly_name() for n in model.get_ops() if n.get_type_name() == "Add"]
        assert not any("scaled_dot_product" in name for name in named)
    build = OpenVINOBackend().build(graph, shapes_of(graph.signature, BATCH), CHOICE)
    result = next(iter(build.run({graph.signature.inputs[0].name: x.numpy()}).values()))
    with torch.no_grad():
        np.testing.assert_allclose(result, module(x).numpy(), rtol=1e-5, atol=1e-6)


def test_nodes_lead_back_to_the_op() -> None:
    module = Attention(functional.scaled_dot_product_attention)
    graph = graph_of(module, random(BATCH, TOKENS, HEADS * WIDTH))
    (source,) = (n.name for n in graph.module.graph.nodes if "scaled_dot_product" in str(n.target))
    model = to_openvino_model(graph, shapes_of(graph.signature, BATCH), CHOICE)
    named = [
        node.get_type_name()
        for node in model.get_ops()
        if node.get_friendly_name().partition("/")[0] == source
    ]
    assert Counter(named)["MatMul"] == 2
    assert "Softmax" in named


def test_a_row_that_may_see_nothing_is_a_number() -> None:
    nothing = mask(torch.bool)
    nothing[..., 2, :] = False
    module = Attention(
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, attn_mask=nothing)
    )
    x = random(BATCH, TOKENS, HEADS * WIDTH)
    graph = graph_of(module, x)
    build = OpenVINOBackend().build(graph, shapes_of(graph.signature, BATCH), CHOICE)
    result = next(iter(build.run({graph.signature.inputs[0].name: x.numpy()}).values()))
    assert np.isfinite(result).all()
