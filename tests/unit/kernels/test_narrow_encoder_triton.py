"""The kernels of narrow transformers under Triton's interpreter, and how they are launched; on a card see tests/gpu."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.unit.kernels.interpreter import interpreted

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.timeout(300)
def test_interpreted_kernels_stay_within_the_bound_of_their_formats() -> None:
    found = interpreted("-m", "tests.unit.kernels.interpreted_encoder")
    assert len(found) > 60
    for name, share in found.items():
        assert share <= 1, name


def test_no_checker_of_types_wraps_a_kernel() -> None:
    from triton.runtime.jit import KernelInterface

    from tersor.kernels import activations_triton, narrow_encoder_kernels_triton

    for module, least in ((narrow_encoder_kernels_triton, 4), (activations_triton, 3)):
        kernels = [v for v in vars(module).values() if isinstance(v, KernelInterface)]
        own = [k for k in kernels if k.fn.__module__ == module.__name__]  # type: ignore[attr-defined]
        assert len(own) >= least
        for kernel in own:
            assert kernel.fn.__globals__ is vars(module), kernel.fn.__name__  # type: ignore[attr-defined]


def test_every_activation_has_a_code() -> None:
    from tersor.kernels.activations_triton import ACTIVATION_CODES
    from tersor.kernels.epilogue import ACTIVATIONS

    assert tuple(ACTIVATION_CODES) == ACTIVATIONS
    assert sorted(ACTIVATION_CODES.values()) == list(range(len(ACTIVATIONS)))


@pytest.mark.parametrize("rows", [1, 1024, 1025, 10**6])
@pytest.mark.parametrize("width", [1, 64, 65, 200, 256, 257, 384, 512])
def test_tiles_hold_whole_rows_where_those_are_normed(width: int, rows: int) -> None:
    from tersor.kernels.narrow_linear import COLUMNS, STEP
    from tersor.kernels.narrow_linear_triton import tiles

    filled = width + -width % COLUMNS
    for is_normed in (False, True):
        known = tiles(rows, width, is_normed=is_normed)
        assert len(set(known)) == len(known) >= 2
        for tile in known:
            assert STEP % tile.step == 0
            across = tile.columns * tile.sums
            if is_normed:
                assert across >= width  # in one program
            # What a program loads of a weight is there, and what it leaves out would be written by nobody.
            assert -(-width // across) * across <= filled
    few, many = (tiles(n, width, is_normed=True)[0].rows for n in (1024, 1025))
    assert few < many


def test_an_open_number_of_rows_has_the_tile_of_many() -> None:
    from tersor.kernels.narrow_linear_triton import tiles

    for is_normed in (False, True):
        known = tiles(object(), 192, is_normed=is_normed)
        assert known == tiles(10**6, 192, is_normed=is_normed)


def test_launches_of_an_attention() -> None:
    from tersor.kernels.narrow_attention import SIZES, STEP, TOKENS
    from tersor.kernels.narrow_attention_triton import launches

    for size in SIZES:
        for tokens in (1, 49, TOKENS):
            known = launches(tokens, size)
            assert len(set(known)) == len(known)
            assert all(STEP % launch.step == 0 for launch in known)
    assert launches(49, 64)[0].warps == 4
    assert launches(128, 64)[0].warps == 8
    assert set(launches(49, 64)) == set(launches(128, 64))


def test_tiles_of_other_widths_are_alike() -> None:
    from tersor.kernels.narrow_linear_triton import alike, tiles

    narrow, wide = (tiles(10**4, n, is_normed=True) for n in (192, 512))
    for one, other in zip(narrow, wide, strict=True):
        assert one != other
        assert alike(one, other)
    assert not alike(narrow[0], wide[1])


class Linear(NamedTuple):
    """What tells calls of a linear apart."""

    rows: int = 4096
    inp: int = 192
    width: int = 768
    activation: str = "gelu"
    has_first: bool = True
    has_added: bool = False
    has_last: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def key(self) -> Any:
        from tersor.kernels.narrow_linear_triton import _key

        x = torch.empty(self.rows, self.inp, device="meta", dtype=self.dtype)
        flags = {n: getattr(self, n) for n in ("has_first", "has_added", "has_last")}
        return _key(x, self.width, self.activation, **flags)


def test_near_linears_share_a_tile_and_others_do_not() -> None:
    from tersor.kernels.tiles import choosing, distance

    base = Linear()
    assert distance(base.key, base.key) == 0
    for near in ({"rows": 2048}, {"inp": 97}, {"width": 400}):
        assert 0 < distance(base.key, base._replace(**near).key) <= 1  # type: ignore[arg-type]
    others: tuple[dict[str, Any], ...] = (
        {"rows": 1000}, {"activation": "relu"}, {"has_first": False}, {"has_added": True},
        {"has_last": True}, {"dtype": torch.bfloat16},
    )  # fmt: skip
    for other in others:
        assert distance(base.key, base._replace(**other).key) == float("inf"), other
    with choosing():
        assert distance(base.key, base._replace(rows=1000).key) < float("inf")


def attention_key(
    tokens: int = 49, mask: Tensor | None = None, eps: float | None = 1e-5, *, batch: int = 64,
    heads: int = 3, causal: bool = False,
) -> Any:  # fmt: skip
    from tersor.kernels.narrow_attention_triton import _key, _kind

    x = torch.empty(batch, tokens, 192, device="meta", dtype=torch.float16)
    weight = torch.empty(heads, 3, 192, 64, device="meta", dtype=torch.float16)
    return _key(x, weight, 64, _kind(mask, eps, causal=causal))


def test_near_attentions_share_a_launch_and_others_do_not() -> None:
    from tersor.kernels.tiles import distance

    base = attention_key()
    assert distance(base, attention_key()) == 0
    for near in (attention_key(batch=32), attention_key(heads=5), attention_key(40)):
        assert 0 < distance(base, near) <= 1
    alike = torch.zeros(64, 1, 1, 49).expand(64, 3, 49, 49)
    each = torch.zeros(64, 3, 49, 49)
    keys = [
        base, attention_key(eps=None), attention_key(causal=True), attention_key(mask=alike),
        attention_key(mask=each), attention_key(mask=alike.bool()), attention_key(128), attention_key(heads=4),
    ]  # fmt: skip
    for i, one in enumerate(keys):
        for other in keys[:i]:
            assert distance(one, other) == float("inf")


class Runs(NamedTuple):
    """Stands for a kernel: what it would have been launched with."""

    given: list[dict[str, Any]]

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **sizes: Any) -> None:
            self.given.append({"programs": programs, "arguments": arguments, **sizes})

        return run


@pytest.fixture
def linear_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    from tersor.kernels import narrow_linear_triton as module

    given: list[dict[str, Any]] = []

    def tiled(_: Any, tile: Any) -> Any:
        given.append({"tile": tile})
        return Runs(given)

    monkeypatch.setattr(module, "_tiled", tiled)
    monkeypatch.setattr(module, "wrap_triton", lambda kernel: kernel)
    return given


def test_every_row_and_column_has_a_program(linear_runs: list[dict[str, Any]]) -> None:
    from tersor.kernels.narrow_linear import linear_weights
    from tersor.kernels.narrow_linear_triton import Tile, run

    made = linear_weights(
        torch.zeros(200, 72), None, dtype=torch.float16, first=(None, None), last=(None, None)
    )
    x = torch.zeros(5, 13, 72).half()
    for last, tile in ((False, Tile(16, 64, 64, 1, 4, 4)), (True, Tile(64, 32, 64, 4, 8, 4))):
        linear_runs.clear()
        norm = made[3:] if last else (None, None)
        z = run(x, *made[:3], None, *norm, 200, "silu", 1e-5, 1e-6, tile)
        assert z.shape == (5, 13, 200)
        chosen, launched = linear_runs
        assert chosen["tile"] == tile
        assert launched["programs"] == (2 if last else 5 * 4,)
        sizes = {n: launched[n] for n in ("K", "KP", "D", "DP", "ACTIVATION")}
        assert sizes == {"K": 72, "KP": 128, "D": 200, "DP": 256, "ACTIVATION": 4}
        flags = {n: launched[n] for n in ("NORM_FIRST", "ADD", "NORM_LAST")}
        assert flags == {"NORM_FIRST": True, "ADD": False, "NORM_LAST": last}
        assert launched["arguments"][10:13] == (65, 1e-5, 1e-6)


def test_nothing_is_launched_for_no_rows(linear_runs: list[dict[str, Any]]) -> None:
    from tersor.kernels.narrow_linear import linear_weights
    from tersor.kernels.narrow_linear_triton import run, tiles

    made = linear_weights(torch.zeros(200, 72), None, dtype=torch.float16)
    x, tile = torch.zeros(5, 0, 72).half(), tiles(0, 200, is_normed=False)[0]
    assert run(x, *made[:3], None, *made[3:], 200, "none", 0.0, 0.0, tile).shape == (5, 0, 200)
    assert not linear_runs


@pytest.mark.parametrize("kind", ["none", "float", "bool", "each"])
def test_a_program_a_head_of_a_sample(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from tersor.kernels import narrow_attention_triton as module
    from tersor.kernels.narrow_attention import attention_weights

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "_launched", lambda *_: Runs(given))
    monkeypatch.setattr(module, "wrap_triton", lambda kernel: kernel)
    part = (torch.zeros(40, 72), None)
    made = attention_weights((part, part, part), 2, dtype=torch.float16)
    masks = {
        "none": None,
        "float": torch.zeros(4, 1, 1, 9).half().expand(4, 2, 9, 9),
        "bool": torch.zeros(9, dtype=torch.bool).expand(4, 2, 9, 9),
        "each": torch.zeros(4, 2, 9, 9).half(),
    }
    x, launch = torch.zeros(4, 9, 72).half(), module.launches(9, 32)[0]
    y = module.run(x, *made, masks[kind], 20, 0.5, None, True, launch)
    assert y.shape == (4, 9, 40)
    (found,) = given
    assert found["programs"] == (8,)
    wanted = {"T": 9, "BT": 16, "K": 72, "KP": 128, "S": 32, "SIZE": 20, "NORM": False}
    assert {n: found[n] for n in wanted} == wanted
    assert found["CAUSAL"] is True
    assert found["MASK"] == {"none": 0, "float": 1, "bool": 2, "each": 1}[kind]
    assert found["ALIKE"] == (kind != "each")
    assert found["arguments"][5:8] == (2, 0.0, 0.5)
    strides = {
        "none": (0,) * 4,
        "float": (9, 0, 0, 1),
        "bool": (0, 0, 0, 1),
        "each": (162, 81, 9, 1),
    }
    assert found["arguments"][8:] == strides[kind]
    given.clear()
    assert module.run(x[:0], *made, None, 20, 0.5, None, True, launch).shape == (0, 9, 40)
    assert not given
