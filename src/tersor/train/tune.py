"""The fast step: what makes training faster here, switched on by measuring.

Every switch (data on the device, bfloat16, layouts, fused kernels, compiling, recording, threads) makes
some models faster and others slower, and some change the result. So each is tried on the caller's own
step, beside the step without it, and stays only where it is faster and leaves the loss as it was. What
tuning trained is undone: training begins where it stood.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.progress import Printed, Progress, Silent
from tersor.timing.protocol import measure
from tersor.train.switches import MEMORY_SHARE, ResidentData
from tersor.train.tune_batches import Moved, draw_pool, resident
from tersor.train.tune_checks import (
    Switches,
    check_alone,
    check_companions,
    check_device,
    check_parts,
    chosen_names,
)
from tersor.train.tune_records import LossCheck, LossRule, SwitchReport, TimeRule, TuneReport
from tersor.train.tune_session import AUTOMATIC, BY_NAME, Tuning, without_pool
from tersor.train.tune_state import Randomness, generators_of
from tersor.train.tune_steps import Job, LossOf, Recipe, Runner, platform_of

__all__ = [
    "AUTOMATIC",
    "BY_NAME",
    "FastStep",
    "LossCheck",
    "LossRule",
    "SwitchReport",
    "TimeRule",
    "TuneReport",
    "tune",
]


class FastStep:
    """A training step with what was switched on.

    Attributes:
        report: What was tried, found and chosen.
        model: The caller's.
        optimizers: Those that step, in order: the caller's, or with ``muon`` a second one, or with
            ``schedule_free`` another. Save the state of all.
    """

    def __init__(self, job: Job, recipe: Recipe, report: TuneReport, progress: Progress) -> None:
        self.report = report
        self.model: nn.Module = job.model
        self.optimizers: tuple[Optimizer, ...] = recipe.optimizers
        self._job, self._recipe, self._progress = job, recipe, progress
        self._runner = Runner(job, recipe, is_live=True)
        self._sources: dict[int, tuple[Iterable[Any], Iterable[Any]]] = {
            id(job.source): (job.source, recipe.batches)
        }

    def __call__(self, batch: Any) -> Tensor:
        """Forward, backward, optimizer, scheduler, gradients to None.

        The batch may be anywhere. The loss is detached and on the device; nothing waits for it, so
        read it (``float(loss)``) only now and then.
        """
        return self._runner(batch)

    def batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The loader's batches on the device: from memory there if ``resident_data`` is on.

        Iterate over the result once an epoch. A loader that can't be kept on the device is moved
        batch by batch, and a note says why.
        """
        if not any(s.name == ResidentData.name for s in self.report.on):
            return Moved(loader, self._job.device)
        if id(loader) not in self._sources:
            limit = MEMORY_SHARE * self._job.platform.memory_bytes
            found = resident(loader, self._job.device, limit)
            if found.batches is None:
                self._progress.note(f"batches are moved one by one: {found.reason}")
            batches = Moved(loader, self._job.device) if found.batches is None else found.batches
            self._sources[id(loader)] = loader, batches
        return self._sources[id(loader)][1]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Weights as they should be evaluated and saved: with ``schedule_free`` the averaged ones.

        Where no optimizer has modes nothing happens. The model's own mode stays as it is.
        """
        moded: list[Any] = [
            o for o in self.optimizers if hasattr(o, "eval") and hasattr(o, "train")
        ]
        for optimizer in moded:
            optimizer.eval()
        try:
            yield
        finally:
            for optimizer in moded:
                optimizer.train()


def tune(  # noqa: PLR0913 - a caller's whole training step
    step: LossOf,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any],
    device: str | torch.device | None = None,
    steps: int | None = None,
    switches: Switches = "auto",
    loss_rule: LossRule | None = None,
    time_rule: TimeRule | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    after_backward: Callable[[nn.Module], object] | None = None,
    seed: int = 0,
    progress: bool | Progress = True,
) -> FastStep:
    """Find out what makes a training step faster here, and switch it on.

    Tuning trains some hundred steps on the first batches, and puts back all that they changed:
    parameters (the same objects), buffers, gradients, modes, the optimizer's and the scaler's state, and
    the generators of random numbers. Step hooks of the optimizer are left off meanwhile.

    Args:
        step: ``step(model, batch)`` returns the loss of a batch, one number with a gradient; no
            backward, no ``.item()``. It should call ``model`` as it is given.
        model: In training mode, on its device.
        optimizer: Of the model's parameters; stays the same object.
        batches: The training loader, or a list of batches; it is iterated several times.
        device: The model's, which is also the default.
        steps: Length of the coming run. What takes time to get ready (compiling) has to save it
            within them. None: it need not.
        switches: "auto" tries ``AUTOMATIC``; a list of names tries those, and those of ``BY_NAME`` are
            only ever tried so; the report of an earlier tuning switches on what was on there, unmeasured.
        loss_rule: When a switch counts as harmless to the loss.
        time_rule: When a switch counts as faster.
        scheduler: Stepped after every step of the result (never while tuning). One that is stepped
            once an epoch is left out here and stays the caller's.
        scaler: A ``torch.amp.GradScaler``, for a step that computes in float16.
        after_backward: Called with the model between backward and the optimizer, on unscaled
            gradients, as to clip them.
        seed: Of the first order of batches; the others follow.
        progress: True prints stages, False is silent, or a ``core.progress.Progress``.

    Returns:
        The step: ``fast(batch) -> loss``.

    Raises:
        ConfigError: A part that can't be used, an optimizer without the model's parameters, a frozen
            model, a step without a loss tensor, an unknown switch.
        ShapeError: The step returns more than one number.
        DataError: No batches, or such as can be read only once.
        NumericalError: The loss is not finite on the first batch, or within the plain runs.
        MissingDependencyError: A switch asked for by name needs a package.
    """
    loss_rule, place = loss_rule or LossRule(), _checked(step, model, optimizer, device)
    check_companions(optimizer, scheduler, scaler, steps)
    if isinstance(switches, TuneReport):
        wanted: tuple[str, ...] | TuneReport = switches
    else:
        check_alone(model)
        wanted = chosen_names(switches, AUTOMATIC, BY_NAME)
    platform = platform_of(place)
    job = Job(
        step=step,
        model=model,
        optimizer=optimizer,
        source=batches,
        device=place,
        platform=platform,
        pool=_pool(batches, loss_rule.steps, MEMORY_SHARE * platform.memory_bytes),
        steps=steps,
        scheduler=scheduler,
        scaler=scaler,
        after_backward=after_backward,
    )
    told = _told(progress)
    tuning = Tuning(
        loss_rule=loss_rule,
        time_rule=time_rule or TimeRule(),
        seed=seed,
        progress=told,
        measure=measure,
    )
    recipe, report = tuning.tuned(job, wanted)
    return FastStep(without_pool(job), recipe, report, told)


def _checked(
    step: Any, model: Any, optimizer: Any, device: str | torch.device | None
) -> torch.device:
    check_parts(step, model, optimizer)
    return check_device(model, device)


def _pool(batches: Any, count: int, limit_bytes: float) -> Any:
    """The first batches; whoever iterates afterwards gets the same ones again."""
    before = Randomness.now(generators_of(batches))
    try:
        return draw_pool(batches, count, limit_bytes)
    finally:
        before.restore()


def _told(progress: bool | Progress) -> Progress:
    if isinstance(progress, bool):
        return Printed() if progress else Silent()
    return progress
