"""compress, and everything that can be asked of its result."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api import undoing
from tersor.api.choosing import ChoiceRecord
from tersor.api.files import artifact_size
from tersor.api.final import Final, Made, built_final, make_final
from tersor.api.quality import Quality
from tersor.api.result import Result
from tersor.api.settling import Settling
from tersor.api.stages import build_for
from tersor.core.errors import ConfigError, ParityError, SiteNotFoundError, TersorError
from tersor.core.jsonable import dumps, from_json, read_record
from tersor.core.records import Plan
from tersor.report.brief import brief
from tersor.report.explain import costliest, explain
from tersor.report.record import Report
from tests.e2e.conftest import FORMATS, LENET_TARGET, RESNET_TARGET
from tests.e2e.helpers import (
    N_TEST,
    Accuracy,
    Finished,
    Recorded,
    after,
    close_logits,
    partial_files,
    parts,
    records,
    same_class,
    tensor,
    warm_copy,
)

STAGE_NAMES = (
    "data", "capture", "calibrate", "propose", "errors", "baseline", "price", "plan",
    "transform", "build", "verify",
)  # fmt: skip


def test_verdict_holds_together(finished: Finished) -> None:
    verdict = finished.result.verdict
    assert verdict.status in {"pass", "fail", "unknown"}
    assert verdict.speedup == pytest.approx(
        verdict.baseline_latency.median_ms / verdict.latency.median_ms, rel=0.25
    )  # a median of ratios beside a ratio of medians
    assert verdict.speedup_low <= verdict.speedup <= verdict.speedup_high
    for timing in (verdict.latency, verdict.baseline_latency, verdict.original_latency):
        assert timing is not None
        assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms
    assert 0 <= verdict.agreement_p5 <= verdict.agreement <= 1
    assert verdict.output_kind == "logits"
    assert verdict.original_bytes == sum(t.numel() * 4 for t in finished.model.parameters()) + sum(
        t.numel() * t.element_size() for t in finished.model.buffers()
    )
    assert 0 < verdict.size_bytes < verdict.original_bytes / 2
    assert verdict.held_out
    assert verdict.test_uses == 1
    assert not verdict.returned_baseline


def test_verdict_checks_each_budget_and_no_other(lenet_run: Finished, resnet_run: Finished) -> None:
    found = {check.name: check for check in lenet_run.result.verdict.checks}
    assert set(found) == set(LENET_TARGET.budgets())
    assert found["size_ratio"].status == "pass"
    assert found["drop_points"].status == ("pass" if found["drop_points"].found <= 5 else "fail")
    assert lenet_run.result.verdict.test_samples == N_TEST
    assert {c.name for c in resnet_run.result.verdict.checks} == set(RESNET_TARGET.budgets())


def test_quality_on_few_test_samples_is_unknown(resnet_run: Finished) -> None:
    verdict = resnet_run.result.verdict
    assert verdict.test_samples == 20
    check = next(c for c in verdict.checks if c.name == "min_agreement")
    assert (check.status, verdict.status) == ("unknown", "unknown")
    assert "20 test samples" in check.note
    assert "30" in check.note
    size = next(c for c in verdict.checks if c.name == "size_ratio")
    assert size.status == "pass"  # not a quality: it needs no samples


def test_stages_report_their_progress(finished: Finished) -> None:
    progress = finished.progress
    assert tuple(s for s in progress.stages if s != "metric") == STAGE_NAMES
    assert ("metric" in progress.stages) == (finished.metric is not None)
    assert progress.steps > len(STAGE_NAMES)
    assert progress.closed >= 1
    assert any("best uncompressed build" in note for note in progress.notes)


def test_the_model_is_untouched(finished: Finished, lenet_run: Finished) -> None:
    state = finished.model.state_dict()
    assert list(state) == list(finished.before)
    assert all(torch.equal(state[name], t) for name, t in finished.before.items())
    was_training = finished is lenet_run
    assert all(module.training is was_training for module in finished.model.modules())
    assert all(p.requires_grad and p.grad is None for p in finished.model.parameters())


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_result_is_called_like_the_model(
    finished: Finished, images: dict[str, Tensor], batch: int
) -> None:
    x = images["test"][:batch]
    model = finished.result.model
    found = model(x)
    assert type(found) is Tensor
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (batch, 10))
    assert torch.equal(found, model(x=x))
    assert torch.equal(found, model(x.double()))  # cast silently between floats
    assert torch.equal(found, model(x.clone().requires_grad_()))
    arrays = model(x.numpy())
    assert type(arrays) is np.ndarray
    assert arrays.dtype == np.float32
    assert np.array_equal(arrays, found.numpy())
    assert np.array_equal(model(x=x.numpy()), arrays)
    assert close_logits(finished.result.module(x), found)


def test_result_is_close_to_the_original(finished: Finished, images: dict[str, Tensor]) -> None:
    x = images["test"][:100]
    wanted = finished.predict(x)
    assert same_class(finished.result.model(x), wanted) >= 0.9


def test_module_is_a_module_of_its_own(finished: Finished, images: dict[str, Tensor]) -> None:
    x = images["test"][:16]
    module = finished.result.module
    assert isinstance(module, nn.Module)
    assert close_logits(module(x), finished.result.model(x))
    assert torch.equal(module(x=x), module(x))
    own = {t.data_ptr() for t in finished.model.parameters()}
    assert not own & {t.data_ptr() for t in module.state_dict().values()}


def test_wrong_calls_of_the_result_say_what_is_wanted(
    finished: Finished, images: dict[str, Tensor]
) -> None:
    model = finished.result.model
    with pytest.raises(TersorError, match=r"input 'x': found int64, wanted float32"):
        model(images["test"][:1].long())
    with pytest.raises(TersorError, match=r"found shape \(1, 1, 14, 14\), wanted \(batch, 1, 28"):
        model(images["test"][:1, :, ::2, ::2])
    with pytest.raises(TersorError, match="y"):
        model(images["test"][:1], y=1)


# --- the metric


def test_metric_sees_predict_and_the_test_metric_exactly_two(lenet_run: Finished) -> None:
    assert lenet_run.uses_of_test_metric == 2
    assert lenet_run.test_metric is not None
    original, result = lenet_run.test_metric.predictors
    assert original is not result
    assert lenet_run.metric is not None
    assert len(lenet_run.metric.predictors) >= 2


def test_drop_is_a_hundred_times_the_difference_of_the_test_metric(lenet_run: Finished) -> None:
    verdict, held_out = lenet_run.result.verdict, lenet_run.test_metric
    assert held_out is not None
    score = Accuracy(held_out.images, held_out.labels)
    original = score(lenet_run.predict)
    result = score(lenet_run.result.model)
    assert verdict.metric_original == pytest.approx(original)
    assert verdict.metric_result == pytest.approx(result)
    assert verdict.drop_points == pytest.approx(100 * (original - result))


def test_without_a_metric_the_drop_is_lost_agreement(
    resnet_run: Finished, images: dict[str, Tensor]
) -> None:
    verdict = resnet_run.result.verdict
    assert verdict.metric_original is None
    assert verdict.metric_result is None
    assert verdict.drop_points == pytest.approx(100 * (1 - verdict.agreement))
    test = resnet_run.result._run.session.parts["test"].tensors[0]
    seen = images["train"][:100]
    assert all(bool((seen == sample).flatten(1).all(1).any()) for sample in test)
    agreement = same_class(resnet_run.result.model(test), resnet_run.predict(test))
    assert verdict.agreement == pytest.approx(agreement)


def test_a_metric_alone_is_not_held_out(again: Callable[..., Result], lenet_run: Finished) -> None:
    assert lenet_run.metric is not None
    metric = Accuracy(lenet_run.metric.images, lenet_run.metric.labels)
    verdict = again(metric=metric).verdict
    assert not verdict.held_out
    assert verdict.metric_original == pytest.approx(_accuracy(lenet_run, metric))


def _accuracy(run: Finished, metric: Accuracy) -> float:
    return Accuracy(metric.images, metric.labels)(run.predict)


def test_another_test_metric_gets_another_verdict(
    again: Callable[..., Result], lenet_run: Finished, images: dict[str, Tensor]
) -> None:
    """The verdict that the store keeps belongs to the test metric that it was made with."""
    metric = Accuracy(images["train"][60:100], images["train_labels"][60:100])
    wrong = Accuracy(images["test"][40:80], (images["test_labels"][40:80] + 1) % 10)
    verdict = again(metric=metric, test_metric=wrong).verdict
    assert len(wrong.predictors) == 2
    assert verdict.metric_original == pytest.approx(_accuracy(lenet_run, wrong))
    assert verdict.metric_original != lenet_run.result.verdict.metric_original


def test_another_metric_of_the_same_code_gets_another_plan(
    again: Callable[..., Result], images: dict[str, Tensor]
) -> None:
    """Two metrics that differ in their data alone share no plan of the store."""
    metric = Accuracy(images["train"][100:140], images["train_labels"][100:140])
    progress = Recorded()
    again(metric=metric, progress=progress)
    assert "plan" in progress.stages


def test_a_metric_may_use_arrays(again: Callable[..., Result], images: dict[str, Tensor]) -> None:
    """``predict`` takes numpy and gives numpy, for the original as for the result."""
    kinds = []

    def metric(predict: Callable[[Any], Any]) -> float:
        found = predict(images["train"][60:90].numpy())
        kinds.append(type(found))
        return float((found.argmax(1) == images["train_labels"][60:90].numpy()).mean())

    again(metric=metric, test_metric=metric)
    assert set(kinds) == {np.ndarray}


def test_a_metric_in_points(again: Callable[..., Result], lenet_run: Finished) -> None:
    assert lenet_run.metric is not None
    inner = Accuracy(lenet_run.metric.images, lenet_run.metric.labels)
    percent = tersor.Metric(lambda predict: 100 * inner(predict), points=1.0)
    verdict = again(metric=percent).verdict
    assert verdict.metric_original == pytest.approx(100 * _accuracy(lenet_run, inner))
    assert verdict.metric_result is not None
    assert verdict.drop_points == pytest.approx(verdict.metric_original - verdict.metric_result)


@pytest.mark.usefixtures("never_slower")
def test_a_fallback_does_not_use_the_test_metric_of_the_original_twice(
    again: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, images: dict[str, Tensor]
) -> None:
    held_out = Accuracy(images["test"][80:120], images["test_labels"][80:120])
    monkeypatch.setattr("tersor.api.result.is_slower", lambda *_: True)
    monkeypatch.setattr(Result, "_needs_size", lambda _: False)
    result = again(test_metric=held_out)
    assert result.verdict.returned_baseline
    assert "that build is returned instead" in result.verdict.reason
    assert result.verdict.test_uses == 1
    first = held_out.predictors[0]
    assert [p for p in held_out.predictors if p is first] == [first]
    precision = result.plan.choice.precision
    assert set(result.plan.assignment.values()) == {precision}
    x = images["test"][:5]
    assert close_logits(result.module(x), result.model(x))
    with torch.no_grad():
        assert close_logits(result.model(x), held_out.predictors[0](x))


def test_a_fallback_takes_back_the_model_that_was_seen_before(
    lenet_run: Finished, monkeypatch: pytest.MonkeyPatch, images: dict[str, Tensor]
) -> None:
    """``model`` before ``verdict``: both speak of the same build afterwards."""
    found = lenet_run.result.resolve(tersor.Target(size_ratio=2.5))
    compressed = found.model
    monkeypatch.setattr("tersor.api.result.is_slower", lambda *_: True)
    monkeypatch.setattr(Result, "_needs_size", lambda _: False)
    assert found.verdict.returned_baseline
    assert found.model is not compressed
    x = images["test"][:5]
    assert close_logits(found.model(x), lenet_run.predict(x))
    assert not torch.equal(found.model(x), compressed(x))


@pytest.mark.usefixtures("never_slower")
@pytest.mark.parametrize("n_failing", [1, 2, 3])
def test_a_plan_whose_build_fails_is_replaced_by_the_next_one(
    again: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, n_failing: int
) -> None:
    """And by the best uncompressed build only where none is left; another run takes the same."""
    found = again(target=tersor.Target(size_ratio=3.0, drop_points=10.0))
    plan, base_ms = replace(found.plan, seed=100), found._run.prices.baseline.timing.median_ms

    def other(seed: int, speed: float, lost: float) -> Plan:
        return replace(plan, seed=seed, measured_ms=speed * base_ms, measured_error=lost)

    slow, quick, late, lossy = (
        other(101, 0.5, 1.0), other(102, 0.4, 1.0), other(103, 1.2, 0.0), other(104, 0.1, 99.0),
    )  # fmt: skip
    choice = replace(found._choice, plan=plan, finalists=(plan, late, lossy, slow, quick))
    real, tried, left = built_final, [], [n_failing]

    def building(session: Any, made: Made, how: Any) -> Final:
        tried.append(how)
        if len(tried) <= left[0]:
            raise ParityError("outputs differ")
        return real(session, made, how)

    monkeypatch.setattr("tersor.api.result.built_final", building)

    def settled(settling: Settling) -> Made:
        return make_final(settling.session, settling.offered, plan, settling.quality, "first")

    monkeypatch.setattr(Settling, "made", settled)
    wanted = {1: quick, 2: slow}.get(n_failing)
    verdict = Result(found._run, found.target, choice).verdict
    if wanted is None:
        assert verdict.returned_baseline
        assert "the planned build failed" in verdict.reason
        return
    left[0] = 0
    for _ in range(2):  # without trying what failed
        fresh = Result(found._run, found.target, choice)
        verdict = fresh.verdict
        tried.clear()
        assert not verdict.returned_baseline
        assert "the next one stands in" in verdict.reason
        assert fresh.model is not None
        assert fresh.plan.seed == wanted.seed
        assert len(tried) <= 1


# --- plans


@pytest.mark.usefixtures("never_slower")
def test_a_saved_plan_replays(lenet_run: Finished, tmp_path: Path) -> None:
    plan = lenet_run.result.plan
    path = tmp_path / "plan.json"
    plan.save(path)
    assert read_record(Plan, path) == plan
    progress = Recorded()
    replayed = tersor.apply_plan(
        lenet_run.model,
        lenet_run.data,
        path,
        cache_dir=warm_copy(lenet_run, tmp_path),
        progress=progress,
    )
    assert replayed.plan.assignment == plan.assignment
    assert replayed.plan.choice == plan.choice
    assert not {"calibrate", "propose", "price", "plan"} & set(progress.stages)
    x = torch.cat(list(lenet_run.data.test))
    assert close_logits(replayed.model(x), lenet_run.result.model(x))
    assert {c.name for c in replayed.verdict.checks} == set(plan.target)


@pytest.mark.usefixtures("never_slower")
def test_an_edited_plan_is_carried_out(
    lenet_run: Finished, tmp_path: Path, images: dict[str, Tensor]
) -> None:
    plan = lenet_run.result.plan
    native = plan.choice.precision
    edited = [s for s, level in plan.assignment.items() if level not in {"f32", "bf16"}]
    changed = max(edited, key=lambda s: lenet_run.before[f"{s}.weight"].numel())
    path = tmp_path / "plan.json"
    plan.save(path)
    text = json.loads(path.read_text(encoding="utf-8"))
    text["assignment"][changed] = native
    path.write_text(json.dumps(text), encoding="utf-8")
    found = tersor.apply_plan(
        lenet_run.model,
        lenet_run.data,
        path,
        cache_dir=warm_copy(lenet_run, tmp_path),
        progress=False,
    )
    assert found.plan.assignment == {**plan.assignment, changed: native}
    assert found.explain(changed)["level"] == native
    weight = lenet_run.before[f"{changed}.weight"]
    stored = [t for t in found.module.state_dict().values() if t.shape == weight.shape]
    assert any(torch.equal(t, weight) for t in stored)  # to the bit what was given
    assert found.verdict.size_bytes > lenet_run.result.verdict.size_bytes
    x = images["test"][:4]
    assert not torch.equal(found.model(x), lenet_run.result.model(x))


@pytest.mark.parametrize(
    ("site", "level", "message"),
    [
        ("f9", "int8", "'f9' is not in the model"),
        ("f1", "int4", r"assignment\[f1\]: found 'int4', wanted"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    lenet_run: Finished, tmp_path: Path, site: str, level: str, message: str
) -> None:
    plan = lenet_run.result.plan
    path = tmp_path / "plan.json"
    plan.save(path)
    text = json.loads(path.read_text(encoding="utf-8"))
    text["assignment"][site] = level
    path.write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        tersor.apply_plan(
            lenet_run.model,
            lenet_run.data,
            path,
            cache_dir=warm_copy(lenet_run, tmp_path),
            progress=False,
        )


def test_same_store_same_plan(lenet_run: Finished, again: Callable[..., Result]) -> None:
    progress = Recorded()
    found = again(
        metric=Accuracy(lenet_run.metric.images, lenet_run.metric.labels),
        test_metric=Accuracy(lenet_run.test_metric.images, lenet_run.test_metric.labels),
        progress=progress,
        model=None,
    )
    assert found.plan == lenet_run.result.plan
    assert not {"calibrate", "propose", "errors", "baseline", "price", "plan", "transform"} & set(
        progress.stages
    )


@pytest.mark.slow  # test_resume compares the same two runs behind a kill
def test_same_prices_same_choices(lenet_run: Finished, tmp_path: Path, images: Any) -> None:
    """Without the plan's own record: solved and searched again, from what was measured."""
    assert lenet_run.metric is not None
    found = tersor.compress(
        lenet_run.model,
        parts(images),
        target=LENET_TARGET,
        metric=Accuracy(lenet_run.metric.images, lenet_run.metric.labels),
        cache_dir=warm_copy(lenet_run, tmp_path, after("plan")[:-1]),
        progress=False,
        methods=FORMATS,
    )
    assert found.plan.assignment == lenet_run.result.plan.assignment
    assert found.plan.choice == lenet_run.result.plan.choice


def test_final_weights_that_lose_too_much_are_not_returned(
    again: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan held in the search, its final weights do not: a milder one is chosen."""
    real, seen = make_final, []

    def worse(session: Any, offered: Any, plan: Plan, quality: Any, key: str) -> Made:
        made = real(session, offered, plan, quality, key)
        seen.append(plan)
        return made if len(seen) > 1 else replace(made, loss=2 * quality.limit())

    monkeypatch.setattr("tersor.api.settling.make_final", worse)
    progress = Recorded()
    # A size that floats don't meet: whatever is measured, the plan is not the baseline.
    result = again(target=tersor.Target(size_ratio=3.0, drop_points=10.0), progress=progress)
    assert len(seen) == 2
    assert result.plan == seen[1]
    assert seen[1].predicted_error <= seen[0].predicted_error
    assert any("a milder plan is chosen" in note for note in progress.notes)


def test_a_measured_plan_that_errs_less_comes_before_another_search(
    again: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = again(target=tersor.Target(size_ratio=3.0, drop_points=10.0))
    plan, error = result.plan, result.plan.predicted_error
    assert error > 0

    base_ms = result._run.prices.baseline.timing.median_ms

    def other(share: float, speed: float, lost: float) -> Plan:
        ms = speed * base_ms
        return replace(plan, predicted_error=share * error, measured_ms=ms, measured_error=lost)

    alike, lossy, late = other(0.99, 0.1, 0.0), other(0.5, 0.2, 99.0), other(0.1, 1.1, 0.0)
    slow, quick = other(0.2, 0.4, 1.0), other(0.3, 0.3, 1.0)
    found = replace(plan, predicted_ms=2 * plan.predicted_ms)
    seen, lost = [], [20.0, 20.0, 20.0, 1.0]

    def made(session: Any, offered: Any, plan: Plan, quality: Any, key: str) -> Made:
        del offered, quality, key
        seen.append(plan)
        return Made(session.graph, loss=lost[len(seen) - 1])

    monkeypatch.setattr("tersor.api.settling.make_final", made)
    monkeypatch.setattr(Settling, "chosen", lambda s: replace(s.choice, plan=found))
    choice = replace(result._choice, plan=plan, finalists=(plan, alike, late, lossy, slow, quick))
    fresh = Result(result._run, result.target, choice)
    assert fresh._made.loss == 1.0
    assert seen == [plan, quick, slow, found]  # and not what is slower than the baseline
    assert fresh.plan == found


def test_a_file_that_turns_out_larger_than_planned_gets_a_smaller_plan(
    again: Callable[..., Result], lenet_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = lenet_run.result.verdict.original_bytes / 3.0
    real, sizes = artifact_size, []

    def larger(*args: Any) -> int:
        sizes.append(real(*args))
        return sizes[-1] if len(sizes) > 1 else round(1.1 * most)

    monkeypatch.setattr("tersor.api.settling.artifact_size", larger)
    monkeypatch.setattr("tersor.api.settling.carried_size", lambda *_, **_named: 0)
    monkeypatch.setattr("tersor.api.settling._NEARLY", 0.0)
    monkeypatch.setattr("tersor.api.settling._WORTH", 1.0)
    chosen, spare = Settling.chosen, []

    def watched(settling: Settling) -> ChoiceRecord:
        spare.append((settling.scope.spare_bytes, settling.choice.plan.predicted_bytes))
        return chosen(settling)

    monkeypatch.setattr(Settling, "chosen", watched)
    progress = Recorded()
    result = again(target=tersor.Target(size_ratio=3.0), progress=progress)
    assert any("a smaller plan is chosen" in note for note in progress.notes)
    (left, planned), *_ = spare  # what it was over by, and a little
    assert left - math.ceil(round(1.1 * most) - most) == int(0.002 * planned) > 0
    assert result.plan.predicted_bytes <= 0.9 * most + 1
    assert result.verdict.size_bytes <= most


@pytest.mark.parametrize(
    ("lost", "speeds", "n_searches", "taken"),
    [
        ((0.1, 0.4), (0.8,), 1, 1),  # quicker and within the loss, which is spent now
        ((0.3, 0.35, 0.4), (0.8, 0.6), 2, 2),
        ((0.3, 0.35, 0.6), (0.8, 0.6), 2, 1),  # the second loses more than is allowed
        ((0.1, 0.6), (0.8,), 1, 0),
        ((0.1,), (0.99,), 1, 0),  # not worth final weights of its own
        ((0.4,), (), 0, 0),
    ],
)
def test_final_weights_that_leave_room_get_a_faster_plan(
    again: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    lost: tuple[float, ...],
    speeds: tuple[float, ...],
    n_searches: int,
    taken: int,
) -> None:
    """What searches see loses more than the final weights do: the rest of the loss buys speed."""
    real, seen, shares = make_final, [], []

    def made(session: Any, offered: Any, plan: Plan, quality: Any, key: str) -> Made:
        seen.append(plan)
        return replace(real(session, offered, plan, quality, key), loss=lost[len(seen) - 1])

    def chosen(settling: Settling) -> Any:
        shares.append(settling.scope.share)
        ms = seen[0].measured_ms * speeds[len(shares) - 1]
        return replace(settling.choice, plan=replace(seen[0], measured_ms=ms))

    monkeypatch.setattr("tersor.api.settling.make_final", made)
    monkeypatch.setattr(Settling, "chosen", chosen)
    monkeypatch.setattr(Quality, "has_errors", True)
    monkeypatch.setattr(Quality, "limit", lambda _: 0.5)
    progress = Recorded()
    result = again(target=tersor.Target(size_ratio=3.0, min_agreement=0.5), progress=progress)
    assert sum("a faster plan is tried" in note for note in progress.notes) == n_searches
    assert shares == sorted(shares)
    assert all(1.0 < share <= 2.0 for share in shares)
    assert result.plan.measured_ms == seen[taken].measured_ms


@pytest.mark.parametrize(
    ("loss", "share", "is_taken"), [(0.0, 0.9, True), (0.5, 0.9, False), (0.0, 1.1, False)]
)
def test_a_file_that_leaves_room_gets_a_larger_plan_that_fits_and_loses_less(
    again: Callable[..., Result],
    lenet_run: Finished,
    monkeypatch: pytest.MonkeyPatch,
    loss: float,
    share: float,
    *,
    is_taken: bool,
) -> None:
    most = lenet_run.result.verdict.original_bytes / 3.0
    real, seen = make_final, []

    def made(session: Any, offered: Any, plan: Plan, quality: Any, key: str) -> Made:
        seen.append(plan)
        known = real(session, offered, plan, quality, key)
        return replace(known, loss=0.5 if len(seen) == 1 else loss)

    monkeypatch.setattr("tersor.api.settling.make_final", made)
    monkeypatch.setattr(
        "tersor.api.settling.artifact_size",
        lambda *_: round(most * (0.8 if len(seen) == 1 else share)),
    )
    monkeypatch.setattr("tersor.api.settling.carried_size", lambda *_, **_named: 0)
    monkeypatch.setattr("tersor.api.settling._NEARLY", 0.0)
    settled: list[Settling] = []
    monkeypatch.setattr(
        "tersor.api.result.settle", lambda settling: settled.append(settling) or settling.made()
    )
    progress = Recorded()
    result = again(target=tersor.Target(size_ratio=3.0), progress=progress)
    assert any("a larger plan is tried" in note for note in progress.notes)
    assert len(seen) == 2
    assert result.plan == seen[1 if is_taken else 0]
    assert (settled[0].scope.spare_bytes < 0) == is_taken


def test_another_seed_is_another_run(lenet_run: Finished, images: dict[str, Tensor]) -> None:
    whole = tersor.Data([images["train"][:50]], output="logits")
    from tersor.capture.samples import collect

    first, second = collect(whole, 0), collect(whole, 1)
    assert torch.equal(collect(whole, 0)["test"].tensors[0], first["test"].tensors[0])
    assert not torch.equal(first["test"].tensors[0], second["test"].tensors[0])
    assert lenet_run.result.plan.seed == 0


# --- explain, pareto, resolve


def test_explain_says_price_error_alternatives_and_undo(finished: Finished) -> None:
    plan, record = finished.result.plan, finished.result.record
    for site, level in plan.assignment.items():
        facts = explain(record, site)
        assert set(facts) == {
            "site", "op_kind", "shape", "macs", "pinned", "level", "method", "error", "error_se", "samples",
            "size_bytes", "predicted_ms", "predicted_ms_se", "reason", "settings", "alternatives", "undo",
            "kind", "units", "members", "native", "recovered",
        }  # fmt: skip
        assert (facts["site"], facts["level"]) == (site, level)
        assert facts["reason"]
        assert (facts["macs"] > 0) == (facts["op_kind"] != "add")
        assert level not in {other["level"] for other in facts["alternatives"]}
        assert facts["alternatives"]
        assert (facts["undo"] is None) == (level == plan.choice.precision)
        if facts["undo"] is not None:
            has_weight = facts["op_kind"] != "add"
            assert (facts["undo"]["size_bytes_change"] > 0) == has_weight
            assert facts["undo"]["error_change"] <= 0
            assert not facts["undo"]["measured"]
        json.dumps(facts, allow_nan=False)
    with pytest.raises(SiteNotFoundError, match="no site is called 'nothing'; nearest of"):
        finished.result.explain("nothing")


def test_undoing_one_of_the_costliest_choices_is_measured(
    lenet_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []

    def counted(session: Any, graph: Any, choice: Any) -> Any:
        built.append(graph)
        return build_for(session, graph, choice)

    monkeypatch.setattr(undoing, "build_for", counted)
    record = lenet_run.result.record
    name = costliest(record)[0]
    site = next(s for s in record.sites if s.name == name)
    assert record.level(site) != record.native(site)
    predicted = explain(record, name)["undo"]
    undo = lenet_run.result.explain(name)["undo"]
    assert undo["measured"]
    assert undo["predicted"]["latency_ms_change"] == predicted["latency_ms_change"]
    assert math.isfinite(undo["latency_ms_change"])
    assert undo["error_change"] != predicted["error_change"]  # on the whole search part
    assert len(built) == 2  # the plan, and the plan without it
    assert lenet_run.result.explain(name)["undo"] == undo
    assert len(built) == 2


def test_the_curve_is_found_again(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    result = finished.result
    whole = {name: int(value) for name, value in result.plan.target.items()}  # as many write them
    choice = replace(result._choice, finalists=(replace(result.plan, target=whole),))
    points = Result(result._run, result.target, choice).pareto
    kept = from_json(ChoiceRecord, json.loads(dumps(choice)))  # as the store gives it
    monkeypatch.delattr("tersor.api.result.curve")
    assert Result(result._run, result.target, kept).pareto == points


def is_front(points: Sequence[Any]) -> bool:
    """Fastest first, and none at least as good as another in all that they tell."""
    told = [(p.latency_ms, p.size_mb, p.drop, p.error) for p in points]
    pairs = [(a, b) for i, a in enumerate(told) for j, b in enumerate(told) if i != j]
    is_beaten = any(all(x <= y for x, y in zip(a, b, strict=True)) for a, b in pairs)
    return told == sorted(told) and not is_beaten and all(0 <= t[2] <= 100 for t in told)


def test_pareto_is_sorted_and_marked(finished: Finished) -> None:
    points = finished.result.pareto
    assert len(points) >= 2
    assert is_front(points)
    for point in points:
        assert point.measured == (point.plan.measured_ms is not None)
        wanted = point.plan.measured_ms if point.measured else point.plan.predicted_ms
        assert point.latency_ms == wanted
        assert point.size_mb > 0
        assert point.error >= 0
    assert not all(p.measured for p in points)


def test_resolve_is_quick_and_lazy_and_materialises(
    lenet_run: Finished, tmp_path: Path, images: dict[str, Tensor]
) -> None:
    assert lenet_run.test_metric is not None
    before, used = len(lenet_run.test_metric.predictors), lenet_run.result._run.test.uses
    files = records(lenet_run.cache)
    start = time.perf_counter()
    found = lenet_run.result.resolve("size_ratio=1.5")  # as compress takes it
    assert time.perf_counter() - start < 10
    assert not found.is_materialised
    assert found.plan.measured_ms is None or found.plan.choice == lenet_run.result.plan.choice
    assert found.plan.target == {"size_ratio": 1.5}
    assert len(lenet_run.test_metric.predictors) == before
    assert records(lenet_run.cache) == files  # nothing was built, measured or kept
    x = images["test"][:7]
    assert close_logits(found.module(x), found.model(x))
    assert found.is_materialised
    verdict = found.verdict
    assert verdict.test_uses == used + 1  # every verdict after the first: not held out
    assert used >= 1
    assert not verdict.held_out
    assert verdict.original_bytes / verdict.size_bytes >= 1.5
    assert [c.name for c in verdict.checks] == ["size_ratio"]
    found.save(tmp_path / "resolved.tersor")
    assert torch.equal(tersor.load(tmp_path / "resolved.tersor")(x), found.model(x))


def test_a_size_of_one_counts_the_whole_file(lenet_run: Finished) -> None:
    """The uncompressed build's tensors would fit; with graph and report its file does not."""
    found = lenet_run.result.resolve("size_ratio=1")
    original = lenet_run.result.verdict.original_bytes
    assert found.plan.predicted_bytes <= original
    assert found.plan.assignment != lenet_run.result.resolve("1x").plan.assignment
    assert set(found.plan.assignment.values()) & {"int8", "int8_weight"}


def test_resolve_to_what_no_plan_reaches_names_what_binds(lenet_run: Finished) -> None:
    found = lenet_run.result.resolve(tersor.Target(size_ratio=50))
    assert "size" in found.plan.binding
    assert found.plan.predicted_bytes > 0


def test_resolved_again_is_as_resolved_at_once(lenet_run: Finished) -> None:
    """Evaluations keep their units, and are not forgotten on the way."""
    first = lenet_run.result
    wanted = tersor.Target(min_agreement=0.97, speedup=1.01)
    direct = first.resolve(wanted)
    for between in ("1.2x smaller", "min_agreement=0.5", "1 pt"):
        again = first.resolve(between).resolve(wanted)
        assert again.plan.assignment == direct.plan.assignment, between
        assert again._choice.evaluations == direct._choice.evaluations
    assert is_front(direct.pareto)
    points = {(p.latency_ms, p.size_mb): p.drop for p in first.pareto}
    for point in first.resolve("1.2x smaller").pareto:
        if (point.latency_ms, point.size_mb) in points:
            assert point.drop == pytest.approx(points[point.latency_ms, point.size_mb])


# --- files


def test_save_load_verify_and_report(
    finished: Finished, tmp_path: Path, images: dict[str, Tensor]
) -> None:
    path = tmp_path / "model.tersor"
    finished.result.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.tersor"]
    x = images["test"][:7]
    runner = tersor.load(path)
    assert torch.equal(runner(x), finished.result.model(x))
    assert (runner.stats()["calls"], runner.stats()["samples"]) == (1, 7)
    checked = tersor.verify(path, model=finished.model, inputs={"x": images["test"][:40].numpy()})
    assert [c.status for c in checked.checks] == ["pass", "pass", "pass"]
    assert next(c.name for c in checked.checks) == "hashes"
    report = tersor.read_report(path)
    assert report.plan == finished.result.plan
    assert report.verdict.size_bytes == path.stat().st_size  # the verdict speaks of this file
    assert replace(report.verdict, size_bytes=0) == replace(finished.result.verdict, size_bytes=0)
    whole = finished.result.record
    assert report.candidates == (brief(whole) if report.left_out else whole).candidates


def test_size_that_the_verdict_promised_is_what_is_saved(
    finished: Finished, tmp_path: Path
) -> None:
    """DESIGN.md: ``size_mb`` is 10^6 bytes of the saved artifact."""
    path = tmp_path / "model.tersor"
    finished.result.save(path)
    size = next(c for c in finished.result.verdict.checks if c.name == "size_ratio")
    real = finished.result.verdict.original_bytes / path.stat().st_size
    assert real >= size.wanted or size.status != "pass"


def test_report_is_written_as_json_and_reads_back(finished: Finished, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    finished.result.report(path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert from_json(Report, found["record"], "record") == finished.result.record
    assert found["status"] == finished.result.verdict.status
    with pytest.raises(ConfigError, match=r"x\.html: reports are written as \.json"):
        finished.result.report(tmp_path / "x.html")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_nothing_partial_is_in_the_store(finished: Finished) -> None:
    assert partial_files(finished.cache) == []
    assert {name.split("/")[0] for name in records(finished.cache)} >= {
        "propose", "baseline", "price", "plan", "transform", "verdict",
    }  # fmt: skip


# --- options


def test_kept_layers_stay_as_they_are(images: dict[str, Tensor]) -> None:
    from tests.data.zoo import load_lenet5

    found = tersor.inspect(load_lenet5(), images["train"][:2], keep=("f*",))
    pinned = {site.name: site.pinned for site in found.sites}
    assert {name for name, reason in pinned.items() if reason} == {"f1", "f2"}
    assert "'f*'" in str(pinned["f1"])


@pytest.mark.usefixtures("never_slower")
def test_compress_respects_keep(tiny: nn.Module, tiny_data: tersor.Data, tmp_path: Path) -> None:
    result = tersor.compress(
        tiny,
        tiny_data,
        target=tersor.Target(size_ratio=1.0, drop_points=50),
        keep=("last",),
        cache_dir=tmp_path,
        progress=False,
    )
    assert "last" not in result.plan.assignment
    assert {"first", "middle", "width:first"} == set(result.plan.assignment)
    assert result.explain("last")["pinned"] == "kept: matches 'last'"
    stored = result.module.state_dict().values()
    assert any(torch.equal(t, tiny.last.weight) for t in stored if t.shape == (5, 32))


def test_geometry_is_inferred_only_with_a_warning(
    tiny: nn.Module, tmp_path: Path, images: dict[str, Tensor]
) -> None:
    data = [images["train"][i : i + 8, 0, 14] for i in range(0, 80, 8)]
    with pytest.warns(UserWarning, match="output="):
        tersor.bench(tiny, data, cache_dir=tmp_path)


def test_bench_measures_every_uncompressed_build(
    tiny: nn.Module, tiny_data: tersor.Data, tmp_path: Path
) -> None:
    rows = tersor.bench(tiny, tiny_data, cache_dir=tmp_path)
    assert any(row.choice is None for row in rows)  # as given
    assert any(row.choice is not None and row.choice.precision == "f32" for row in rows)
    assert all(row.timing.median_ms > 0 for row in rows)


@pytest.mark.usefixtures("never_slower")
def test_dictionaries_tuples_and_batches(tmp_path: Path) -> None:
    """Keyword inputs, two of them, nested outputs; built for a batch of 2."""
    model = TwoWays(torch.Generator().manual_seed(0))
    x, y = _noise(90, 24, 1), _noise(90, 24, 2)
    data = tersor.Data([{"x": x, "y": y}], output="values")
    result = tersor.compress(
        model,
        data,
        target={"size_ratio": 1.0, "min_agreement": 0.5},
        batch=2,
        cache_dir=tmp_path,
        progress=False,
    )
    wanted = model(x[:5], y=y[:5])
    for found in (
        result.model(x[:5], y=y[:5]),
        result.model(y=y[:5], x=x[:5]),
        result.module(x=x[:5], y=y[:5]),
    ):
        assert list(found) == ["both", "parts"]
        assert type(found["parts"]) is tuple
        assert found["both"].dtype == torch.float32
        flat = [found["both"], *found["parts"]]
        expected = [wanted["both"], *wanted["parts"]]
        assert [f.shape for f in flat] == [w.shape for w in expected]
    arrays = result.model(x=x[:5].numpy(), y=y[:5].numpy())
    assert type(arrays["parts"][1]) is np.ndarray
    assert torch.equal(tensor(arrays["both"]), result.model(x=x[:5], y=y[:5])["both"])
    assert result.plan.choice.batch == 2
    stats = result.model.stats()
    assert stats["padded_rows"] == stats["calls"]  # 5 rows in three chunks of 2


class TwoWays(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(24, 16), nn.Linear(24, 16)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 5

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Any]:
        a, b = self.left(x).relu(), self.right(y)
        return {"both": a + b, "parts": (a, b)}


def _noise(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
