"""Weights of 4, 3 and 2 bits: every method on the same groups, with the same freedom of its grid."""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.solvers import peers
from benchmarks.solvers.cells import Setting
from benchmarks.solvers.layers import Layer, Solve, Subject
from benchmarks.solvers.peers import REFERENCE, Grid
from benchmarks.solvers.rows import Recorder
from tersor.ops.codebook import CodebookScheme, decode
from tersor.ops.codebook_fit import fit_codebook
from tersor.ops.group_grids import GroupGrid, dequantize
from tersor.ops.group_rounding import round_weight

BITS = (4, 3, 2)
# Layers of ResNet-20 have 9 to 576 inputs: a step an output there, as its kernels would have.
GROUPS: Mapping[str, int] = {"minilm": 64, "lm": 64, "resnet20": 0, "lenet5": 0}
QUICK = ("round-to-nearest", "GPTQ", "GPTQ, searched steps", "HQQ", "torchao", "ours")
SLOW = ("ours, table an output", "NNCF, scale estimation", "AutoRound")
SEQUENTIAL = ("GPTQ, searched steps", "ours")


def ours(grid: Grid) -> Solve:
    """Feedback, then descent in codes, steps and zero points."""
    own = GroupGrid(bits=grid.bits, group=grid.group or None, symmetric=grid.symmetric)

    def solve(layer: Layer) -> Tensor:
        done = round_weight(layer.target, layer.covariance, own)
        return dequantize(done.codes, done.steps, own)

    return solve


def table(grid: Grid) -> Solve:
    """As many values as the grid has, a table an output: not the same freedom, and other bytes."""
    scheme = CodebookScheme(entries=2**grid.bits, outputs=1, value_dtype=torch.float16)

    def solve(layer: Layer) -> Tensor:
        return decode(fit_codebook(layer.target, layer.covariance, scheme).codebook)

    return solve


def methods(grid: Grid) -> dict[str, tuple[Solve, str]]:
    """Name -> how a layer is solved, and whose arithmetic it is; packages that are absent have no row."""

    def flat(solve: Callable[[Tensor, Layer], Tensor]) -> Solve:
        return lambda layer: solve(layer.weight[0], layer).double().unsqueeze(0)

    def feedback(*, search: bool) -> Solve:
        return flat(lambda w, layer: peers.gptq(w, layer.second_moment[0], grid, search=search))

    found: dict[str, tuple[Solve, str]] = {
        "round-to-nearest": (flat(lambda w, _: peers.nearest(w, grid)), REFERENCE),
        "GPTQ": (feedback(search=False), REFERENCE),
        "GPTQ, searched steps": (feedback(search=True), REFERENCE),
        "ours": (ours(grid), "tersor"),
    }
    if grid.symmetric:
        found["ours, table an output"] = (table(grid), "tersor")
    elif find_spec("hqq"):
        found["HQQ"] = (flat(lambda w, _: peers.hqq(w, grid)), "hqq 0.2.8.post1")
    if package := peers.packaged("torchao"):
        found["torchao"] = (flat(lambda w, _: peers.torchao(w, grid)), package)
    if grid.bits == 4 and (package := peers.packaged("nncf")):
        found["NNCF, scale estimation"] = (
            flat(lambda w, layer: peers.nncf(w, layer.some_rows(), grid)),
            package,
        )
    found["AutoRound"] = (
        flat(lambda w, layer: peers.auto_round(w, layer.some_rows(), grid)),
        REFERENCE,
    )
    return found


def setting(grid: Grid) -> str:
    """What the methods of a cell share."""
    groups = f"groups of {grid.group}" if grid.group else "a step an output"
    return f"{grid.bits} bits, {groups}, {'symmetric' if grid.symmetric else 'zero points'}"


def run(subject: Subject, model: str, recorder: Recorder) -> None:
    """Every cell of one model that is not recorded yet; what takes long comes last."""
    places = {
        grid: Setting(
            table="rounding", model=model, name=setting(grid), subject=subject, recorder=recorder
        )
        for grid in _grids(model)
    }
    for names in (QUICK, SLOW):
        for grid, place in places.items():
            for name, method in methods(grid).items():
                if name in names:
                    place.layers(name, *method)
        for grid, place in places.items():
            for name in set(SEQUENTIAL) & set(names):
                place.sequential(name, *methods(grid)[name])


def _grids(model: str) -> Iterator[Grid]:
    for symmetric in (True, False):
        for bits in BITS:
            yield Grid(bits=bits, group=GROUPS[model], symmetric=symmetric)
