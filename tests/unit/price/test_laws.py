import numpy as np
import pytest

from tersor.graph.facts import NodeFacts
from tersor.price.laws import NodeTime, fit_laws


def linear(inp: int, out: int, rows: int = 100) -> NodeFacts:
    return NodeFacts(
        kind="linear",
        macs=rows * inp * out,
        weight_elements=inp * out,
        in_elements=rows * inp,
        out_elements=rows * out,
        inputs=inp,
        outputs=out,
    )


def staircase(inp: int, out: int, tiles: tuple[int, int]) -> float:
    return 0.01 + 1e-3 * -(-inp // tiles[0]) * -(-out // tiles[1]) * tiles[0] * tiles[1] / 256


def times(tiles: tuple[int, int], noise: float = 0.0, seed: int = 0) -> list[NodeTime]:
    rng = np.random.default_rng(seed)
    return [
        NodeTime(
            node=f"n{node}",
            format="int8",
            build=build,
            facts=linear(inp, out),
            ms=(1 + node) * staircase(inp, out, tiles) * float(np.exp(noise * rng.normal())),
        )
        for build in range(12)
        for node in range(4)
        for inp, out in [rng.integers(4, 40, size=2).tolist()]
        for inp, out in [(8 * inp - 4 * (inp % 2), 8 * out - 4 * (out % 2))]
    ]


@pytest.mark.parametrize("tiles", [(64, 16), (32, 16), (16, 64), (8, 32)])
@pytest.mark.parametrize("sizes", [(100, 140), (140, 100), (292, 68), (68, 292)])
def test_staircases_are_found_from_the_times(
    tiles: tuple[int, int], sizes: tuple[int, int]
) -> None:
    laws = fit_laws(times(tiles, noise=0.01))
    for node in range(4):
        found = laws.ms(f"n{node}", "int8", linear(*sizes))
        assert found == pytest.approx((1 + node) * staircase(*sizes, tiles), rel=0.05)


def test_an_odd_number_of_blocks_costs_more_than_a_whole_number_of_pairs() -> None:
    """Inputs are read again for each group of outputs, of as many blocks as divide their number."""

    def ms(out: int) -> float:
        blocks = -(-out // 8)
        at_once = max(d for d in (1, 2, 3, 4) if blocks % d == 0)
        return 0.01 + 1e-4 * blocks * (2 + 1 / at_once)

    seen = [8 * n for n in (2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 16, 24)]
    rows = [
        NodeTime(node="n", format="f32", build=i, facts=linear(64, out), ms=ms(out))
        for i, out in enumerate(seen)
    ]
    laws = fit_laws(rows)
    for out in (8 * 11, 8 * 9, 8 * 20):
        assert laws.ms("n", "f32", linear(64, out)) == pytest.approx(ms(out), rel=0.03)


def test_a_pool_of_ragged_channels_is_another_law() -> None:
    """What it costs follows what is read, not only what is written."""

    def pool(channels: int, window: int) -> NodeFacts:
        n = channels * 900
        return NodeFacts(
            kind="pool",
            in_elements=window * n,
            out_elements=n,
            inputs=channels,
            outputs=channels,
        )

    def ms(channels: int, window: int) -> float:
        return channels * window * (0.002 if channels % 8 == 0 else 0.02)

    seen = (8, 13, 16, 24, 27, 32, 45, 48, 64, 71)
    rows = [
        NodeTime(node="p", format="f32", build=i, facts=pool(n, w), ms=ms(n, w))
        for i, n in enumerate(seen)
        for w in (9, 25, 49)
    ]
    laws = fit_laws(rows)
    for n in (40, 56, 29, 61):
        for w in (9, 49):
            assert laws.ms("p", "f32", pool(n, w)) == pytest.approx(ms(n, w), rel=0.15)


def test_both_sides_off_a_block_cost_what_one_does() -> None:
    """Either takes a kernel to another layout; builds seldom show both."""

    def ms(inp: int, out: int) -> float:
        return 1e-4 * inp * out * (1.0 if inp % 8 == out % 8 == 0 else 1.5)

    whole, ragged = (32, 48, 64, 96, 128, 160), (36, 52, 76, 108, 140, 164)
    pairs = [(a, b) for a in whole for b in whole]
    pairs += [(a, b) for a in whole for b in ragged] + [(b, a) for a in whole for b in ragged]
    rows = [
        NodeTime(node="n", format="f32", build=i % 9, facts=linear(*pair), ms=ms(*pair))
        for i, pair in enumerate(pairs)
    ]
    laws = fit_laws(rows)
    for pair in ((60, 100), (100, 60), (148, 148)):
        assert laws.ms("n", "f32", linear(*pair)) == pytest.approx(ms(*pair), rel=0.15)


def test_depthwise_kernels_may_want_fours() -> None:
    """As fast at 12 channels as eights are, and six times as slow at 13 (ONNX Runtime, f32)."""

    def depthwise(channels: int, pixels: int = 196) -> NodeFacts:
        return NodeFacts(
            kind="depthwise",
            macs=9 * pixels * channels,
            weight_elements=9 * channels,
            in_elements=pixels * channels,
            out_elements=pixels * channels,
            inputs=9,
            outputs=channels,
            window=9,
        )

    def ms(channels: int) -> float:
        return channels * (0.001 if channels % 4 == 0 else 0.006)

    seen = (16, 24, 32, 48, 64, 96, 44, 76, 13, 37, 54, 71)
    rows = [
        NodeTime(node="d", format="f32", build=i, facts=depthwise(n), ms=ms(n))
        for i, n in enumerate(seen)
    ]
    laws = fit_laws(rows)
    for n in (12, 20, 28, 40, 80, 92, 21, 58, 87):
        assert laws.ms("d", "f32", depthwise(n)) == pytest.approx(ms(n), rel=0.1)
