import itertools

import numpy as np
import pytest

from tersor.core.errors import ConfigError
from tersor.core.records import Candidate
from tersor.plan.macs import Product, least_error, macs_table
from tersor.plan.solve import JOINT_GAP, TOLERANCE


def row(site: str, counts: range | tuple[int, ...], hardness: float) -> tuple[Candidate, ...]:
    """Errors that rise with the square of what is removed."""
    full = max(counts)
    return tuple(
        Candidate(
            site=site, level=k, method="m", size_bytes=0, error=hardness * (1 - k / full) ** 2
        )
        for k in counts
    )


def network() -> tuple[list[Product], dict[str, tuple[Candidate, ...]], dict[str, int]]:
    """Two convolutions around one inner width, a depthwise one, a head, a pinned stream."""
    products = [
        Product(op="stem", factor=27.0, sites=("stream",)),
        Product(op="up", factor=9.0, sites=("stream", "inner")),
        Product(op="deep", factor=9.0, sites=("inner",)),
        Product(op="down", factor=9.0, sites=("inner", "out", "branch")),
        Product(op="head", factor=10.0, sites=("out",)),
        Product(op="constant", factor=100.0),
    ]
    candidates = {
        "inner": row("inner", range(1, 9), 1.0),
        "out": row("out", range(1, 7), 3.0),
        "branch": row("branch", (1, 0), 2.0),
    }
    return products, candidates, {"stream": 4, "inner": 8, "out": 6, "branch": 1}


def count(levels: dict[str, int]) -> int:
    """MACs by the definition of the network above."""
    stream, inner, out, branch = (levels[s] for s in ("stream", "inner", "out", "branch"))
    macs = 27 * stream + 9 * stream * inner + 9 * inner + 9 * inner * out * branch
    return macs + 10 * out + 100


def test_a_table_counts_macs() -> None:
    products, candidates, native = network()
    table = macs_table(products, candidates, native)
    assert table.predict_ms({}, {}) == count(native)
    for inner, out, branch in itertools.product(range(1, 9), range(1, 7), (0, 1)):
        levels = {"inner": inner, "out": out, "branch": branch}
        assert table.predict_ms(levels, {}) == count({**native, **levels})


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_least_error_at_a_number_of_macs(share: float) -> None:
    products, candidates, native = network()
    budget = share * count(native)
    solution = least_error(candidates, macs_table(products, candidates, native), budget)
    best = min(
        sum(c.error for c in chosen)
        for chosen in itertools.product(*candidates.values())
        if count({**native, **{c.site: c.level for c in chosen}}) <= budget
    )
    assert count({**native, **solution.assignment}) <= budget
    assert solution.totals.error <= best * (1 + JOINT_GAP) + 1e-6
    assert solution.binding == "latency"


def test_a_width_without_a_full_count_is_refused() -> None:
    products, candidates, native = network()
    del native["stream"]
    with pytest.raises(ConfigError, match=r"stem: width stream has no full count among \['branch'"):
        macs_table(products, candidates, native)


def test_a_residual_network_of_twenty_layers_is_solved_on_a_fine_grid() -> None:
    """Nine inner widths and three residual ones, every second count: 8,000 products."""
    rng = np.random.default_rng(0)
    native = {f"stream{i}": 16 * 2**i for i in range(3)}
    products = [Product(op="stem", factor=27 * 1024, sites=("stream0",))]
    for i, b in itertools.product(range(3), range(3)):
        native[f"w{i}{b}"] = 16 * 2**i
        source, area = f"stream{max(0, i - 1) if b == 0 else i}", 1024 // 4**i
        products.append(Product(op=f"a{i}{b}", factor=9 * area, sites=(source, f"w{i}{b}")))
        products.append(Product(op=f"b{i}{b}", factor=9 * area, sites=(f"w{i}{b}", f"stream{i}")))
    candidates = {s: row(s, range(2, n + 1, 2), rng.lognormal(0, 1)) for s, n in native.items()}
    table = macs_table(products, candidates, native)
    half = table.predict_ms({}, {}) / 2
    solution = least_error(candidates, table, half)
    assert solution.status == "optimal"
    assert solution.gap <= JOINT_GAP
    # The first plan below the budget is within a few grid steps of it.
    assert 0.97 * half <= solution.totals.ms <= half * (1 + TOLERANCE)
