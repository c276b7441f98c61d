"""Fashion-MNIST on the device, and what is done to its images while training."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.prune import accuracy as share_right
from benchmarks.prune import read

VALIDATION = 5_000
SIDE, PAD = 28, 2
# Of what is drawn for an image: first row and column, mirrored, middle of what is erased.
ENDS = (2 * PAD + 1, 2 * PAD + 1, 2, SIDE, SIDE)


@dataclass(frozen=True, slots=True)
class Data:
    """Images and labels on the device; those for training with two more pixels on each side.

    Attributes:
        padded: [images, 32, 32].
        labels: [images].
    """

    padded: Tensor
    labels: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, images: int, device: str) -> "Data":
        """The last training images are for validation."""
        train, labels = (t.to(device) for t in read("train"))
        test = read("t10k")
        last = len(train) - VALIDATION
        count = min(images, last)
        return cls(
            padded(train[:count]),
            labels[:count],
            (train[last:], labels[last:]),
            (test[0].to(device), test[1].to(device)),
        )

    @property
    def example(self) -> Tensor:
        """Four images on the CPU."""
        return self.padded[:4, None, PAD : PAD + SIDE, PAD : PAD + SIDE].cpu()

    def batch(self, plan: Tensor, erase: int) -> tuple[Tensor, Tensor]:
        """Images [b, 1, 28, 28] and labels of a plan [6, b]: nothing is read from the device."""
        return changed(self.padded, plan, erase), self.labels[plan[0]]


def changed(padded: Tensor, plan: Tensor, erase: int) -> Tensor:
    """Images [b, 1, 28, 28]: shifted, mirrored and with a square at zero, each in its own way.

    Args:
        padded: [n, 32, 32].
        plan: [6, b]: which image, first row and column, mirrored, middle of the square.
        erase: Side of the square whose pixels become zero, the mean; 0: none.
    """
    index, row, column, mirror, middle, center = (part[:, None] for part in plan)
    along = torch.arange(SIDE, device=plan.device)[None]
    across = torch.where(mirror > 0, SIDE - 1 - along, along)
    x = padded[index[:, :, None], (row + along)[:, :, None], (column + across)[:, None]]
    if erase:
        rows, columns = (along - m + erase // 2 for m in (middle, center))
        inside = [(r >= 0) & (r < erase) for r in (rows, columns)]
        x = x.masked_fill(inside[0][:, :, None] & inside[1][:, None], 0.0)
    return x[:, None]


def padded(images: Tensor) -> Tensor:
    """Two more pixels on each side, [n, 1, 28, 28] -> [n, 32, 32]."""
    return functional.pad(images, (PAD,) * 4, mode="replicate")[:, 0]


def plans(count: int, *, batch: int, epochs: int, seed: int, device: str) -> Iterator[Tensor]:
    """What each step trains on [6, batch]: the same for every arm, on every device."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(epochs):
        drawn = [torch.randint(0, end, (count,), generator=generator) for end in ENDS]
        table = torch.stack([torch.randperm(count, generator=generator), *drawn]).to(device)
        for begin in range(0, count - batch + 1, batch):
            yield table[:, begin : begin + batch]


def accuracy(model: torch.nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Percent that are right."""
    was = model.training
    model.eval()
    found = share_right(model, *part)
    model.train(was)
    return found
