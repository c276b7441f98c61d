"""What each rank of ``test_sharded`` runs: ``python -m tests.e2e.sharded_program [--cuda] FOLDER TASK...``.

``--cuda``: each rank has a GPU of its own. Tasks are ``same``, ``refused`` and the names of algorithms; what each of them says is printed as JSON.
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import tersor
from tersor.core.errors import TersorError
from tersor.train.schedule import Schedule
from tests.unit.train import networks
from tests.unit.train.networks import Convolutional

STEPS, EPOCH = 30, 5
COUNTS = {"blocks.0.conv1": 3, "blocks.1.conv1": 5}


DEVICE = "cuda" if "--cuda" in sys.argv else "cpu"


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """As ``networks.images``, on this rank's device."""
    x, y = networks.images(count, seed=seed)
    return x.to(DEVICE), y.to(DEVICE)


def plain() -> Convolutional:
    torch.manual_seed(5)
    return Convolutional().to(DEVICE)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def attached(model: nn.Module, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = tersor.train.attach(
        model,
        optimizer,
        images(4)[0],
        total_steps=STEPS,
        counts=COUNTS,
        schedule=Schedule(total_steps=STEPS, begin=0.1, end=0.5, every=3),
        **options,
    )
    return shrinker, optimizer


def epochs(
    model: nn.Module,
    shrinker: Any,
    optimizer: torch.optim.Optimizer,
    data: Callable[[int], tuple[Tensor, Tensor]],
) -> tuple[nn.Module, list[int], list[float]]:
    shapes, losses = [], []
    for step in range(STEPS):
        x, y = data(step)
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        shapes.append(len(model.blocks[0].conv1.weight))  # type: ignore[index, union-attr, arg-type]
        if step % EPOCH == EPOCH - 1:
            model = shrinker.epoch_end(model)
    return model, shapes, losses


def trained(folder: Path, algorithm: str) -> None:
    rank = dist.get_rank()
    model = shard(plain())
    shrinker, optimizer = attached(model, shard=shard, algorithm=algorithm)
    model, shapes, losses = epochs(
        model, shrinker, optimizer, lambda step: images(16, seed=1000 * rank + step)
    )
    weight: Any = model.blocks[0].conv1.weight  # type: ignore[index, union-attr]
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert own == {id(p) for p in model.parameters()}
    states = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    alike = [
        s.placements == p.placements and s.shape == p.shape and s.to_local().shape == p.to_local().shape
        for s, p in zip(states, model.parameters(), strict=True)
    ]  # fmt: skip
    found = {
        "shapes": shapes,
        "losses": losses,
        "is_sharded": type(weight.data).__name__ == "DTensor",
        "rows": len(weight.to_local()),
        "states_lie_alike": all(alike),
    }
    small, report = shrinker.finish()
    found |= {
        "state": small.state_dict(),
        "counts": report.counts(),
        "difference": report.difference,
        "shrunk_at": report.shrunk_at,
    }
    torch.save(found, folder / f"{algorithm}.{rank}.pt")


def result_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Trained on samples that are the same everywhere; saved and loaded in the middle of it."""
    shrinker, optimizer = attached(model, **options)
    for step in range(8):
        x, y = images(16, seed=step)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    shrinker.load_state_dict(shrinker.state_dict())
    epochs(model, shrinker, optimizer, lambda step: images(16, seed=8 + step))
    kept = {name: t.clone() for name, t in shrinker.kept().items()}
    small, _ = shrinker.finish()
    return {"kept": kept, "state": small.state_dict()}


def same(folder: Path) -> None:
    torch.save(result_of(shard(plain()), shard=shard), folder / f"same.{dist.get_rank()}.pt")


def alone() -> dict[str, Any]:
    """The same in this process."""
    return result_of(plain())


def refused() -> list[str]:
    cut = attached(plain())[0].state_dict()
    cut |= {"is_cut": True, "kept": {n: torch.arange(8) for n in cut["structure"]}}
    tries: list[Callable[[], Any]] = [
        lambda: attached(shard(plain())),
        lambda: attached(shard(plain()), shard=shard, rescue="x"),
        lambda: attached(shard(plain()), shard=shard)[0].load_state_dict(cut),
    ]
    said = []
    for attempt in tries:
        try:
            attempt()
            said.append("")
        except TersorError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--cuda"]
    place = Path(words[0])
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=timedelta(seconds=200))
    tasks: dict[str, Callable[[], Any]] = {"same": lambda: same(place), "refused": refused}
    said = {name: tasks[name]() if name in tasks else trained(place, name) for name in words[1:]}
    print(json.dumps(said), flush=True)  # noqa: T201
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)
