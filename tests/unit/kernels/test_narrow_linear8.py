"""Layers on 8-bit codes: the definition against products of the codes' values, weights, the op, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from tersor.core.errors import ShapeError
from tersor.kernels.linear8 import quantize_codes, quantize_floats
from tersor.kernels.narrow_linear import linear_weights, narrow_linear
from tersor.kernels.narrow_linear8 import (
    COLUMNS,
    DEEP,
    linear8_weights,
    narrow_linear8,
    narrow_linear8_op,
)

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
GRID = (0.05, 3, -128, 127)
NONE = (None, 1.0, 0, 0, 0)
SINGLE = 1e-5


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coded(dtype: torch.dtype, rows: int = 12, inp: int = 40, out: int = 24) -> dict[str, Tensor]:
    size = 30.0 if dtype == INT8 else 1.0
    return {
        "x": (drawn(1, 2, rows // 2, inp) * size).to(dtype),
        "weight": (drawn(2, out, inp) * size).to(dtype),
        "factor": (0.5 + drawn(3, out).abs()) / (size * size * inp**0.5),
        "bias": drawn(4, out),
        "added": drawn(5, 2, rows // 2, out).half(),
        "scale": 1 + 0.2 * drawn(6, out),
        "shift": drawn(7, out),
    }


def computed(
    parts: dict[str, Tensor],
    act: str = "gelu",
    *,
    last: bool = True,
    grid: Any = NONE,
    written: bool = True,
) -> tuple[Tensor, Tensor]:
    norm = (parts["scale"], parts["shift"]) if last else None
    made = linear8_weights(parts["weight"], parts["factor"], parts["bias"], norm)
    return narrow_linear8(
        parts["x"], *made[:3], None, parts["added"], *made[3:], parts["weight"].shape[0], act, 0.0, 1e-3,
        torch.float16, written, *grid,
    )  # fmt: skip


def wanted_of(parts: dict[str, Tensor], *, last: bool = True) -> Tensor:
    """In float64."""
    p = {name: t.double() for name, t in parts.items()}
    y = gelu(p["x"] @ p["weight"].T * p["factor"] + p["bias"]) + p["added"]
    return layer_norm(y, y.shape[-1:], p["scale"], p["shift"], 1e-3) if last else y


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_definition_against_float64(dtype: torch.dtype, last: bool) -> None:
    parts = coded(dtype)
    wanted = wanted_of(parts, last=last)
    y, nothing = computed(parts, last=last)
    assert (y.dtype, y.shape, nothing.numel()) == (torch.float16, wanted.shape, 0)
    assert torch.allclose(y.double(), wanted, rtol=2.0**-10, atol=2.0**-12)


@pytest.mark.parametrize("to", [INT8, FLOAT8])
@pytest.mark.parametrize("written", [True, False])
def test_codes_are_those_of_what_was_not_rounded(to: torch.dtype, written: bool) -> None:
    parts = coded(INT8)
    y, codes = computed(parts, grid=(to, *GRID), written=written)
    exact = wanted_of(parts)
    wanted = quantize_codes(exact, *GRID) if to == INT8 else quantize_floats(exact, GRID[0])
    assert codes.dtype == to
    assert float((codes.float() != wanted.float()).double().mean()) <= 0.01  # on the border of two
    assert y.numel() == (codes.numel() if written else 0)


def test_floats_in_give_what_the_layer_without_codes_gives() -> None:
    weight, bias, first = drawn(1, 24, 40) * 40**-0.5, drawn(2, 24), (drawn(3, 40), drawn(4, 40))
    last = (drawn(5, 24), drawn(6, 24))
    made = linear_weights(weight, bias, dtype=torch.float16, first=first, last=last)
    x, added = drawn(7, 5, 40).half(), drawn(8, 5, 24).half()
    rest = (24, "relu", 1e-5, 1e-3)
    wanted = narrow_linear(x, *made[:3], added, *made[3:], *rest)
    y, codes = narrow_linear8(
        x, made[0], None, *made[1:3], added, *made[3:], *rest, torch.float16, True, INT8, *GRID
    )
    assert torch.equal(y, wanted)
    assert int((codes.int() - quantize_codes(wanted, *GRID).int()).abs().max()) <= 1


def test_what_is_added_may_have_more_samples_or_another_type() -> None:
    parts = coded(INT8)
    parts["x"] = parts["x"][:1]
    for added in (parts["added"], parts["added"].float()):
        y, codes = computed({**parts, "added": added}, grid=(INT8, *GRID))
        wanted = wanted_of({**parts, "added": added})
        assert y.shape == wanted.shape
        assert torch.allclose(y.double(), wanted, rtol=1e-2, atol=1e-2)
        assert int((codes.int() - quantize_codes(wanted, *GRID).int()).abs().max()) <= 1
    one = parts["added"][:1, :1]  # fewer: of every row alike
    y, _ = computed({**parts, "added": one})
    assert torch.allclose(y.double(), wanted_of({**parts, "added": one}), rtol=2.0**-10, atol=2e-3)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_weights_are_filled_up_with_zeros(dtype: torch.dtype) -> None:
    parts = coded(dtype)
    made = linear8_weights(parts["weight"], parts["factor"], parts["bias"], (None, None))
    assert made.weight.dtype == dtype
    assert tuple(made.weight.shape) == (COLUMNS, DEEP)
    assert torch.equal(made.weight[:24, :40].float(), parts["weight"].float())
    assert float(made.weight.float().abs().sum()) == float(parts["weight"].float().abs().sum())
    assert made.scale is not None
    assert made.scale[:24].eq(1).all()
    assert linear8_weights(parts["weight"], parts["factor"], parts["bias"]).shift is None


def test_compilers_see_one_op() -> None:
    parts = coded(INT8)
    made = linear8_weights(
        parts["weight"], parts["factor"], parts["bias"], (parts["scale"], parts["shift"])
    )
    arguments = (
        parts["x"], *made[:3], None, parts["added"], *made[3:], 24, "none", 0.0, 1e-3, torch.float16, True,
        INT8, *GRID,
    )  # fmt: skip
    torch.library.opcheck(narrow_linear8_op(), arguments)
    exported = torch.export.export(_Module(arguments), (parts["x"], parts["added"]))
    targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert sum("tersor.narrow_linear8" in t for t in targets) == 1


class _Module(torch.nn.Module):
    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.rest = arguments

    def forward(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        return narrow_linear8(x, *self.rest[1:5], added, *self.rest[6:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, 40, dtype=torch.int16)}, "one type of 8 bits"),
        ({"x": torch.zeros(3, 40).half()}, "one type of 8 bits"),
        ({"x": torch.zeros(3, 300, dtype=INT8)}, "for a weight of 128 inputs"),
        ({"factor": None}, "without factors"),
        ({"width": 129}, "what linear8_weights"),
        ({"activation": "tanh"}, "found activation 'tanh'"),
        ({"half": torch.float32}, "found results in torch.float32"),
        ({"codes": torch.int16}, "and torch.int16"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    parts = coded(INT8)
    made = linear8_weights(parts["weight"], parts["factor"], parts["bias"])
    usual: dict[str, Any] = {
        "x": parts["x"], "weight": made.weight, "factor": made.factor, "bias": made.bias, "sums": None,
        "added": None, "scale": None, "shift": None, "width": 24, "activation": "none", "first_eps": 0.0,
        "last_eps": 0.0, "half": torch.float16, "is_written": True, "codes": None, "step": 1.0, "zero": 0,
        "low": 0, "high": 0,
    }  # fmt: skip
    with pytest.raises(ShapeError, match=words):
        narrow_linear8(**usual | changes)


def test_weights_that_do_not_fit_are_refused() -> None:
    parts = coded(INT8)
    with pytest.raises(ShapeError, match="int8 or float8"):
        linear8_weights(parts["weight"].float(), parts["factor"], parts["bias"])
    with pytest.raises(ShapeError, match="one number an output"):
        linear8_weights(parts["weight"], parts["factor"][:3], parts["bias"])
    wide = torch.zeros(600, 8, dtype=INT8)
    with pytest.raises(ShapeError, match="at most 512 with a norm behind"):
        linear8_weights(wide, torch.ones(600), torch.zeros(600), (None, None))


def test_nothing_in_gives_nothing() -> None:
    parts = coded(INT8)
    parts |= {"x": parts["x"][:, :0], "added": parts["added"][:, :0]}
    y, codes = computed(parts, grid=(INT8, *GRID))
    assert tuple(y.shape) == tuple(codes.shape) == (2, 0, 24)
