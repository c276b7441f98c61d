"""compress(recover=...): trained before and after rounding, reported, kept, and on behind a stop."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tersor
from tersor.api.result import Result
from tersor.api.taught import _name
from tersor.core.jsonable import from_json, to_json
from tersor.graph.edit import parameters_by_name
from tersor.report.record import Report
from tests.data.zoo import load_lenet5
from tests.e2e.conftest import PRUNED_TARGET
from tests.e2e.helpers import Finished, Recorded, close_logits, warm_copy

# The shape of what each run does is tested here; how much it gains is in the unit tests.
STEPS = tersor.Recover(steps=6, batch=16)

pytestmark = pytest.mark.usefixtures("never_slower")


def again(run: Finished, store: Path, progress: Recorded, **options: Any) -> Result:
    """The pruned run once more, from its own prices and plan."""
    settings = {"recover": STEPS, "metric": run.metric, "methods": "all", **options}
    return tersor.compress(
        load_lenet5(),
        run.data,
        target=PRUNED_TARGET,
        cache_dir=store,
        progress=progress,
        **settings,
    )


def tensors_of(result: Result) -> dict[str, Tensor]:
    graph = result.module.graph_module
    assert isinstance(graph, torch.fx.GraphModule)
    return parameters_by_name(graph)


def test_recovery_from_a_plan_to_a_file(
    pruned_run: Finished, tmp_path: Path, images: dict[str, Tensor]
) -> None:
    store, progress = warm_copy(pruned_run, tmp_path), Recorded()
    result = again(pruned_run, store, progress)
    assert result.plan.assignment == pruned_run.result.plan.assignment  # no part of a plan
    assert progress.stages.count("recover") == 2
    record = result.record
    assert [r.what for r in record.recoveries] == ["weights", "rounded"]
    for recovery in record.recoveries:
        assert recovery.steps > 0
        assert recovery.after <= recovery.before
        assert recovery.describe() in progress.notes
        if recovery.is_kept:
            assert recovery.search_before is not None
            assert recovery.search_after is not None
    assert from_json(Report, to_json(record)) == record
    site = next(s for s in record.sites if s.kind == "format" and s.op_kind == "conv")
    parts = result.explain(site.name)["recovered"]
    assert parts
    assert all(set(part["ops"]) & set(site.ops) for part in parts)
    path = tmp_path / "recovered.tersor"
    result.save(path)
    test = images["test"][:20]
    assert close_logits(tersor.load(path)(test), result.module(test))

    found = again(pruned_run, store, quiet := Recorded())
    assert "recover" not in quiet.stages  # found in the store
    assert "transform" not in quiet.stages
    assert found.record.recoveries == record.recoveries
    left, right = tensors_of(result), tensors_of(found)
    assert left.keys() == right.keys()
    assert all(torch.equal(t, right[n]) for n, t in left.items())


def test_a_stop_in_the_middle_changes_nothing(pruned_run: Finished, tmp_path: Path) -> None:
    store = warm_copy(pruned_run, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        again(pruned_run, store, Recorded(stop_at="recover"))
    (partial,) = (store / "recovering").iterdir()
    assert partial.name
    result = again(pruned_run, store, Recorded())
    assert not list((store / "recovering").glob("*"))
    (tmp_path / "other").mkdir()
    whole_store = warm_copy(pruned_run, tmp_path / "other")
    whole = again(pruned_run, whole_store, Recorded())
    left, right = tensors_of(result), tensors_of(whole)
    assert all(torch.equal(t, right[n]) for n, t in left.items())
    mine, other = result.record.recoveries, whole.record.recoveries
    assert [r.parts for r in mine] == [r.parts for r in other]


def test_a_result_without_recovery_is_what_it_was(pruned_run: Finished, tmp_path: Path) -> None:
    assert pruned_run.result.record.recoveries == ()
    store, progress = warm_copy(pruned_run, tmp_path), Recorded()
    result = again(pruned_run, store, progress, recover=None)
    assert "recover" not in progress.stages
    assert "transform" not in progress.stages
    left, right = tensors_of(result), tensors_of(pruned_run.result)
    assert all(torch.equal(t, right[n]) for n, t in left.items())


def test_own_data_and_a_loss_have_a_say(
    pruned_run: Finished, tmp_path: Path, images: dict[str, Tensor]
) -> None:
    calls: list[int] = []

    def loss(outputs: Tensor, item: Any) -> Tensor:
        calls.append(len(item[1]))
        return torch.nn.functional.cross_entropy(outputs, item[1])

    pairs = list(
        zip(images["train"][:96].split(12), images["train_labels"][:96].split(12), strict=True)
    )
    recover = tersor.Recover(
        steps=6,
        batch=16,
        data=tersor.Data(pairs, to_inputs=lambda pair: pair[0]),
        loss=loss,
    )
    store, progress = warm_copy(pruned_run, tmp_path), Recorded()
    result = again(pruned_run, store, progress, recover=recover)
    assert set(calls) == {12}
    wholes = [p for r in result.record.recoveries for p in r.parts if p.part == "whole"]
    assert wholes
    assert all(p.after <= p.before for p in wholes)
    quiet = Recorded()
    again(pruned_run, store, quiet, recover=recover)
    assert "recover" not in quiet.stages  # found in the store


def test_a_loss_counts_by_its_name_and_an_object_by_that_of_its_class() -> None:
    assert _name(None) is None
    assert _name(torch.nn.functional.cross_entropy) == "torch.nn.functional.cross_entropy"
    assert _name(partial(torch.nn.functional.cross_entropy)) == "functools.partial"
    assert str(_name(torch.nn.CrossEntropyLoss())).endswith(".loss.CrossEntropyLoss")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda outputs, item: outputs.logits.sum(), "loss raised AttributeError: .*logits.*item 0"),  # noqa: ARG005
        (lambda outputs, item: 1.0, "returned a float, wanted a scalar tensor"),  # noqa: ARG005
        (lambda outputs, item: (outputs, item), "returned a tuple, wanted a scalar tensor"),
        (torch.nn.CrossEntropyLoss(), "loss raised"),  # an object, which gets the whole item
        (lambda outputs, item: outputs.sum(1), r"of shape \[12\], wanted one number"),  # noqa: ARG005
        (lambda outputs, item: outputs.sum() * torch.nan, "loss is nan on the model's own outputs"),  # noqa: ARG005
    ],
)  # fmt: skip
def test_a_loss_of_no_use_is_refused_before_anything_is_searched(
    pruned_run: Finished, tmp_path: Path, images: dict[str, Tensor], loss: Any, words: str
) -> None:
    pairs = [(images["train"][:12], images["train_labels"][:12])] * 2
    recover = tersor.Recover(
        steps=2, data=tersor.Data(pairs, to_inputs=lambda pair: pair[0]), loss=loss
    )
    progress = Recorded()
    with pytest.raises(tersor.TersorError, match=words):
        again(pruned_run, tmp_path, progress, recover=recover)
    assert set(progress.stages) <= {"data", "capture"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seconds": 30.0, "minutes": 1.0}, "one of them"),
        ({"loss": lambda outputs, item: 0.0}, "a loss without data"),  # noqa: ARG005
        ({"minutes": -1.0}, "seconds=-60"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(tersor.TersorError, match=words):
        tersor.Recover(**options)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([torch.zeros(4, 1, 28, 28)], "found 1 batches"),
        ([torch.zeros(4, 1, 8, 8)] * 2, "wanted what the model is given"),
        ([(torch.zeros(4, 1, 28, 28), torch.zeros(4))] * 2, "to_inputs=lambda batch"),
    ],
)
def test_data_that_does_not_fit_is_refused_early(
    pruned_run: Finished, tmp_path: Path, items: list[Any], words: str
) -> None:
    with pytest.raises(tersor.TersorError, match=words):
        again(pruned_run, tmp_path, Recorded(), recover=tersor.Recover(steps=2, data=items))
