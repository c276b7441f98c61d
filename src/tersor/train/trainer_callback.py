"""Hugging Face's Trainer: one callback."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.errors import MissingDependencyError
from tersor.train.attaching import attach
from tersor.train.attachment import Attachment
from tersor.train.report import Report
from tersor.train.resuming import check_options, forgotten, load_state, save_state, stage_of

try:
    import transformers
except ImportError as error:
    raise MissingDependencyError(
        "tersor.train.TrainerCallback needs transformers, which is not installed; "
        "pip install transformers accelerate"
    ) from error


class TrainerCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Attaches to the Trainer's optimizer when training begins; the structure is in each checkpoint.

    ::

        callback = tersor.train.TrainerCallback(example, target=tersor.Target(speedup=2))
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
        small, report = callback.finish()

    To resume: ``callback.restore(trainer.model, folder)``, then ``trainer.train(folder)``, as the Trainer
    loads weights before it calls any callback.

    ``load_best_model_at_end``: only checkpoints from after the cut count, as earlier ones don't fit.
    """

    def __init__(self, example: Any, **options: Any) -> None:
        """Take the options of ``attach``.

        Args:
            example: One batch of the model's inputs, without labels.
            options: As of ``attach``; the Trainer knows the number of steps.

        Raises:
            ConfigError: An option that ``attach`` has not.
        """
        check_options("TrainerCallback", options, attach)
        self._attachment = Attachment(example, options)
        self._stage: tuple[bool, bool] | None = None
        self._notes: tuple[str, ...] = ()

    def restore(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Give a fresh model the structure of a checkpoint, before ``trainer.train(checkpoint)``."""
        self._attachment.restore(model, load_state(checkpoint))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach."""
        del args, control
        optimizer = kwargs["optimizer"]
        plain = getattr(optimizer, "optimizer", optimizer)  # inside of Accelerate's
        self._attachment.begin(kwargs["model"], plain, int(state.max_steps))
        self._stage, self._notes = stage_of(self._attachment.shrinker), ()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the best checkpoint where the step has cut the model: the Trainer evaluates and saves after this."""
        del args, control, kwargs
        stage = stage_of(self._attachment.shrinker)
        if stage == self._stage:
            return
        self._stage = stage
        if state.best_model_checkpoint is not None:
            note = forgotten(state.best_model_checkpoint, state.global_step)
            self._notes = (*self._notes, note)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The structure goes beside the weights."""
        del control, kwargs
        if state.is_world_process_zero and self._attachment.shrinker is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_state(self._attachment.shrinker.state_dict(), folder)

    def finish(
        self, validate: Callable[[nn.Module], float] | None = None
    ) -> tuple[nn.Module, Report]:
        """The small model and what was done, after ``trainer.train()``."""
        small, report = self._attachment.finish(validate)
        return small, replace(report, notes=(*report.notes, *self._notes))

    def state(self) -> Mapping[str, Any]:
        """As in checkpoints."""
        shrinker = self._attachment.shrinker
        return {} if shrinker is None else shrinker.state_dict()
