"""How many directions of a weight count: its stable rank, followed over a run by power iteration.

Axes: m outputs and n inputs.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def stable_rank(
    weight: Float[Tensor, "m n"], vector: Float[Tensor, " n"], steps: int
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """||W||_F^2 / ||W||_2^2, between 1 and the rank, and the vector to begin with the next time.

    Args:
        weight: W; read only.
        vector: Of length 1, not at a right angle to W's first right singular vector: a random one, or the last
            call's, from which a few steps are enough where W has moved little.
        steps: Of power iteration with W^T W, >= 1. Too few give a rank that is too large, never too small.

    Returns:
        The rank, a tensor on the device (nothing is read from it), 0 of a weight of zeros; and the new vector.

    Source: Rudelson and Vershynin 2007, arXiv:math/0503442, 1.3 (stable, there numerical, rank).
    """
    W = weight.detach().float()
    v = vector
    for _ in range(steps):
        turned = W.mT @ (W @ v)
        norm = turned.norm()
        v = torch.where(norm > 0, turned / norm.clamp(min=torch.finfo(W.dtype).tiny), v)
    first = (W @ v).square().sum()
    whole = W.square().sum()
    # A weight of zeros has no direction; one of no numbers stays so, and is found out by its reader.
    return torch.where(whole == 0, torch.zeros_like(whole), whole / first), v
