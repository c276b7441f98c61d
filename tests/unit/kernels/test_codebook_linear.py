"""The codebook linear outside of a card: its definition, the op that compilers see, what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.errors import ShapeError
from tersor.kernels.codebook_linear import codebook_linear, codebook_linear_op
from tersor.kernels.codebook_weight import CodedWeight, coded_weight, expanded

# Of float32: one rounding of a product and one of a sum for every input.
ROUNDED = 2.0**-23


def weight_of(seed: int, out: int, inp: int, bits: int, *, uniform: bool) -> CodedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, inp), generator=generator, dtype=torch.uint8)
    if uniform:
        groups = -(-inp // 32)
        scales = torch.rand(out, groups, generator=generator)
        return coded_weight(codes, bits=bits, scales=scales, group=32)
    tables = torch.randn(out, 1, 2**bits, generator=generator).half()
    return coded_weight(codes, bits=bits, tables=tables)


def arguments(weight: CodedWeight, bias: Tensor | None = None) -> tuple[Any, ...]:
    parts = (weight.words, weight.tables, weight.planes, weight.scales)
    return (*parts, bias, weight.bits, weight.inputs, weight.group)


def exact(weight: CodedWeight) -> Tensor:
    found = expanded(
        *[getattr(weight, n) for n in ("words", "tables", "scales", "bits", "inputs", "group")]
    )
    return found.double()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(1, 20), st.integers(1, 300),
    st.sampled_from([4, 8]), st.booleans(),
)  # fmt: skip
def test_product_is_that_of_the_values(
    seed: int, rows: int, out: int, inp: int, bits: int, uniform: bool
) -> None:
    weight = weight_of(seed, out, inp, bits, uniform=uniform)
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(rows, inp, generator=generator), torch.randn(out, generator=generator)
    w = exact(weight)
    wanted = x.double() @ w.t() + bias.double()
    bound = ROUNDED * (inp + 1) * (x.double().abs() @ w.abs().t() + bias.double().abs())
    found = codebook_linear(x, *arguments(weight, bias))
    assert found.shape == (rows, out)
    assert bool(((found.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_shape_and_strides_in_the_types_of_x(dtype: torch.dtype) -> None:
    weight = weight_of(0, 7, 40, 4, uniform=False)
    x = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(1)).to(dtype).permute(2, 1, 0)
    assert not x.is_contiguous()
    found = codebook_linear(x, *arguments(weight))
    assert found.dtype == dtype
    wanted = nn.functional.linear(x.contiguous(), exact(weight).to(dtype))
    assert torch.equal(found, wanted)
    assert codebook_linear(x[:0], *arguments(weight)).shape == (0, 3, 7)


def test_refused_by_name() -> None:
    weight = weight_of(0, 7, 40, 4, uniform=True)
    with pytest.raises(ShapeError, match=r"x \(2, 39\)"):
        codebook_linear(torch.zeros(2, 39), *arguments(weight))
    with pytest.raises(ShapeError, match=r"bias \(6,\)"):
        codebook_linear(torch.zeros(2, 40), *arguments(weight, torch.zeros(6)))
    with pytest.raises(ShapeError, match=r"words \(7, 16\)"):
        codebook_linear(torch.zeros(2, 40), weight.words[:, :16], *arguments(weight)[1:])
    large = torch.zeros(1).expand(2**26, 40)
    with pytest.raises(ShapeError, match="split the batch"):
        codebook_linear(large, *arguments(weight))
    wide = weight_of(0, 64, 1, 4, uniform=True)
    with pytest.raises(ShapeError, match="64 outputs"):
        codebook_linear(torch.zeros(1).expand(2**25, 1), *arguments(wide))


@pytest.mark.parametrize("uniform", [True, False])
def test_the_op_meets_what_torch_asks_of_one(uniform: bool) -> None:
    weight = weight_of(0, 7, 40, 4, uniform=uniform)
    x = torch.randn(3, 40)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        codebook_linear_op(), (x, *arguments(weight, torch.zeros(7))), test_utils=checks
    )
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments(weight)]
    found = torch.ops.tersor.codebook_linear(x.to("meta"), *meta)
    assert found.shape == (3, 7)
    assert found.device.type == "meta"


class Layer(nn.Module):
    def __init__(self, weight: CodedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.words = nn.Buffer(weight.words)

    def forward(self, x: Tensor) -> Tensor:
        return codebook_linear(x.relu(), self.words, *arguments(self.weight)[1:])


def test_exporters_see_one_op() -> None:
    layer, x = Layer(weight_of(0, 7, 40, 4, uniform=True)), torch.randn(3, 40)
    rows = torch.export.Dim("rows", min=2, max=9)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    targets = [str(n.target) for n in program.graph.nodes]
    assert targets.count("tersor.codebook_linear.default") == 1
    longer = torch.randn(8, 40)
    assert torch.equal(program.module()(longer), layer(longer))
