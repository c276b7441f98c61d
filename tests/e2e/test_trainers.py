"""Accelerate, Lightning and Hugging Face's Trainer, the packages themselves: train, stop, resume, shrink."""

from collections.abc import Iterator
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tersor
from tersor.core.errors import ConfigError
from tersor.train.schedule import Schedule
from tests.unit.train.networks import Convolutional, images

STEPS = 48
KEY = "tersor"  # of Lightning's checkpoints
SCHEDULE = Schedule(total_steps=STEPS, begin=0.1, end=0.5, every=4, epoch=4)
COUNTS = {"blocks.0.conv1": 3, "blocks.1.conv1": 5}
OPTIONS: dict[str, Any] = {"counts": COUNTS, "schedule": SCHEDULE}
KINDS: dict[str, dict[str, Any]] = {
    "units": OPTIONS,
    "bits": {"bits": 3, "schedule": SCHEDULE},
    "units and bits": OPTIONS | {"bits": 3},
    "pairs": OPTIONS | {"algorithm": "spectral"},
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Trainers draw from torch's own generator."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def labelled(count: int = STEPS * 8) -> TensorDataset:
    return TensorDataset(*images(count))


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


class TestAccelerate:
    """A loop with gradient accumulation; states of the accelerator's own."""

    def start(self, kind: str = "units") -> Any:
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(3)
        model = Convolutional(width=12)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        shrinker = tersor.train.attach(
            model, optimizer, images(4)[0], total_steps=STEPS, **KINDS[kind]
        )
        loader = DataLoader(labelled(STEPS * 16), batch_size=8)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        shrinker.bind(accelerator)
        return accelerator, model, optimizer, loader, shrinker

    def train(self, parts: Any, begin: int, end: int) -> None:
        accelerator, model, optimizer, loader, _ = parts
        for batch, (x, y) in enumerate(loader):
            if not begin <= batch < end:
                continue
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    @pytest.mark.parametrize("stop", [2 * 14, pytest.param(2 * 36, marks=pytest.mark.slow)])
    def test_a_run_resumes_from_the_accelerators_own_state(self, stop: int, tmp_path: Path) -> None:
        parts = self.start()
        self.train(parts, 0, stop)
        parts[0].save_state(str(tmp_path / "state"))
        self.train(parts, stop, 2 * STEPS)
        whole, report = parts[4].finish()
        assert report.counts()["blocks.0.conv1"] == 3
        assert report.steps == STEPS

        again = self.start()
        again[0].load_state(str(tmp_path / "state"))
        self.train(again, stop, 2 * STEPS)
        found, second = again[4].finish()
        assert second.counts() == report.counts()
        assert same(whole, found)

    @pytest.mark.parametrize("kind", ["units and bits", "pairs"])
    def test_the_other_ways_resume_too(self, kind: str, tmp_path: Path) -> None:
        parts = self.start(kind)
        self.train(parts, 0, 2 * 36)
        parts[0].save_state(str(tmp_path / "state"))
        self.train(parts, 2 * 36, 2 * STEPS)
        whole, report = parts[4].finish()
        again = self.start(kind)
        again[0].load_state(str(tmp_path / "state"))
        self.train(again, 2 * 36, 2 * STEPS)
        found, second = again[4].finish()
        assert second.rounded == report.rounded
        assert second.factored == report.factored
        assert len(report.rounded) + len(report.ranks()) >= 2
        assert same(whole, found)

    def test_something_else_is_no_accelerator(self) -> None:
        parts = self.start()
        with pytest.raises(ConfigError, match=r"wanted an accelerate\.Accelerator"):
            parts[4].bind(object())


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")  # its own
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class TestLightning:
    """A module that holds the network as an attribute."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("lightning")

    def module(self) -> Any:
        import lightning.pytorch as lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = Convolutional(width=12)

            def training_step(self, batch: Any, _: int) -> Tensor:
                x, y = batch
                return functional.cross_entropy(self.model(x), y)

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), 3e-3)

        torch.manual_seed(3)
        return Module()

    def fit(
        self,
        folder: Path,
        module: Any,
        *,
        until: int,
        path: Any = None,
        kind: str = "units",
        attribute: str = "model",
    ) -> Any:
        """Train up to a step, of a run of STEPS."""
        import lightning.pytorch as lightning

        class Stop(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step >= until:
                    trainer.should_stop = True

        callback = tersor.train.LightningCallback(images(4)[0], attribute=attribute, **KINDS[kind])
        trainer = lightning.Trainer(
            max_epochs=4,
            callbacks=[callback, Stop()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        loader = DataLoader(labelled(STEPS * 2), batch_size=8)  # 12 batches an epoch
        trainer.fit(module, loader, ckpt_path=path)
        return trainer, callback

    @pytest.mark.parametrize(
        ("kind", "stop"),
        [
            ("units", 12),
            ("units and bits", 36),
            *(
                pytest.param(kind, 36, marks=pytest.mark.slow)
                for kind in ("units", "bits", "pairs")
            ),
        ],
    )
    def test_a_fit_resumes_from_its_checkpoint(self, kind: str, stop: int, tmp_path: Path) -> None:
        module = self.module()
        _, callback = self.fit(tmp_path, module, until=STEPS, kind=kind)
        whole, report = callback.finish()
        assert whole is module.model
        if kind.startswith("units"):
            assert report.counts()["blocks.1.conv1"] == 5
        assert len(report.rounded) == (4 if "bits" in kind else 0)
        assert report.ranks() == (COUNTS if kind == "pairs" else {})

        half = self.module()
        trainer, _ = self.fit(tmp_path, half, until=stop, kind=kind)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        again = self.module()
        _, second = self.fit(tmp_path, again, until=STEPS, path=tmp_path / "half.ckpt", kind=kind)
        found, late = second.finish()
        assert late.counts() == report.counts()
        assert late.rounded == report.rounded
        assert late.factored == report.factored
        assert same(whole, found)

    def test_a_checkpoint_without_structure_is_refused(self, tmp_path: Path) -> None:
        import lightning.pytorch as lightning

        module = self.module()
        trainer = lightning.Trainer(
            max_epochs=1,
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            accelerator="cpu",
        )
        trainer.fit(module, DataLoader(labelled(8), batch_size=8))
        trainer.save_checkpoint(tmp_path / "plain.ckpt")
        with pytest.raises(ConfigError, match="no structure in the checkpoint"):
            self.fit(tmp_path, self.module(), until=STEPS, path=tmp_path / "plain.ckpt")

    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_only_checkpoints_from_after_the_cut_are_the_best(
        self, mode: str, tmp_path: Path
    ) -> None:
        import lightning.pytorch as lightning

        class Scored(lightning.Callback):
            """Best at the very first, whatever is best."""

            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                worse = float(trainer.current_epoch)
                pl_module.log("score", -worse if mode == "max" else worse)

        callback = tersor.train.LightningCallback(images(4)[0], attribute="model", **OPTIONS)
        kept = lightning.callbacks.ModelCheckpoint(
            tmp_path, monitor="score", mode=mode, filename="best"
        )
        trainer = lightning.Trainer(
            max_epochs=4,
            callbacks=[callback, Scored(), kept],
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        module = self.module()
        loader = DataLoader(labelled(STEPS * 2), batch_size=8)  # 12 batches an epoch
        trainer.fit(module, loader)
        small, report = callback.finish()
        assert report.shrunk_at == SCHEDULE.last == 24
        assert sum("best checkpoint so far" in note for note in report.notes) == 1
        assert kept.best_model_score == (-1 if mode == "max" else 1)
        found = torch.load(kept.best_model_path, weights_only=True)
        assert found[KEY]["step"] == 24
        module.load_state_dict(found["state_dict"])  # fits
        assert small is module.model

    def test_a_wrong_option_is_refused_at_once_and_a_wrong_attribute_by_name(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="LightningCallback: found count=, wanted"):
            tersor.train.LightningCallback(images(4)[0], count={})
        kind = tersor.train.LightningCallback
        with pytest.raises(ConfigError, match="found attribute=3, wanted the name"):
            # Without the annotations' own check, which only tests have.
            unwrap(kind.__init__)(object.__new__(kind), images(4)[0], attribute=3)
        with pytest.raises(ConfigError, match=r"attribute='net', .*module of Module.*\(model\)"):
            self.fit(tmp_path, self.module(), until=1, attribute="net")

    def test_finish_before_any_fit(self) -> None:
        callback = tersor.train.LightningCallback(images(4)[0], **OPTIONS)
        with pytest.raises(ConfigError, match="no training run yet"):
            callback.finish()


class Sentences(Dataset[dict[str, Tensor]]):
    """Tokens whose first one is the class."""

    def __len__(self) -> int:
        return STEPS * 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(5, 50, (12,), generator=torch.Generator().manual_seed(index))
        tokens[0] = index % 4
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones(12, dtype=torch.long),
            "labels": torch.tensor(index % 4),
        }


class TestTrainer:
    """BERT with a head, small and from random weights."""

    NEURONS = "bert.encoder.layer.{}.intermediate.dense"
    COUNTS = {NEURONS.format(0): 24, NEURONS.format(1): 16}  # noqa: RUF012 - read only

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")

    def model(self) -> Any:
        import transformers

        torch.manual_seed(3)
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=4,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForSequenceClassification(config)

    def trainer(
        self, folder: Path, model: Any, changes: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        import transformers

        sample = Sentences()[0]
        example = {n: torch.stack([sample[n]] * 2) for n in ("input_ids", "attention_mask")}
        given = {"counts": self.COUNTS, "schedule": SCHEDULE} | options
        callback = tersor.train.TrainerCallback(example, **given)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
            seed=5,
            **{"max_steps": STEPS, "save_steps": 12, **(changes or {})},
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=Sentences(),
            eval_dataset=Sentences(),
            callbacks=[callback],
        )
        return trainer, callback

    def test_a_run_shrinks_and_resumes_from_each_checkpoint(self, tmp_path: Path) -> None:
        trainer, callback = self.trainer(tmp_path / "whole", self.model())
        trainer.train()
        whole, report = callback.finish()
        assert whole is trainer.model
        assert whole.bert.encoder.layer[1].intermediate.dense.weight.shape == (16, 32)
        assert report.shrunk_at == SCHEDULE.last
        for step in (12, 36):  # while units die, and after the cut
            again, second = self.trainer(tmp_path / f"again{step}", self.model())
            checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
            second.restore(again.model, checkpoint)
            again.train(resume_from_checkpoint=str(checkpoint))
            found, late = second.finish()
            assert late.counts() == report.counts()
            assert same(whole, found)

    @pytest.mark.parametrize("kind", ["pairs", "bits"])
    def test_the_other_ways_resume_from_each_checkpoint(self, kind: str, tmp_path: Path) -> None:
        name = self.NEURONS.format(0)
        given: dict[str, Any] = {
            "pairs": {"counts": {name: 8}, "algorithm": "spectral"},
            "bits": {"counts": None, "bits": {name: 2}},
        }[kind]
        trainer, callback = self.trainer(tmp_path / "whole", self.model(), **given)
        trainer.train()
        whole, report = callback.finish()
        assert report.ranks() == ({name: 8} if kind == "pairs" else {})
        assert len(report.rounded) == (kind == "bits")
        for step in (12, 36):
            again, second = self.trainer(tmp_path / f"again{step}", self.model(), **given)
            checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
            second.restore(again.model, checkpoint)
            again.train(resume_from_checkpoint=str(checkpoint))
            found, late = second.finish()
            assert late.factored == report.factored
            assert late.rounded == report.rounded
            assert same(whole, found)

    BEST: dict[str, Any] = {  # noqa: RUF012 - read only
        "eval_strategy": "steps",
        "eval_steps": 12,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the first is the best, but for what is forgotten
    }

    @pytest.mark.filterwarnings("ignore:.*pin_memory.*")
    def test_only_checkpoints_from_after_the_cut_are_loaded_as_the_best(
        self, tmp_path: Path
    ) -> None:
        trainer, callback = self.trainer(tmp_path, self.model(), self.BEST)
        trainer.train()
        small, report = callback.finish()
        assert report.shrunk_at == SCHEDULE.last == 24
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-24")
        (note,) = [n for n in report.notes if "best checkpoint so far" in n]
        assert note.startswith(str(tmp_path / "checkpoint-12"))
        best = load_file(tmp_path / "checkpoint-24" / "model.safetensors")
        assert all(torch.equal(t, small.state_dict()[n]) for n, t in best.items())

    def test_nothing_is_loaded_where_none_was_saved_after_the_cut(self, tmp_path: Path) -> None:
        import transformers

        class Stop(transformers.TrainerCallback):
            """Else the Trainer saves at the end, whatever steps were asked for."""

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                del args
                control.should_training_stop = state.global_step == 45

        course = replace(SCHEDULE, end=0.9)  # checkpoints after steps 12, 24 and 36
        trainer, callback = self.trainer(tmp_path, self.model(), self.BEST, schedule=course)
        trainer.add_callback(Stop())
        trainer.train()
        _, report = callback.finish()
        assert report.shrunk_at == 43
        assert trainer.state.best_model_checkpoint is None

    def test_a_wrong_option_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"found total_steps=, wanted.*itself"):
            tersor.train.TrainerCallback({}, counts={}, total_steps=4)

    def test_a_checkpoint_without_structure_says_what_is_missing(self, tmp_path: Path) -> None:
        trainer, callback = self.trainer(tmp_path, self.model())
        with pytest.raises(ConfigError, match="no structure beside the checkpoint"):
            callback.restore(trainer.model, tmp_path)
