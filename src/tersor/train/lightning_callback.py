"""Lightning's Trainer: one callback."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tersor.core.errors import ConfigError, MissingDependencyError
from tersor.train.attaching import attach
from tersor.train.attachment import Attachment
from tersor.train.report import Report
from tersor.train.resuming import check_options, forgotten, stage_of

try:
    import lightning.pytorch as lightning
except ImportError as error:
    raise MissingDependencyError(
        "tersor.train.LightningCallback needs lightning, which is not installed; pip install lightning"
    ) from error

KEY = "tersor"  # in a checkpoint


class LightningCallback(lightning.Callback):
    """Attaches to the module's optimizer when the fit begins; the structure is in each checkpoint.

    ::

        callback = tersor.train.LightningCallback(
            example, target=tersor.Target(speedup=2), attribute="model"
        )
        trainer = lightning.Trainer(max_epochs=20, callbacks=[callback])
        trainer.fit(module, loader)  # or fit(..., ckpt_path=...)
        small, report = callback.finish()

    Only checkpoints from after the cut count as a ModelCheckpoint's best, as earlier ones don't fit.
    """

    def __init__(self, example: Any, *, attribute: str = "", **options: Any) -> None:
        """Take the options of ``attach``.

        Args:
            example: One batch of the model's inputs, without labels.
            attribute: The module's attribute that holds the model ("model", "encoder.net"); empty: the
                module itself, whose ``forward`` then has to be the model's.
            options: As of ``attach``; the trainer knows the number of steps.

        Raises:
            ConfigError: An option that ``attach`` has not, or an attribute that is no name.
        """
        super().__init__()
        check_options("LightningCallback", options, attach, ("attribute",))
        if not isinstance(attribute, str):
            raise ConfigError(
                f"LightningCallback: found attribute={attribute!r}, wanted the name of the module's attribute "
                "that holds the model, or '' for the module itself"
            )
        self._attribute = attribute
        self._attachment = Attachment(example, options)
        self._told: Callable[[dict[str, Any]], None] | None = None
        self._stage: tuple[bool, bool] | None = None
        self._notes: tuple[str, ...] = ()

    def _model(self, module: nn.Module) -> nn.Module:
        """The network inside of the trainer's module.

        Raises:
            ConfigError: The module has none of that name.
        """
        try:
            return module.get_submodule(self._attribute)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.named_children())
            raise ConfigError(
                f"LightningCallback: found attribute={self._attribute!r}, which is no module of "
                f"{type(module).__name__}; wanted one that it has ({names or 'none'}), or one inside of it"
            ) from error

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Be told of a checkpoint before its weights are loaded.

        The trainer tells the module of one it has read, then loads the weights, and only then tells
        callbacks: the module's own hook is the only place in time.
        """
        del trainer
        if stage != "fit":
            return
        own: Any = pl_module.on_load_checkpoint

        def told(checkpoint: dict[str, Any]) -> None:
            if KEY not in checkpoint:
                raise ConfigError(
                    "found no structure in the checkpoint, wanted one that was written with this callback; "
                    "take the callback out, or train from the beginning"
                )
            self._attachment.restore(self._model(pl_module), checkpoint[KEY])
            own(checkpoint)

        self._told = told
        pl_module.on_load_checkpoint = told  # type: ignore[assignment]

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach."""
        if vars(pl_module).get("on_load_checkpoint") is self._told:
            del pl_module.on_load_checkpoint
        optimizers = trainer.optimizers
        if len(optimizers) != 1:
            raise ConfigError(
                f"LightningCallback: found {len(optimizers)} optimizers, wanted one; attach by hand in "
                "on_fit_start with tersor.train.attach"
            )
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ConfigError(
                "LightningCallback: the number of steps is not known; set max_epochs or max_steps"
            )
        self._attachment.begin(self._model(pl_module), optimizers[0], int(steps))
        self._stage, self._notes = stage_of(self._attachment.shrinker), ()

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Forget the best checkpoints where the step has cut the model: the trainer saves after this."""
        stage = stage_of(self._attachment.shrinker)
        if stage == self._stage:
            return
        self._stage = stage
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, lightning.callbacks.ModelCheckpoint):
                self._forget(callback, trainer.global_step)

    def _forget(self, kept: Any, step: int) -> None:
        """A ModelCheckpoint as if it had saved none yet, but for the last one's path."""
        if kept.best_model_path:
            self._notes = (*self._notes, forgotten(kept.best_model_path, step))
        kept.best_k_models, kept.best_model_score = {}, None
        kept.best_model_path = kept.kth_best_model_path = ""
        kept.kth_value = torch.tensor(math.inf if kept.mode == "min" else -math.inf)

    def on_save_checkpoint(
        self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """The structure goes into the checkpoint."""
        del trainer, pl_module
        if self._attachment.shrinker is not None:
            checkpoint[KEY] = self._attachment.shrinker.state_dict()

    def finish(
        self, validate: Callable[[nn.Module], float] | None = None
    ) -> tuple[nn.Module, Report]:
        """The small model and what was done, after ``trainer.fit``."""
        small, report = self._attachment.finish(validate)
        return small, replace(report, notes=(*report.notes, *self._notes))
