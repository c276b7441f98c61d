"""Two processes under DistributedDataParallel: one choice, one structure, a new wrapper between epochs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.helpers import ROOT, environment

SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import tersor
from tersor.train.ranks import agreed_counts
from tersor.train.schedule import Schedule
from tests.unit.train.networks import Convolutional, images

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(5)
model = DistributedDataParallel(Convolutional(width=12))
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
shrinker = tersor.train.attach(
    model, optimizer, images(4)[0], total_steps=60, **json.loads(sys.argv[2]),
    schedule=Schedule(total_steps=60, begin=0.1, end=0.5, every=5, epoch=50),
)
shapes = []
for epoch in range(6):
    for batch in range(10):
        x, y = images(16, seed=1000 * rank + 10 * epoch + batch)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        conv = model.module.blocks[0].conv1
        shapes.append(len((conv if hasattr(conv, "weight") else conv[0]).weight))
    model = shrinker.epoch_end(model)
small, report = shrinker.finish()
counts = agreed_counts({"a": 3 + rank, "b": 5 - rank}, torch.device("cpu"))
torch.save({"agreed": counts, "state": small.state_dict(), "shapes": shapes, "counts": report.counts(), "ranks": report.ranks(),
            "levels": [len(row.unique()) for row in small.blocks[0].conv2.weight.detach().flatten(1)]
            if hasattr(small.blocks[0].conv2, "weight") else [],
            "difference": report.difference, "shrunk_at": report.shrunk_at},
           Path(sys.argv[1]) / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def two_processes(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two processes ends with."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-addr=127.0.0.1",
            f"--master-port={29600 + os.getpid() % 300}",
            str(script),
            str(tmp_path),
            json.dumps(options),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in one["state"].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, two["state"][name]), name
    return one, two


def test_two_processes_choose_and_cut_the_same(tmp_path: Path) -> None:
    counts = {"blocks.0.conv1": 3, "blocks.1.conv1": 5}
    one, two = two_processes(tmp_path, counts=counts)
    assert one["counts"]["blocks.0.conv1"] == two["counts"]["blocks.0.conv1"] == 3
    assert one["agreed"] == two["agreed"] == {"a": 3, "b": 5}
    # The units are chosen after step 30, and cut at the end of that epoch.
    assert one["shapes"] == [12] * 30 + [3] * 30
    assert one["shrunk_at"] == 30
    assert one["difference"] <= 1e-5


def test_two_processes_replace_the_same_layers_by_the_same_pairs(tmp_path: Path) -> None:
    """Each has gathered from its own data; the pairs are of both, and train on in a new wrapper."""
    ranks = {"blocks.0.conv1": 4, "blocks.1.conv1": 5}
    one, two = two_processes(tmp_path, counts=ranks, algorithm="spectral")
    assert one["ranks"] == two["ranks"] == ranks
    assert one["shapes"] == [12] * 30 + [4] * 30
    assert one["shrunk_at"] == 30


def test_two_processes_end_on_the_same_grid(tmp_path: Path) -> None:
    one, two = two_processes(tmp_path, counts={"blocks.0.conv1": 9}, bits=3)
    assert one["shapes"] == [12] * 30 + [9] * 30
    assert max(one["levels"]) <= 8
    assert one["levels"] == two["levels"]


def test_the_wrapper_is_named_where_there_is_none() -> None:
    pytest.importorskip("torch.distributed")
    from tersor.train.ranks import is_replicated

    assert not is_replicated(torch.nn.Linear(2, 2))
