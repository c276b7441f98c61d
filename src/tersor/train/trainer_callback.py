"""Hugging Face's Trainer: one callback."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.errors import MissingDependencyError
from tersor.train.attachment import Attachment
from tersor.train.report import Report
from tersor.train.resuming import load_state, save_state

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
    """

    def __init__(self, example: Any, **options: Any) -> None:
        """Take the options of ``attach``.

        Args:
            example: One batch of the model's inputs, without labels.
            options: As of ``attach``; the Trainer knows the number of steps.
        """
        self._attachment = Attachment(example, options)

    def restore(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Give a fresh model the structure of a checkpoint, before ``trainer.train(checkpoint)``."""
        self._attachment.restore(model, load_state(checkpoint))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach."""
        del args, control
        optimizer = kwargs["optimizer"]
        plain = getattr(optimizer, "optimizer", optimizer)  # inside of Accelerate's
        self._attachment.begin(kwargs["model"], plain, int(state.max_steps))

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
        return self._attachment.finish(validate)

    def state(self) -> Mapping[str, Any]:
        """As in checkpoints."""
        shrinker = self._attachment.shrinker
        return {} if shrinker is None else shrinker.state_dict()
