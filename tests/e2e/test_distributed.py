"""Two real processes share one run: the same statistics, errors, plan and result as one process."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tersor
from tersor.api.proposing import calibrate, propose
from tersor.core.jsonable import to_json
from tersor.observe.keeping import pack
from tersor.observe.statistics import MIN_ROWS
from tests.data.zoo import load_lenet5
from tests.e2e import rank_program
from tests.e2e.helpers import ROOT, Recorded, environment, partial_files, parts, records
from tests.ranks import Ended, start_ranks, wait_for

# Borders of bins are 1/1024 of the edge apart or more, and float32 can't tell a value from one within some
# roundings of the edge: eight of 1.2e-7 on either side of each.
AT_BORDERS = 16 * 1024 * torch.finfo(torch.float32).eps
# Sums of the same float64 products in another order: n terms of one sign differ by at most n/2 units
# of the last place and by far less on average; 60 images give the first layer 8,192 rows.
ROUNDING = MIN_ROWS * torch.finfo(torch.float64).eps


def run(*words: str) -> list[Ended]:
    return wait_for(start_ranks(2, "-m", "tests.e2e.rank_program", *words))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two ranks that torchrun has started: their statistics and candidates, and what each said."""
    folder = tmp_path_factory.mktemp("shared")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--log-dir"]
    done = subprocess.run(
        [sys.executable, *words, str(folder / "logs"), "--redirects", "3", "-m",
         "tests.e2e.rank_program", "alike_and_different", str(folder)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    logs = sorted((folder / "logs").rglob("std*.log"))
    assert done.returncode == 0, done.stderr + "\n".join(p.read_text() for p in logs)
    said = [p.read_text().strip().splitlines()[-1] for p in logs if p.name == "stdout.log"]
    return folder, [json.loads(line) for line in said]


def test_statistics_are_those_of_one_process(
    shared: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, said = shared
    with rank_program.quick():
        record, arrays = pack(calibrate(rank_program.lenet_session(tmp_path)), 0.0)
    first, second = (load_file(folder / f"statistics.{rank}.safetensors") for rank in (0, 1))
    found = [s["statistics"] for s in said]
    assert found[0]["ops"] == found[1]["ops"] == to_json(record)  # counts and ranges
    assert first.keys() == second.keys() == arrays.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    worst = 0.0
    for name, array in arrays.items():
        alone, both = torch.from_numpy(array), first[name]
        if name.endswith((".xx", ".x")):
            worst = max(worst, float((both - alone).abs().max() / alone.abs().max()))
        elif name.endswith(".counts"):
            moved = (both - alone).cumsum(0).abs()  # across each border
            assert both.sum() == alone.sum(), name
            assert float(moved.sum()) <= AT_BORDERS * float(alone.sum()), name
        else:
            assert torch.equal(both, alone), name
    print(f"moments: largest relative difference {worst:.2e}")  # noqa: T201
    assert worst <= ROUNDING
    drawn = [op for op in record.ops if op.count == MIN_ROWS]
    assert drawn, "no rows were drawn: the test would not see draws that differ"


def test_errors_are_those_of_one_process_with_the_same_statistics(
    shared: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, said = shared
    shutil.copytree(folder / "calibrated", tmp_path / "cache")
    progress = Recorded()
    with rank_program.quick():
        session = rank_program.lenet_session(tmp_path / "cache", progress=progress)
        offered = propose(session)
    assert "calibrate" not in progress.stages  # it had the ranks' own
    wanted = json.loads(json.dumps(to_json(offered.candidates)))
    assert {c["site"].partition(":")[0] for c in wanted} >= {"c1", "c2", "width"}
    assert len({c["samples"] for c in wanted} - {0}) > 1  # adaptive
    found = [s["statistics"] for s in said]
    assert found[0]["candidates"] == found[1]["candidates"] == wanted
    changes = rank_program.offers_digest(offered.changes)
    assert found[0]["changes"] == found[1]["changes"] == changes


@pytest.mark.slow
def test_the_same_choices_from_one_store(tmp_path: Path, images: dict[str, Any]) -> None:
    ended = run("whole", str(tmp_path))
    assert [e.code for e in ended] == [0, 0], [e.errors for e in ended]
    first, second = (e.said for e in ended)
    assert {"price", "plan", "verify"} <= set(first["stages"])
    assert not {"baseline", "price", "plan", "transform", "verify"} & set(second["stages"])
    assert any(part["steps"] for recovery in first["recoveries"] for part in recovery["parts"])
    for name in ("assignment", "choice", "verdict", "pareto", "recoveries", "report", "module"):
        assert first[name] == second[name], name
    assert first["built"] < 0.05  # rounding to either side of a code
    assert second["built"] < 0.05
    loaded = tersor.load(tmp_path / "lenet.tersor")
    assert loaded(images["test"][:2]).shape == (2, 10)
    store = tmp_path / "cache"
    assert partial_files(store) == []
    measured = {name for name in records(store) if name.startswith("measured/")}
    for name in ("plan", "transform", "verdict"):
        shutil.rmtree(store / name, ignore_errors=True)  # a busy machine's verdict is not kept
    progress = Recorded()
    with rank_program.quick():
        alone = tersor.compress(
            load_lenet5(),
            parts(images),
            target=rank_program.TARGET,
            methods=rank_program.METHODS,
            cache_dir=store,
            progress=progress,
            recover=rank_program.RECOVER,
        )
    assert not {"calibrate", "errors", "baseline", "price"} & set(progress.stages)
    assert dict(alone.plan.assignment) == first["assignment"]
    assert alone.plan.choice.describe() == first["choice"]
    # Prices are the same to the last digit: what was measured beside them is found again.
    assert {name for name in records(store) if name.startswith("measured/")} == measured


@pytest.mark.slow  # a killed rank is named in tests/unit/observe, a killed run goes on in test_resume
@pytest.mark.parametrize(
    ("rank", "stage", "done"),
    [(1, "errors", {"calibrate"}), (0, "price", {"calibrate", "errors", "baseline"})],
)
def test_a_killed_rank_is_named_and_one_process_goes_on(
    tmp_path: Path, rank: int, stage: str, done: set[str]
) -> None:
    ended = run("dies", str(tmp_path), str(rank), stage)
    assert ended[rank].code == -signal.SIGKILL
    other = ended[1 - rank]
    assert other.code == 0, other.errors
    assert other.said["type"] == "RankError"
    assert f"rank {rank} is gone" in other.said["text"]
    before = records(tmp_path / "cache")
    progress = Recorded()
    with rank_program.quick():
        found = rank_program.compress_tiny(tmp_path, progress=progress)
    assert found.plan.assignment
    assert not done & set(progress.stages)
    after = records(tmp_path / "cache")
    removed = {name for name in before if name.startswith("calibration/")}  # it was used
    assert {n: t for n, t in before.items() if n not in removed}.items() <= after.items()
    assert partial_files(tmp_path / "cache") == []


def test_ranks_that_work_on_something_else_are_named(shared: tuple[Path, list[Any]]) -> None:
    errors = [s["errors"] for s in shared[1]]
    texts = [[error["text"] for error in of_rank] for of_rank in errors]
    assert texts[0][:3] == texts[1][:3]
    seed, data, model, _ = texts[0]
    start = "rank 1 of 2 differs from rank 0 (open): "
    assert seed.startswith(start)
    assert "seed: 1, on rank 0: 0" in seed
    assert "model" not in seed.removeprefix(start).partition("; every")[0]
    assert "calibration data: " in data
    assert "test data: " in data
    assert model.startswith(f"{start}model: ")
    assert "no DistributedSampler" in model
    fails = [of_rank[3] for of_rank in errors]
    assert fails[0]["type"] == "RankError"
    assert "rank 1 of 2 stopped while " in fails[0]["text"]
    assert fails[0]["text"].endswith("ValueError: no such thing")
    assert fails[1] == {"type": "ValueError", "text": "no such thing"}
