"""Zeros: shares of a layer, and two of every four."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.solvers.cells import Setting
from benchmarks.solvers.layers import Layer, Subject
from benchmarks.solvers.peers import REFERENCE
from benchmarks.solvers.rows import Recorder
from tersor.ops.admm import choose_support
from tersor.ops.sparsity import NofM, Pattern, Unstructured, best_mask
from tersor.ops.support import refit_support

PATTERNS: Mapping[str, Pattern] = {
    "50 % zeros": Unstructured(kept=0.5),
    "70 % zeros": Unstructured(kept=0.3),
    "90 % zeros": Unstructured(kept=0.1),
    "2 of 4": NofM(kept=2, of=4),
}
SEQUENTIAL = ("SparseGPT", "ours")


def magnitude(layer: Layer, pattern: Pattern) -> Tensor:
    """The largest weights of the layer."""
    return layer.weight * best_mask(layer.weight.abs(), pattern)


def wanda(layer: Layer, pattern: Pattern) -> Tensor:
    """|w| |x|, compared within an output.

    Source: Sun et al. 2023 (Wanda), arXiv:2306.11695, eq. 1 and algorithm 1.
    """
    scores = layer.weight.square() * layer.second_moment.diagonal(dim1=1, dim2=2).unsqueeze(1)
    if isinstance(pattern, Unstructured):
        pattern = Unstructured(kept=pattern.kept, each_row=True)
    return layer.weight * best_mask(scores, pattern)


def sparse_gpt(layer: Layer, pattern: Pattern, block: int = 128) -> Tensor:
    """Masks in blocks of 128 columns, errors fed to the columns behind; 1 % damping.

    Source: Frantar and Alistarh 2023 (SparseGPT), arXiv:2301.00774, algorithm 1.
    """
    W, H = layer.weight[0].clone(), layer.second_moment[0].clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    n = W.shape[1]
    for start in range(0, n, block):
        stop = min(start + block, n)
        part, errors = W[:, start:stop], torch.zeros_like(W[:, start:stop])
        pivots = U.diagonal()[start:stop]
        keep = torch.ones_like(part, dtype=torch.bool)
        if isinstance(pattern, Unstructured):
            keep = best_mask(((part / pivots).square())[None], pattern)[0]
        for j in range(start, stop):
            if isinstance(pattern, NofM) and j % pattern.of == 0:
                here = slice(j - start, j - start + pattern.of)
                keep[:, here] = best_mask(((part[:, here] / pivots[here]).square())[None], pattern)[
                    0
                ]
            error = W[:, j] * ~keep[:, j - start] / U[j, j]
            W[:, j] = W[:, j] * keep[:, j - start]
            W[:, j + 1 : stop] -= error.unsqueeze(1) * U[j, j + 1 : stop]
            errors[:, j - start] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W.unsqueeze(0)


def ours(layer: Layer, pattern: Pattern) -> Tensor:
    """ADMM for the support, least squares on it."""
    support = choose_support(layer.target, layer.covariance, pattern)
    return refit_support(layer.target, layer.covariance, support.keep, damping=1e-2).weight


METHODS: Mapping[str, tuple[Callable[[Layer, Pattern], Tensor], str]] = {
    "magnitude": (magnitude, REFERENCE),
    "Wanda": (wanda, REFERENCE),
    "SparseGPT": (sparse_gpt, REFERENCE),
    "ours": (ours, "tersor"),
}


def run(subject: Subject, model: str, recorder: Recorder) -> None:
    """Every cell of one model that is not recorded yet; layers that do not split into fours stay dense."""
    for setting, pattern in PATTERNS.items():
        place = Setting(
            table="sparsity", model=model, name=setting, subject=subject, recorder=recorder
        )
        for name, (method, source) in METHODS.items():

            def solve(
                layer: Layer,
                method: Callable[[Layer, Pattern], Tensor] = method,
                pattern: Pattern = pattern,
            ) -> Tensor:
                if isinstance(pattern, NofM) and layer.weight.shape[2] % pattern.of:
                    return layer.weight
                return method(layer, pattern)

            place.layers(name, solve, source)
            if name in SEQUENTIAL:
                place.sequential(name, solve, source)
