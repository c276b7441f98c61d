"""What each rank of ``test_ranks`` runs: recovery by steps, then by seconds of which each has its own."""

import hashlib
import json
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tersor.core.jsonable import to_json
from tersor.core.recovery import Recover
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.axes.matching import counterparts
from tersor.graph.axes.slicing import gone_from
from tersor.graph.contracts import Graph
from tersor.graph.edit import parameters_by_name
from tersor.observe.ranks import ALONE, RankGroup, joined
from tersor.recover.blocks import reconstruct
from tersor.recover.goals import Teacher
from tests.unit.capturing import graph_of, random, trained
from tests.unit.recover.test_blocks import QUICK, SIZE, Residual, batches_of, error

BY_SECONDS = Recover(seconds=3.0, batch=16)


def recovered(config: Recover, ranks: RankGroup = ALONE) -> dict[str, Any]:
    original = graph_of(trained(Residual()), random(4, 1, 6, 6))
    axes = analyse_axes(original)
    keep = {"up.0": [0, 2, 4, 6], "up.1": [1, 2, 3], "stem": [0, 1, 2, 4]}
    small = keep_units(original, axes, keep)
    known = counterparts(axes, axes.removed(gone_from(axes, keep)))
    teacher = Teacher(graph=original, kind="logits", counterparts=known)
    images = batches_of(random(136, 1, 6, 6, seed=3))
    found = reconstruct(teacher, small, images, config, seed=0, size=SIZE, ranks=ranks)
    new = (random(64, 1, 6, 6, seed=9),)
    return {
        "tensors": digest(found.graph),
        "parts": to_json(found.recovery.parts),
        "is_kept": found.recovery.is_kept,
        "before": error(small, original, new),
        "after": error(found.graph, original, new),
    }


def digest(graph: Graph) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(parameters_by_name(graph.module).items()):
        state.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    with joined() as ranks:
        said = [recovered(config, ranks) for config in (QUICK, BY_SECONDS)]
    print(json.dumps(said), flush=True)  # noqa: T201
    os._exit(0)
