"""Two processes under DistributedDataParallel: one choice, one structure, a new wrapper between epochs."""

import json
import os
import subprocess
import sys
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


def trained(options):
    torch.manual_seed(5)
    model = DistributedDataParallel(Convolutional(width=12))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shrinker = tersor.train.attach(
        model, optimizer, images(4)[0], total_steps=60, **options,
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
    conv = small.blocks[0].conv2
    rows = conv.weight.detach().flatten(1) if hasattr(conv, "weight") else []
    return {
        "state": small.state_dict(), "shapes": shapes, "counts": report.counts(), "ranks": report.ranks(),
        "levels": [len(row.unique()) for row in rows],
        "difference": report.difference, "shrunk_at": report.shrunk_at,
    }


runs = {name: trained(options) for name, options in json.loads(sys.argv[2]).items()}
agreed = agreed_counts({"a": 3 + rank, "b": 5 - rank}, torch.device("cpu"))
torch.save({"agreed": agreed, "runs": runs}, Path(sys.argv[1]) / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""
UNITS = {"blocks.0.conv1": 3, "blocks.1.conv1": 5}
RANKS = {"blocks.0.conv1": 4, "blocks.1.conv1": 5}
RUNS: dict[str, dict[str, Any]] = {
    "units": {"counts": UNITS},
    "pairs": {"counts": RANKS, "algorithm": "spectral"},
    "grid": {"counts": {"blocks.0.conv1": 9}, "bits": 3},
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two processes ends with, all runs one after the other."""
    folder = tmp_path_factory.mktemp("replicas")
    script = folder / "train.py"
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
            str(folder),
            json.dumps(RUNS),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return one, two


def run(
    ended: tuple[dict[str, Any], dict[str, Any]], name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One of the runs on both processes, which end with the same weights."""
    one, two = (rank["runs"][name] for rank in ended)
    for key, value in one["state"].items():
        if "running" not in key and "tracked" not in key:
            assert torch.equal(value, two["state"][key]), key
    return one, two


def test_two_processes_choose_and_cut_the_same(ended: Any) -> None:
    one, two = run(ended, "units")
    assert one["counts"]["blocks.0.conv1"] == two["counts"]["blocks.0.conv1"] == 3
    assert [rank["agreed"] for rank in ended] == [{"a": 3, "b": 5}] * 2
    # The units are chosen after step 30, and cut at the end of that epoch.
    assert one["shapes"] == [12] * 30 + [3] * 30
    assert one["shrunk_at"] == 30
    assert one["difference"] <= 1e-5


def test_two_processes_replace_the_same_layers_by_the_same_pairs(ended: Any) -> None:
    """Each has gathered from its own data; the pairs are of both, and train on in a new wrapper."""
    one, two = run(ended, "pairs")
    assert one["ranks"] == two["ranks"] == RANKS
    assert one["shapes"] == [12] * 30 + [4] * 30
    assert one["shrunk_at"] == 30


def test_two_processes_end_on_the_same_grid(ended: Any) -> None:
    one, two = run(ended, "grid")
    assert one["shapes"] == [12] * 30 + [9] * 30
    assert max(one["levels"]) <= 8
    assert one["levels"] == two["levels"]


def test_the_wrapper_is_named_where_there_is_none() -> None:
    pytest.importorskip("torch.distributed")
    from tersor.train.ranks import is_replicated

    assert not is_replicated(torch.nn.Linear(2, 2))
