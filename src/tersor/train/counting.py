"""Steps that an optimizer has really made, and how its learning rate stands to its peak."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass
class Counter:
    """Steps that are done.

    Those that a GradScaler skips inside of a fused optimizer are known to the device alone, and are taken off
    where values leave it anyway.
    """

    done: int = 0
    _skipped: Tensor | None = field(default=None, repr=False)

    def tick(self, optimizer: Optimizer) -> None:
        """Behind a step."""
        self.done += 1
        skipped = getattr(optimizer, "found_inf", None)
        if isinstance(skipped, Tensor):
            flag = (skipped > 0).sum()
            self._skipped = flag if self._skipped is None else self._skipped + flag

    def settle(self) -> None:
        """Take off what was skipped; reads a number from the device where there may be some."""
        if self._skipped is not None:
            self.done -= int(self._skipped)
            self._skipped = None


@dataclass
class Rate:
    """The learning rate, of its peak."""

    peak: float = 0.0
    share: float = 1.0

    def follow(self, optimizer: Optimizer) -> None:
        """Take in the rate as it is now."""
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        self.peak = max(self.peak, rate)
        self.share = rate / self.peak if self.peak > 0 else 1.0

    def note(self) -> tuple[str, ...]:
        """What to say where the model is cut at a low rate."""
        if self.share >= 0.5:
            return ()
        said = (
            f"the learning rate was at {self.share:.0%} of its peak when the model shrank; warm it "
            "up again, or set an earlier end= in the schedule"
        )
        return (said,)


def all_finite(values: list[Tensor]) -> bool:
    """Whether all numbers of some tensors are; one value leaves the device."""
    return bool(torch.stack([torch.isfinite(v).all() for v in values]).all()) if values else True
