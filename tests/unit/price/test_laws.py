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


def image(channels: int, out: int, pixels: int, stride: int = 1) -> NodeFacts:
    """A depthwise convolution of 3 x 3, or with ``out`` a product at each place."""
    is_single = not out
    window, inputs = (9, 9) if is_single else (1, channels)
    outputs = channels if is_single else out
    return NodeFacts(
        kind="depthwise" if is_single else "conv",
        macs=inputs * pixels * outputs,
        weight_elements=inputs * outputs,
        in_elements=stride**2 * pixels * channels,
        out_elements=pixels * outputs,
        inputs=inputs,
        outputs=outputs,
        window=window,
    )


def one_of_many(rows: dict[str, list[tuple[NodeFacts, float]]]) -> list[NodeTime]:
    return [
        NodeTime(node=node, format="f32", build=i, facts=facts, ms=ms)
        for node, own in rows.items()
        for i, (facts, ms) in enumerate(own)
    ]


def test_channels_that_are_computed_one_by_one_are_gathered_at_a_stride() -> None:
    """A call a channel, and each result: 1.8 ns at stride 1, 5 at stride 2 (ONNX Runtime, f32)."""
    places = {"first": (12544, 1), "second": (3136, 2), "third": (784, 1), "last": (49, 1)}
    counts = (16, 32, 64, 96, 128, 256, 20, 44, 60, 100, 54, 97, 211, 343, 726)

    def ms(channels: int, pixels: int, stride: int) -> float:
        if channels % 4 == 0:
            return 4e-7 * channels * pixels
        return channels * (2.5e-4 + pixels * (5e-6 if stride > 1 else 1.8e-6))

    rows = {
        node: [(image(n, 0, *place), ms(n, *place)) for n in counts]
        for node, place in places.items()
    }
    laws = fit_laws(one_of_many(rows))
    for node, place in places.items():
        for n in (10, 47, 127, 735, 821, 480, 12, 92):
            found = laws.ms(node, "f32", image(n, 0, *place))
            assert found == pytest.approx(ms(n, *place), rel=0.05), (node, n)


def test_fewer_inputs_than_a_block_take_another_kernel() -> None:
    """25 ps a product of 16 inputs and more, 70 of fewer (ONNX Runtime, AVX-512, f32)."""

    def ms(channels: int, out: int) -> float:
        return channels * out * 12544 * (2.5e-8 if channels >= 16 else 7e-8)

    seen = [
        (16, 96),
        (24, 96),
        (32, 48),
        (8, 48),
        (14, 54),
        (12, 96),
        (4, 16),
        (64, 32),
        (5, 40),
        (48, 64),
    ]
    laws = fit_laws(one_of_many({"n": [(image(*c, 12544), ms(*c)) for c in seen]}))
    for c in ((11, 51), (9, 96), (16, 54), (40, 96)):
        assert laws.ms("n", "f32", image(*c, 12544)) == pytest.approx(ms(*c), rel=0.15), c


def test_channels_beyond_whole_vectors_are_worked_on_one_by_one() -> None:
    """Integers with channels innermost: 1 ns a vector of eight, 7 for each further one (ONNX Runtime)."""

    def ms(channels: int, pixels: int) -> float:
        return 1e-6 * pixels * (channels // 8 + 7 * (channels % 8))

    places = {"early": 12544, "late": 784}
    counts = (16, 32, 64, 96, 10, 14, 18, 40, 54, 61, 104, 47)
    rows = {node: [(image(n, 0, p), ms(n, p)) for n in counts] for node, p in places.items()}
    laws = fit_laws(one_of_many(rows))
    for node, pixels in places.items():
        for n in (11, 15, 23, 29, 57, 95, 72):
            found = laws.ms(node, "f32", image(n, 0, pixels))
            assert found == pytest.approx(ms(n, pixels), rel=0.25), (node, n)


def test_sums_that_are_no_fours_cost_each_result() -> None:
    """Integers are multiplied four at a time; the rest takes 0.3 ns a result (ONNX Runtime)."""

    def ms(channels: int, out: int) -> float:
        return 1e-9 * 3136 * out * (2 * channels + (300 if channels % 4 else 0))

    seen = [
        (16, 96),
        (24, 144),
        (32, 48),
        (20, 64),
        (22, 144),
        (9, 96),
        (15, 40),
        (48, 32),
        (26, 104),
        (64, 64),
    ]
    laws = fit_laws(one_of_many({"n": [(image(*c, 3136), ms(*c)) for c in seen]}))
    for c in ((11, 96), (23, 40), (28, 144), (27, 192)):
        assert laws.ms("n", "f32", image(*c, 3136)) == pytest.approx(ms(*c), rel=0.2), c


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
