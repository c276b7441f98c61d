"""Two processes under ``fully_shard``: one choice, a smaller model in rows again, states that follow."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
from tests.e2e import sharded_program
from tests.ranks import start_ranks, wait_for


def run(folder: Path, *tasks: str) -> list[dict[str, Any]]:
    """What two processes say of their tasks."""
    ended = wait_for(start_ranks(2, "-m", "tests.e2e.sharded_program", str(folder), *tasks), 300)
    assert [e.code for e in ended] == [0, 0], [e.errors for e in ended]
    return [e.said for e in ended]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Three tasks in one start of the processes: the folder of their files, and what they said."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run(folder, "regrow", "same", "refused")


def check_a_cut(folder: Path, algorithm: str) -> None:
    one, two = (
        torch.load(folder / f"{algorithm}.{r}.pt", map_location="cpu", weights_only=True)
        for r in (0, 1)
    )
    assert one["counts"] == two["counts"]
    assert one["counts"]["blocks.0.conv1"] == 3  # no multiple of the processes
    # The units are chosen after step 15, and cut at the end of that epoch.
    assert one["shapes"] == two["shapes"] == [8] * 15 + [3] * 15
    assert one["shrunk_at"] == 15
    assert one["difference"] <= 1e-5
    assert one["is_sharded"]
    assert one["rows"] + two["rows"] == 3
    assert one["states_lie_alike"]
    assert one["losses"][-1] < one["losses"][0]
    for name, value in one["state"].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, two["state"][name]), name
    small = sharded_program.plain()
    assert {n: tuple(t.shape) for n, t in one["state"].items()} != {
        n: tuple(t.shape) for n, t in small.state_dict().items()
    }


def test_two_processes_cut_a_sharded_model(ended: tuple[Path, list[dict[str, Any]]]) -> None:
    check_a_cut(ended[0], "regrow")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ramp", "prox"])
def test_other_algorithms_cut_a_sharded_model(tmp_path: Path, algorithm: str) -> None:
    run(tmp_path, algorithm)
    check_a_cut(tmp_path, algorithm)


def test_a_sharded_run_is_that_of_one_process(ended: tuple[Path, list[dict[str, Any]]]) -> None:
    """The same samples on both processes: the same choices, and the same weights to rounding."""
    both: dict[str, Any] = torch.load(ended[0] / "same.0.pt", weights_only=True)
    alone = sharded_program.alone()
    assert both["kept"].keys() == alone["kept"].keys()
    assert all(torch.equal(t, alone["kept"][n]) for n, t in both["kept"].items())
    # Thirty steps, each with sums in another order, which Adam's division carries on.
    for name, value in both["state"].items():
        assert torch.allclose(value, alone["state"][name], atol=1e-3, rtol=1e-3), name


def test_what_can_t_be_sharded_again_is_named(ended: tuple[Path, list[dict[str, Any]]]) -> None:
    without, rescue, checkpoint = ended[1][0]["refused"]
    assert "is sharded over processes (FSDP2)" in without
    assert "pass shard=fn" in without
    assert "rescue: not for a sharded model" in rescue
    assert "attach to the plain model, load, finish()" in checkpoint


def test_a_plain_model_needs_no_function_that_shards() -> None:
    model = sharded_program.plain()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with pytest.raises(tersor.TersorError, match="a model that is not sharded"):
        tersor.train.attach(
            model, optimizer, torch.zeros(2, 1, 6, 6), counts={}, total_steps=40, shard=lambda m: m
        )
