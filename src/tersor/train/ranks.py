"""Models that are replicated over processes: all choose the same, and are wrapped anew once they shrink."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tersor.ops.moments import Moments
from tersor.train.sharding import is_sharded


def is_replicated(model: nn.Module) -> bool:
    """Whether gradients are averaged over processes, by buckets of the old shapes.

    A trainer may have wrapped the model out of sight: several processes are enough to tell.
    """
    if isinstance(model, DistributedDataParallel) or is_sharded(model):
        return True
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


def agreed(flags: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first process's choice, on all of them: averages may differ in the last bit."""
    found: dict[str, Tensor] = {}
    for name in sorted(flags):
        value = flags[name].to(torch.uint8)
        torch.distributed.broadcast(value, src=0)
        found[name] = value.bool()
    return found


def agreed_counts(counts: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """The first process's counts, on all of them; all have the same groups."""
    names = sorted(counts)
    values = torch.tensor([counts[n] for n in names], device=device)
    torch.distributed.broadcast(values, src=0)
    return dict(zip(names, values.tolist(), strict=True))


def summed(moments: Moments) -> Moments:
    """Moments of all processes' inputs; each has some of the same layer."""
    count = torch.tensor(float(moments.count), dtype=torch.float64, device=moments.xx.device)
    parts = [count, moments.xx.clone(), moments.x.clone()]
    for part in parts:
        torch.distributed.all_reduce(part)
    return Moments(count=int(count.item()), xx=parts[1], x=parts[2])


def sent(weights: Sequence[Tensor], shift: Tensor | None) -> None:
    """The first process's values, on all of them: solvers may differ in the last bit. Overwrites."""
    for value in (*weights, *(() if shift is None else (shift,))):
        torch.distributed.broadcast(value, src=0)


def rewrapped(old: nn.Module, model: nn.Module) -> nn.Module:
    """A new wrapper with the old one's settings; the old one can't be used any more."""
    assert isinstance(old, DistributedDataParallel)
    # Its buckets hold the nodes that take gradients, which know the old shapes.
    old.reducer = None  # type: ignore[assignment]
    old.logger = None
    return DistributedDataParallel(
        model,
        device_ids=old.device_ids,
        output_device=old.output_device,
        broadcast_buffers=old.broadcast_buffers,
        process_group=old.process_group,
        find_unused_parameters=old.find_unused_parameters,
        gradient_as_bucket_view=old.gradient_as_bucket_view,
        static_graph=old.static_graph,
    )
