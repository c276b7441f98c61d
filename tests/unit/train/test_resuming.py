"""States on disk as they were; runs of another course and options of no use are refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.core.errors import ConfigError
from tersor.train.attaching import attach
from tersor.train.attachment import Attachment
from tersor.train.resuming import (
    check_options,
    check_run,
    course_of,
    load_state,
    save_state,
    stage_of,
)
from tersor.train.schedule import Schedule
from tests.unit.train.comparing import same

STEPS = 40
SCHEDULE = Schedule(total_steps=STEPS, every=2)


def test_tensors_that_share_memory_come_back_as_they_were(tmp_path: Path) -> None:
    table, flat = torch.randn(4, 3), torch.arange(10.0)
    state = {
        "tied": table,
        "table": table,
        "turned": table.T,
        "head": flat[:4],
        "tail": flat[4:],
        "whole": flat,
        "empty": [torch.zeros(0), torch.zeros(0, 2)],
    }
    path = save_state(state, tmp_path)
    assert same(load_state(tmp_path), state)
    once = save_state({"table": table}, tmp_path / "once").stat().st_size
    both = save_state({"table": table, "tied": table}, tmp_path / "both").stat().st_size
    assert both - once < table.numel() * table.element_size()
    assert not path.with_suffix(".part").exists()


def test_values_keep_their_kinds(tmp_path: Path) -> None:
    group = {"lr": torch.tensor(1e-3), "betas": (0.9, torch.tensor(0.99)), "params": [0, 1]}
    state = {"param_groups": [group, {"lr": 0.1, "foreach": None, "name": "x", "on": True}]}
    save_state(state, tmp_path)
    assert same(load_state(tmp_path), state)


def test_what_no_file_can_hold_is_named(tmp_path: Path) -> None:
    state = {"optimizer": {"param_groups": [{"lr": 0.1, "kind": torch.float16}]}}
    with pytest.raises(ConfigError, match=r"optimizer/param_groups/0/kind: found dtype in a state"):
        save_state(state, tmp_path)


class Tied(nn.Module):
    """An embedding whose weight is that of the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.down(self.up(self.table(tokens)).relu()))
        return found


def start() -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Tied()
    return model, torch.optim.Adam(model.parameters(), torch.tensor(1e-2), foreach=False)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    tokens = torch.arange(10)
    for _ in steps:
        functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_tied_weights_and_a_rate_that_is_a_tensor_are_rescued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.train.rescue.SECONDS", 0.0)
    # A state is that before its look, which chooses nothing yet.
    late = replace(SCHEDULE, begin=0.3, end=0.8)
    options: dict[str, Any] = {"counts": {"up": 8}, "total_steps": STEPS, "schedule": late}
    model, optimizer = start()
    shrinker = attach(model, optimizer, torch.arange(10), rescue=tmp_path, **options)
    run(model, optimizer, range(10))
    found = tersor.train.rescued(tmp_path)
    assert found["shrinker"]["step"] == 10
    assert same(found["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"])
    run(model, optimizer, range(10, STEPS))
    whole, _ = shrinker.finish()

    again, resumed = start()
    second = attach(again, resumed, torch.arange(10), **options)
    second.load_state_dict(found["shrinker"])
    again.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    run(again, resumed, range(10, STEPS))
    small, _ = second.finish()
    assert same(dict(whole.state_dict()), dict(small.state_dict()))


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {
        "total_steps": STEPS,
        "algorithm": "regrow",
        "structure": {"0": 32, "2": 40},
        "plan": {"0": 16},
        "schedule": course_of(SCHEDULE),
        **changes,
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"counts": {"0": 4}}, r"found counts=\{'0': 16\}, wanted \{'0': 4\} as given to attach"),
        ({"counts": {"0": 16, "2": 8}}, r"found counts=\{'2': 40\}, wanted \{'2': 8\}"),
        (
            {"schedule": Schedule(total_steps=STEPS, every=1, end=0.9)},
            r"schedule with end=0\.4, every=2, wanted end=0\.9, every=1",
        ),
        ({"schedule": Schedule(total_steps=STEPS, every=2, begin=0.1)}, r"begin=0\.05, wanted begin=0\.1"),
    ],
)  # fmt: skip
def test_another_course_than_the_checkpoints_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_run(checkpoint(), STEPS, "regrow", **given)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, {"counts": None}),  # of a target: the checkpoint's
        ({}, {"counts": {"2": 40, "0": 16}}),  # whole, said or not
        ({"plan": {"0": 16, "2": 40}}, {"counts": {"0": 16}}),
        ({"plan": None}, {"counts": {"0": 4}}),  # nothing was chosen yet
        ({"schedule": None}, {"schedule": Schedule(total_steps=STEPS, every=1)}),  # older
    ],
)
def test_what_agrees_with_the_checkpoint_is_taken(
    changes: dict[str, Any], given: dict[str, Any]
) -> None:
    check_run(checkpoint(**changes), STEPS, "regrow", **{"schedule": SCHEDULE} | given)


@pytest.mark.parametrize("algorithm", ["regrow", "spectral"])
@pytest.mark.parametrize("stop", [10, 30])  # before and after the cut
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts": {"up": 5}}, r"found counts=\{'up': 4\}, wanted \{'up': 5\}"),
        ({"schedule": Schedule(total_steps=STEPS, every=1)}, "every=2, wanted every=1"),
    ],
)
def test_a_run_that_asks_for_another_course_does_not_go_on(
    algorithm: str, stop: int, changes: dict[str, Any], words: str
) -> None:
    options: dict[str, Any] = {
        "counts": {"up": 4}, "total_steps": STEPS, "schedule": SCHEDULE, "algorithm": algorithm
    }  # fmt: skip
    model, optimizer = start()
    shrinker = attach(model, optimizer, torch.arange(10), **options)
    run(model, optimizer, range(stop))
    state = shrinker.state_dict()
    again, resumed = start()
    other = attach(again, resumed, torch.arange(10), **(options | changes))
    with pytest.raises(ConfigError, match=words):
        other.load_state_dict(state)

    fresh, third = start()
    given = {n: v for n, v in (options | changes).items() if n != "total_steps"}
    attachment = Attachment(torch.arange(10), given)
    attachment.restore(fresh, state)
    # Pairs that are there have their ranks, which nobody is asked for again.
    if algorithm == "regrow" or "schedule" in changes or not state["is_cut"]:
        with pytest.raises(ConfigError, match=words):
            attachment.begin(fresh, third, STEPS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": {"0": 4}}, "found count=, wanted options of attribute, target, counts, bits"),
        ({"total_steps": 4}, "found total_steps=.*the trainer gives total_steps itself"),
    ],
)
def test_options_that_attach_has_not_are_listed(options: dict[str, Any], words: str) -> None:
    check_options("Callback", {"counts": {}, "rescue": None, "keep": ()}, attach)
    with pytest.raises(ConfigError, match=f"Callback: {words}"):
        check_options("Callback", options, attach, ("attribute",))


def test_a_run_has_another_stage_once_units_are_chosen() -> None:
    model, optimizer = start()
    shrinker = attach(
        model, optimizer, torch.arange(10), counts={"up": 8}, total_steps=STEPS, schedule=SCHEDULE
    )
    assert stage_of(None) is None
    stages = []
    for step in range(20):
        run(model, optimizer, range(step, step + 1))
        stages.append(stage_of(shrinker))
    assert stages == [(False, False)] * (SCHEDULE.last - 1) + [(True, True)] * 5
