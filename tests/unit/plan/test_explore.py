"""The search where errors interact, so that their sum is wrong."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tersor.core.records import BuildChoice, Candidate, Level, PriceTable
from tersor.plan.explore import SHARES, TAKEN, Aim, Explorer
from tersor.plan.problem import Problem
from tersor.plan.ranks import Grid
from tersor.plan.solve import optimise
from tersor.plan.surrogate import Surrogate

N = 16
SAMPLES = 64


def key_of(plan: Mapping[str, Level]) -> tuple[tuple[str, Level], ...]:
    return tuple(sorted(plan.items()))


@dataclass
class Pairs:
    """A loss with products of sites that no single error shows, and all plans by brute force.

    One fifth of the pairs add up to twice the geometric mean of their errors, or take it away.
    """

    seed: int
    strength: float = 1.0
    limit: int = 100
    spread: float = 0.0  # of a sample's loss around the plan's, relative
    max_loss: float = float("inf")
    seen: dict[object, float] = field(default_factory=dict)
    calls: list[tuple[object, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        errors, gains = rng.lognormal(-5, 0.6, N), rng.uniform(0.2, 0.6, N)
        matrix = np.eye(N)
        for i, j in itertools.combinations(range(N), 2):
            if rng.random() < 0.2:
                matrix[i, j] = rng.uniform(-1, 1) * self.strength
        root = np.sqrt(errors)
        self.products = matrix * np.outer(root, root)
        self.sites = [f"s{i:02d}" for i in range(N)]
        candidates, ops = {}, {}
        for site, error, gain in zip(self.sites, errors, gains, strict=True):
            ops[site] = {"f32": 1.0, "int8": 1.0 - float(gain)}
            f32 = Candidate(site=site, level="f32", method="q", size_bytes=4)
            candidates[site] = (f32, replace(f32, level="int8", size_bytes=1, error=float(error)))
        table = PriceTable(choice=BuildChoice(backend="fake"), ops=ops, quantizers={}, glue_ms=1.0)
        every = ((np.arange(2**N)[:, None] >> np.arange(N)) & 1).astype(float)
        self.all_losses = np.maximum(
            np.einsum("ki,ij,kj->k", every, self.products, every, optimize=True), 1e-6
        )
        self.all_ms = 1.0 + N - every @ gains
        self.cap = float(self.all_ms.min() + 0.4 * np.ptp(self.all_ms))
        free = Problem(candidates=candidates, table=table, tensors={}, objective="error")
        self.problem = replace(free, max_ms=self.cap)
        self.start = optimise(self.problem).assignment

    def loss(self, plan: Mapping[str, Level]) -> float:
        x = np.array([plan[s] == "int8" for s in self.sites], dtype=float)
        return max(float(x @ self.products @ x), 1e-6)

    def look(self, plan: Mapping[str, Level], share: float) -> np.ndarray:
        self.seen[key_of(plan)] = self.loss(plan)
        self.calls.append((key_of(plan), share))
        n = max(1, round(share * SAMPLES))
        if not self.spread:
            return np.array([self.loss(plan)])
        # What a sample loses beside the plan: its own, the plan's on it, and zero on average.
        draw = np.random.default_rng(abs(hash(tuple(map(str, key_of(plan))))) % 2**32)
        own = draw.standard_normal(SAMPLES)
        return self.loss(plan) * (1 + self.spread * (own - own.mean()))[:n]

    def accepts(self, plan: Mapping[str, Level]) -> bool:
        return self.loss(plan) <= self.max_loss

    @property
    def looks_left(self) -> int:
        return self.limit - len(self.seen)

    @property
    def optimum(self) -> float:
        return float(self.all_losses[self.all_ms <= self.cap + 1e-9].min())


def search(world: Pairs, seed: int = 0) -> Explorer:
    explorer = Explorer(Aim(problem=world.problem, seed=seed), world, world.start)
    explorer.run()
    return explorer


def blind_swaps(world: Pairs, looks: int, seed: int) -> float:
    """The best of random swaps around the best plan so far, each within the latency."""
    rng = np.random.default_rng(seed)
    best, seen = dict(world.start), {key_of(world.start)}
    for _ in range(3000):  # around a plan that no swap improves there is nothing new soon
        if len(seen) >= looks:
            break
        plan = dict(best)
        for site in rng.choice(world.sites, 2, replace=False):
            plan[str(site)] = "f32" if plan[str(site)] == "int8" else "int8"
        if key_of(plan) in seen or world.problem.totals(plan).ms > world.cap:
            continue
        seen.add(key_of(plan))
        best = min(best, plan, key=world.loss)
    return world.loss(best)


@pytest.mark.parametrize("seed", [0, 1, 3, 5])
def test_the_optimum_is_found_where_blind_swaps_miss_it(seed: int) -> None:
    world = Pairs(seed)
    assert world.loss(world.start) > 1.1 * world.optimum  # the sum alone is wrong
    assert world.loss(search(world).best) <= world.optimum * (1 + 1e-9)
    assert len(world.seen) <= 50
    assert blind_swaps(Pairs(seed), 100, 0) > 1.05 * world.optimum


@pytest.mark.parametrize("limit", [1, 5, 23])
def test_the_looks_are_never_exceeded(limit: int) -> None:
    world = Pairs(1, strength=2.0, limit=limit)
    found = search(world)
    assert len(world.seen) <= limit
    assert world.loss(found.best) <= world.loss(world.start)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_kept_that_all_samples_say_is_worse(seed: int) -> None:
    """Few samples are far off here, and none is kept by what they say."""
    world = Pairs(seed, strength=2.0, spread=1.5, limit=60)
    found = search(world)
    whole = {key for key, share in world.calls if share == 1.0}
    losses = [world.loss(world.start), *map(world.loss, found.found)]
    assert all(b < a for a, b in itertools.pairwise(losses))
    assert {key_of(plan) for plan in found.found} <= whole
    assert world.problem.totals(found.best).ms <= world.cap * (1 + 1e-9)


def test_a_round_looks_at_many_on_few_samples_and_at_few_on_all() -> None:
    world = Pairs(0, strength=2.0, spread=0.3, limit=60)
    search(world)
    counts = [len({k for k, share in world.calls if share >= least}) for least in SHARES]
    assert counts[0] > counts[1] > counts[2] > 1
    assert counts[0] == len(world.seen)
    assert counts[2] - 1 <= (counts[0] - 1) * TAKEN[2] / TAKEN[0] + TAKEN[2]


def test_equal_plans_change_nothing() -> None:
    """A difference below its standard error is none: the older plan stays."""
    world = Pairs(0, strength=0.0, spread=3.0, limit=40)
    found = search(world)
    for plan in found.found:
        assert world.loss(plan) < 0.99 * world.loss(world.start)


def test_the_same_seed_gives_the_same_search() -> None:
    one, two = Pairs(2, strength=2.0), Pairs(2, strength=2.0)
    assert search(one).best == search(two).best
    assert one.calls == two.calls


def test_the_search_ends_early_where_the_sum_is_right() -> None:
    world = Pairs(3, strength=0.0)
    found = search(world)
    assert world.loss(found.best) <= world.loss(world.start)
    assert len(world.seen) < 50
    assert found.reason.startswith(("no plan is left", "nothing was gained in"))


def test_a_loss_budget_asks_for_the_fastest_plan_that_holds() -> None:
    world = Pairs(5, strength=1.0)
    native = dict.fromkeys(world.sites, "f32")
    world.max_loss = 0.3 * world.loss(dict.fromkeys(world.sites, "int8"))
    problem = replace(world.problem, objective="latency", max_ms=None)
    explorer = Explorer(Aim(problem=problem), world, native)
    found = explorer.run()
    best = float(world.all_ms[world.all_losses <= world.max_loss].min())
    times = [problem.totals(p).ms for p in (native, *found)]
    assert all(b < a for a, b in itertools.pairwise(times))
    assert all(world.loss(p) <= world.max_loss for p in found)
    assert times[-1] <= 1.03 * best


def test_the_surrogate_is_the_sum_of_errors_before_it_learns() -> None:
    world = Pairs(0, strength=0.0)
    grid = Grid(world.problem)
    whole: dict[str, Level] = dict.fromkeys(world.sites, "int8")
    x = grid.encode([world.start, whole])
    # Losses in other units than errors.
    surrogate = Surrogate(grid, x[1:], np.array([2 * world.loss(whole)]), np.zeros(1))
    mean, deviation = surrogate.predict(x)
    assert mean == pytest.approx([2 * world.loss(world.start), 2 * world.loss(whole)], rel=0.02)
    assert deviation[0] > deviation[1]


def test_the_surrogate_learns_which_pair_is_off() -> None:
    world = Pairs(0, strength=0.0)
    a, b = (int(i) for i in np.argsort(-np.diag(world.products))[:2])
    world.products[min(a, b), max(a, b)] = 2 * np.sqrt(world.products[a, a] * world.products[b, b])
    grid, rng = Grid(world.problem), np.random.default_rng(0)
    x = rng.integers(0, 2, (140, N))
    truth = np.array([world.loss(grid.decode(row)) for row in x])
    sums = np.array([world.problem.totals(grid.decode(row)).error for row in x])
    surrogate = Surrogate(grid, x[:100], truth[:100], np.zeros(100))
    learnt, deviations = surrogate.predict(x[100:])
    off = np.abs(learnt / truth[100:] - 1)
    assert off.mean() < 0.5 * np.abs(sums / truth - 1)[100:].mean()
    assert (np.abs(learnt - truth[100:]) < 4 * deviations).all()
    # Around a plan with one of the two the other costs more than alone.
    row = np.zeros(N, dtype=np.int64)
    alone, _ = surrogate.around(row)
    row[a] = 1
    beside, _ = surrogate.around(row)
    errors = [next(c.error for c in rows[world.sites[b]] if c.level == "int8")
              for rows in (alone, beside)]  # fmt: skip
    assert errors[1] > 1.5 * errors[0]


def test_a_loss_known_from_few_samples_counts_less() -> None:
    world = Pairs(0, strength=0.0)
    grid = Grid(world.problem)
    x = grid.encode([world.start, dict.fromkeys(world.sites, "int8")])
    y = np.array([2 * world.loss(world.start), world.loss(grid.decode(x[1]))])
    sure = Surrogate(grid, x, y, np.zeros(2)).predict(x[:1])[0][0]
    rough = Surrogate(grid, x, y, np.array([y[0], 0.0])).predict(x[:1])[0][0]
    assert abs(rough - y[0]) > abs(sure - y[0])
