"""compress where widths take part: fewer units, proven, priced, kept and replayed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tersor
from tersor.core.errors import ConfigError
from tersor.core.records import Plan
from tersor.graph.edit import parameters_by_name
from tests.data.zoo import load_lenet5
from tests.e2e.conftest import PRUNED_TARGET
from tests.e2e.helpers import Finished, Recorded, close_logits, warm_copy


def cut_widths(plan: Plan, run: Finished) -> dict[str, tuple[int, int]]:
    """Width -> (kept, all) of those that lost units."""
    units = {s.name: s.units for s in run.result.record.sites if s.kind == "width"}
    return {
        site: (int(level), units[site])
        for site, level in plan.assignment.items()
        if site in units and level != units[site]
    }


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all tensors that the module's graph reads, by the names that the layers had."""
    graph = module.graph_module  # type: ignore[attr-defined]
    return {n: tuple(t.shape) for n, t in parameters_by_name(graph).items()}


def test_units_go_where_formats_alone_are_too_large(pruned_run: Finished) -> None:
    result = pruned_run.result
    cut = cut_widths(result.plan, pruned_run)
    assert cut
    assert not len(pruned_run.result._run.session.prefixes)  # a search leaves no values behind
    # Which format of fewer bits it is depends on what this machine measured.
    levels = [v for v in result.plan.assignment.values() if isinstance(v, str)]
    assert set(levels) - {"f32", "bf16"}
    check = next(c for c in result.verdict.checks if c.name == "size_ratio")
    assert check.status == "pass"
    # The report in the file grows with what there is to tell, whatever the weights take.
    found, predicted = result.verdict.size_bytes, result.plan.predicted_bytes
    assert found == pytest.approx(predicted, rel=0.05, abs=6_000)
    shapes = shapes_of(result.module)
    for site, (kept, _) in cut.items():
        layer = site.removeprefix("width:")
        assert {s[0] for n, s in shapes.items() if n.startswith(layer) and len(s) > 1} == {kept}


def test_the_law_was_checked_and_said(pruned_run: Finished) -> None:
    note = next(n for n in pruned_run.progress.notes if "cutting equals zeroing" in n)
    gap, effect = (float(part.split()[0].rstrip(",")) for part in (
        note.split("zeroing to ")[1], note.split("moves the output by ")[1]))  # fmt: skip
    assert gap <= 1e-5
    assert effect >= 100 * gap


def test_the_pruned_file_runs_like_its_module(
    pruned_run: Finished, images: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "pruned.tersor"
    pruned_run.result.save(path)
    assert abs(path.stat().st_size - pruned_run.result.verdict.size_bytes) < 64  # report included
    x = images["test"][:20]
    with torch.no_grad():
        wanted = pruned_run.result.module(x)
    assert close_logits(tersor.load(path)(x), wanted)
    assert close_logits(pruned_run.result.model(x), wanted)
    found = np.asarray(wanted).argmax(1)
    assert (found == pruned_run.predict(x).argmax(1).numpy()).mean() >= 0.8


def test_a_width_is_explained(pruned_run: Finished) -> None:
    (site, (kept, units)), *_ = cut_widths(pruned_run.result.plan, pruned_run).items()
    told = pruned_run.result.explain(site)
    assert (told["kind"], told["level"], told["units"]) == ("width", kept, units)
    assert told["error"] > 0
    assert {a["level"] for a in told["alternatives"]} >= {units}
    assert told["undo"]


def test_an_interrupted_fit_goes_on(pruned_run: Finished, tmp_path: Path) -> None:
    """The widths are kept when they are fitted; the formats are made on them again."""
    store = warm_copy(pruned_run, tmp_path, ("transform", "verdict"))
    assert list(store.glob("narrow/*/record.json"))
    progress = Recorded()
    result = tersor.compress(
        load_lenet5(),
        pruned_run.data,
        target=PRUNED_TARGET,
        metric=pruned_run.metric,
        cache_dir=store,
        progress=progress,
    )
    assert "fit" not in progress.stages
    assert "transform" in progress.stages
    assert result.plan.assignment == pruned_run.result.plan.assignment
    for name, tensor in result.module.state_dict().items():
        torch.testing.assert_close(
            tensor, pruned_run.result.module.state_dict()[name], rtol=0, atol=0
        )


def test_a_plan_with_widths_is_replayed_and_edited(pruned_run: Finished, tmp_path: Path) -> None:
    store = warm_copy(pruned_run, tmp_path, ("verdict",))
    plan = pruned_run.result.plan
    # The most units: the file of a replay has a shorter report.
    site, (_, units) = max(cut_widths(plan, pruned_run).items(), key=lambda item: item[1][1])
    whole = replace(plan, assignment={**plan.assignment, site: units}, settings={})
    found = tersor.apply_plan(
        load_lenet5(), pruned_run.data, whole, cache_dir=store, progress=False
    )
    assert found.verdict.size_bytes > pruned_run.result.verdict.size_bytes
    wrong = replace(plan, assignment={**plan.assignment, site: units - 1})
    with pytest.raises(ConfigError, match=f"{site}.*no level"):
        tersor.apply_plan(load_lenet5(), pruned_run.data, wrong, cache_dir=store, progress=False)


def test_what_is_kept_is_not_cut(pruned_run: Finished, tmp_path: Path) -> None:
    result = tersor.compress(
        load_lenet5(),
        pruned_run.data,
        target=tersor.Target(size_ratio=1.05),
        methods=("prune",),
        keep=("f1",),
        cache_dir=tmp_path / "store",
        progress=False,
    )
    pinned = {s.name: s.pinned for s in result.record.sites if s.kind == "width"}
    assert "f1" in (pinned["width:f1"] or "")
    assert "width:f1" not in result.plan.assignment
    shapes = shapes_of(result.module)
    assert {s[0] for n, s in shapes.items() if n.startswith("f1") and len(s) > 1} == {500}
    assert cut_widths(result.plan, replace(pruned_run, result=result))
    stored = parameters_by_name(result.module.graph_module)  # type: ignore[arg-type]
    torch.testing.assert_close(stored["f1.weight"], load_lenet5().f1.weight, rtol=0, atol=0)
