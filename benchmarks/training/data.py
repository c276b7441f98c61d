"""Fashion-MNIST on the device, and what is done to its images while training."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.prune import read

VALIDATION = 5_000
SIDE, PAD = 28, 2
ROWS = 6  # of a plan: image, first row and column, mirrored, middle of what is erased


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
            functional.pad(train[:count], (PAD,) * 4, mode="replicate")[:, 0],
            labels[:count],
            (train[last:], labels[last:]),
            (test[0].to(device), test[1].to(device)),
        )

    @property
    def example(self) -> Tensor:
        """Four images on the CPU."""
        return self.padded[:4, None, PAD : PAD + SIDE, PAD : PAD + SIDE].cpu()

    def batch(self, plan: Tensor, erase: int) -> tuple[Tensor, Tensor]:
        """Images [b, 1, 28, 28] and labels of a plan [6, b]: nothing is read from the device.

        Args:
            plan: Of ``plans``.
            erase: Side of the square whose pixels become zero, the mean; 0: none.
        """
        index, row, column, mirror, middle, center = (part[:, None] for part in plan)
        along = torch.arange(SIDE, device=plan.device)[None]
        across = torch.where(mirror > 0, SIDE - 1 - along, along)
        x = self.padded[index[:, :, None], (row + along)[:, :, None], (column + across)[:, None]]
        if erase:
            rows, columns = ((along - m + erase // 2) for m in (middle, center))
            inside = [(r >= 0) & (r < erase) for r in (rows, columns)]
            x = x.masked_fill(inside[0][:, :, None] & inside[1][:, None], 0.0)
        return x[:, None], self.labels[plan[0]]


def plans(count: int, *, batch: int, epochs: int, seed: int, device: str) -> Iterator[Tensor]:
    """What each step trains on [6, batch]: the same for every arm, on every device."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ends = (2 * PAD + 1, 2 * PAD + 1, 2, SIDE, SIDE)
    for _ in range(epochs):
        drawn = [torch.randint(0, end, (count,), generator=generator) for end in ends]
        table = torch.stack([torch.randperm(count, generator=generator), *drawn]).to(device)
        for begin in range(0, count - batch + 1, batch):
            yield table[:, begin : begin + batch]


def accuracy(model: torch.nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Percent that are right."""
    was = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(part[0].split(500), part[1].split(500), strict=True)
        )
    model.train(was)
    return 100 * right / len(part[0])
