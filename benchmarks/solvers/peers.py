"""Other projects' arithmetic on one weight: their packages where they install, else their papers' equations.

All take a weight [m, n] and what they need of its input, and give the weight that their codes stand for.
"""

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

REFERENCE = "reference, by the paper's equations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Bits, inputs that share a step (0: all), and whether there are zero points."""

    bits: int
    group: int
    symmetric: bool

    def width(self, inputs: int) -> int:
        """Inputs that share a step."""
        return self.group if 0 < self.group < inputs else inputs

    @property
    def top(self) -> int:
        """Largest unsigned code."""
        return 2**self.bits - 1


def packaged(name: str) -> str:
    """Name and version of an installed package; "" where it is absent."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def parameters(weight: Tensor, grid: Grid, *, search: bool = False) -> tuple[Tensor, Tensor]:
    """Step and zero point of each row: of the whole range, or the best of 80 shrunken ones.

    Source: the quantizer of Frantar et al. 2022 (GPTQ), code: norm 2.4, 100 steps, down to a fifth.
    """
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    flat = (high - low) == 0
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)

    def of(share: float) -> tuple[Tensor, Tensor]:
        step = share * (high - low) / grid.top
        middle = torch.full_like(step, (grid.top + 1) / 2)
        return step, middle if grid.symmetric else (-share * low / step).round()

    best_step, best_zero = of(1.0)
    if not search:
        return best_step, best_zero
    least = torch.full_like(best_step, torch.inf)
    for index in range(80):
        step, zero = of(1 - index / 100)
        off = (rounded(weight, step, zero, grid) - weight).abs().pow(2.4).sum(1)
        better = off < least
        least = torch.where(better, off, least)
        best_step = torch.where(better, step, best_step)
        best_zero = torch.where(better, zero, best_zero)
    return best_step, best_zero


def rounded(weight: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Rows to the nearest points of their grids."""
    step, zero = step.unsqueeze(1), zero.unsqueeze(1)
    codes = ((weight / step).round() + zero).clamp(0, grid.top)
    return (codes - zero) * step


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Round-to-nearest over the whole range of each group."""
    width = grid.width(weight.shape[1])
    parts = weight.split(width, 1)
    return torch.cat([rounded(p, *parameters(p, grid), grid) for p in parts], 1)


def gptq(weight: Tensor, H: Tensor, grid: Grid, *, search: bool = False) -> Tensor:
    """GPTQ with the activation order, static groups, 1 % damping: what its authors recommend.

    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; static groups of their code.
    """
    W, H = weight.double().clone(), H.double().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    n, width = W.shape[1], grid.width(W.shape[1])
    steps = [parameters(part, grid, search=search) for part in W.split(width, 1)]
    order = H.diagonal().argsort(descending=True, stable=True)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(0.01 * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    Q = torch.empty_like(W)
    places = order.tolist()
    for start in range(0, n, 128):
        stop = min(start + 128, n)
        errors = torch.zeros(len(W), stop - start, dtype=W.dtype)
        for j in range(start, stop):
            step, zero = steps[places[j] // width]
            Q[:, j] = rounded(W[:, j : j + 1], step, zero, grid)[:, 0]
            error = (W[:, j] - Q[:, j]) / U[j, j]
            W[:, j:stop] -= error.unsqueeze(1) * U[j, j:stop]
            errors[:, j - start] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Q[:, order.argsort()]


def auto_round(
    weight: Tensor, rows: Tensor, grid: Grid, *, iterations: int = 200, seed: int = 0
) -> Tensor:
    """Rounding offsets and range factors learnt by signed gradients on the layer's output.

    200 iterations, step 1 / iterations falling to zero, the best iterate kept: the defaults of the
    authors' code; 512 rows an iteration; here a layer at a time.

    Source: Cheng et al. 2023 (SignRound), arXiv:2309.05516, eq. 3-6 and algorithm 1.
    """
    m, n = weight.shape
    width = grid.width(n)
    pad = -n % width
    W = nn.functional.pad(weight.float(), [0, pad]).reshape(-1, width)
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    offsets = torch.zeros_like(W, requires_grad=True)
    shrink = torch.ones(2, len(W), 1, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)

    def dequantized() -> Tensor:
        least, most = low.unsqueeze(1) * shrink[0], high.unsqueeze(1) * shrink[1]
        if grid.symmetric:
            # The full range: the larger side has the code more, so that steps may be negative.
            side = torch.where(most > -least, -most, -least)
            step = side / 2 ** (grid.bits - 1)
            step = torch.where(step == 0, 1.0, step)
            zero = torch.full_like(step, 2 ** (grid.bits - 1))
        else:
            step = ((most - least) / grid.top).clamp(min=1e-9)
            zero = _straight(-least / step).clamp(0, grid.top)
        codes = (_straight(W / step + offsets) + zero).clamp(0, grid.top)
        return ((codes - zero) * step).reshape(m, -1)[:, :n]

    best, least_loss, rate = dequantized().detach(), float("inf"), 1 / iterations
    exact = weight.float()
    for index in range(iterations):
        picked = rows[torch.randint(len(rows), (512,), generator=generator)].float()
        new = dequantized()
        loss = ((exact - new) @ picked.T).square().mean()
        if float(loss.detach()) < least_loss:
            least_loss, best = float(loss.detach()), new.detach().clone()
        slopes = torch.autograd.grad(loss, [offsets, shrink])
        with torch.no_grad():
            scale = rate * (1 - index / iterations)
            offsets.sub_(scale * slopes[0].sign()).clamp_(-0.5, 0.5)
            shrink.sub_(scale * slopes[1].sign()).clamp_(0, 1)
    return best


def hqq(weight: Tensor, grid: Grid) -> Tensor:
    """HQQ's own quantizer; its zero points are floats, which no other method here has."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight.float(),
        nbits=grid.bits,
        group_size=grid.width(weight.shape[1]),
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device="cpu",
    )
    meta = {k: v.float() if isinstance(v, Tensor) else v for k, v in meta.items()}
    return ((codes.float() - meta["zero"]) * meta["scale"]).reshape(weight.shape)


def torchao(weight: Tensor, grid: Grid) -> Tensor:
    """torchao's integer weight-only tensors."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    m, n = weight.shape
    layer = nn.Linear(n, m, bias=False)
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    width = grid.width(n)
    quantize_(
        layer,
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{grid.bits}"),
            granularity=PerAxis(0) if width == n else PerGroup(width),
            mapping_type=MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC,
        ),
    )
    found: Tensor = layer.weight.dequantize().float()
    return found


def nncf(weight: Tensor, rows: Tensor, grid: Grid) -> Tensor:
    """NNCF's compressed weights, 4 bits only, with its scale estimation on these rows."""
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    import nncf as package

    n = weight.shape[1]
    layer = _Single(weight)
    samples = [part.float() for part in rows[:2048].split(64)]
    mode = package.CompressWeightsMode
    small = package.compress_weights(
        layer,
        mode=mode.INT4_SYM if grid.symmetric else mode.INT4_ASYM,
        ratio=1.0,
        group_size=-1 if grid.width(n) == n else grid.group,
        all_layers=True,
        dataset=package.Dataset(samples),
        scale_estimation=True,
    )
    with torch.no_grad():
        found: Tensor = small(torch.eye(n)).T.contiguous()
    return found


class _Single(nn.Module):
    """A model of one linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """[t, n] -> [t, m]."""
        result: Tensor = self.layer(x)
        return result


def _straight(x: Tensor) -> Tensor:
    """Rounded; the gradient passes."""
    return x + (x.round() - x).detach()
