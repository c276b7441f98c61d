"""What solvers take: to be run on a machine that does nothing else."""

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.solvers import rounding
from benchmarks.solvers.layers import Layer
from benchmarks.solvers.peers import Grid
from benchmarks.solvers.rows import Recorder, Row
from benchmarks.solvers.subjects import SENTENCES, batches, minilm_parts
from tersor.analyse.calibration import site_statistics
from tersor.analyse.sites import find_sites
from tersor.graph.contracts import Method
from tersor.methods.codebook import Codebook
from tersor.methods.lowrank import Lowrank
from tersor.methods.quantize import Quantize
from tersor.methods.sparsify import Sparsify
from tersor.observe.statistics import observe
from tersor.ops.moments import Moments

SIDE = 4096
GOALS = {"minilm": 60.0, "square": 20.0}


def seconds_of(call: Callable[[], object], repeats: int = 7) -> float:
    """Median of several calls after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return median(times)


def run(model: str, recorder: Recorder) -> None:
    """One row: seconds of all candidates of MiniLM, or of one square layer at 4 bits."""
    threads = torch.get_num_threads()
    setting = f"{threads} threads"
    if recorder.has("cost", model, setting, "ours", "layer"):
        return
    seconds = minilm_seconds(recorder.seed) if model == "minilm" else square_seconds(recorder.seed)
    recorder.add(
        Row(
            table="cost",
            model=model,
            setting=setting,
            method="ours",
            quality=seconds,
            detail={"goal seconds": GOALS[model], "load": list(_load())},
        )
    )


def square_seconds(seed: int) -> dict[str, float]:
    """4096 x 4096 weights, 4 bits, groups of 128, of a made-up correlated input."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, SIDE, SIDE, generator=generator, dtype=torch.float64) * 0.02
    x = torch.randn(SIDE, SIDE, generator=generator) @ torch.randn(SIDE, 256, generator=generator)
    rows = torch.cat([x.T, torch.randn(2 * SIDE, SIDE, generator=generator) * 4]).double()
    moments = Moments(count=len(rows), xx=(rows.T @ rows)[None], x=rows.sum(0)[None])
    layer = Layer(name="square", weight=weight, kernel=(), halves=(moments,))
    layer.covariance  # noqa: B018 - statistics are not the solver's time
    begun = time.perf_counter()
    rounding.ours(Grid(bits=4, group=128, symmetric=True))(layer)
    return {"seconds": time.perf_counter() - begun}


def minilm_seconds(seed: int) -> dict[str, float]:
    """One statistics pass over MiniLM, then every level of every method, site by site as a run does.

    What methods share of a site is counted at the first of them that needs it.
    """
    graph, flat = minilm_parts(SENTENCES, seed)
    calibration = batches(flat["calibration"], 32)
    begun = time.perf_counter()
    sites = [s for s in find_sites(graph) if s.op_kind != "embedding"]
    observed = observe(graph, calibration, len(calibration), seed=seed)
    statistics = site_statistics(graph, sites, observed)
    found = {"statistics s": time.perf_counter() - begun}
    ways: dict[str, Method] = {
        "quantize s": Quantize(),
        "codebook s": Codebook(),
        "sparsify s": Sparsify(),
        "lowrank s": Lowrank(),
    }
    found |= dict.fromkeys(ways, 0.0)
    for site in sites:
        known = statistics[site.name]
        for name, method in ways.items():
            begun = time.perf_counter()
            for candidate in method.propose(site, known):
                method.apply(site, candidate, known)
            found[name] += time.perf_counter() - begun
    return {**found, "seconds": sum(found.values())}


def _load() -> tuple[float, float, float]:
    import os

    return os.getloadavg()
