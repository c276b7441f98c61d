"""The page docs/small-from-the-start.md: its code runs as it stands there, block after block."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tersor.price.price import PriceConfig
from tests.data.zoo import load_lenet5
from tests.e2e.helpers import ROOT, quick_runs
from tests.e2e.test_trainers import Sentences

PAGE = (ROOT / "docs" / "small-from-the-start.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.+?)$|^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
STEPS = 300  # the least that the default schedule takes is 286


def blocks_of(heading: str) -> list[str]:
    """The code under a heading."""
    found: list[str] = []
    current = ""
    for title, code in BLOCKS:
        current = title or current
        if code and current == heading:
            found.append(code)
    return found


@pytest.fixture
def names(
    images: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What the page takes for granted."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where prices are kept
    data = TensorDataset(images["train"][:200], images["train_labels"][:200])
    with torch.random.fork_rng():
        torch.manual_seed(0)
    return {
        "make_model": lambda: load_lenet5().train(),
        "loader": DataLoader(data, batch_size=4, shuffle=False),
        "epochs": STEPS // 50,
        "steps": STEPS,
        "example": images["train"][:4],
    }


def test_the_plain_loop_and_its_checkpoints(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, counted, resumed = blocks_of("A plain loop")
    with quick_runs(PriceConfig(k=4, held_out=1)):
        exec(plain, names)  # noqa: S102 - our own page
    assert "widths cut" in capsys.readouterr().out
    assert names["report"].measured is not None
    assert names["small"] is names["model"]
    exec(counted, names)  # noqa: S102
    exec(resumed, names)  # noqa: S102
    assert names["shrinker"].step == 0


HEAD = "import torch, tersor\nfrom torch.nn import functional\n"


def test_pairs(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks_of("Pairs of thinner layers")
    exec(HEAD + code, names)  # noqa: S102 - our own page
    assert "{'f1': 32}" in capsys.readouterr().out
    sizes = [tuple(layer.weight.shape) for layer in names["small"].f1]
    assert sizes == [(32, 800), (500, 32)]


def test_few_bits(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks_of("Weights of few bits")
    exec(HEAD + code, names)  # noqa: S102 - our own page
    assert "layers on a grid of 4 bits" in capsys.readouterr().out
    assert max(len(row.unique()) for row in names["small"].f1.weight.detach()) <= 16


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")  # its own
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning(names: dict[str, Any]) -> None:
    pytest.importorskip("lightning")
    names["quiet"] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    (code,) = blocks_of("Lightning")
    exec(HEAD + code, names)  # noqa: S102
    assert names["report"].counts()["f1"] == 125
    assert names["small"].f1.weight.shape[0] == 125


def test_trainer(names: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make_bert() -> Any:
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=48,
                num_labels=4,
                max_position_embeddings=16,
            )
        )

    sample = Sentences()[0]
    names |= {
        "make_bert": make_bert,
        "tokens": {n: torch.stack([sample[n]] * 2) for n in ("input_ids", "attention_mask")},
        "sentences": Sentences(),
        "folder": str(tmp_path / "run"),
        "silent": {
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 2,
        },
    }
    (code,) = blocks_of("Hugging Face's Trainer")
    exec("import torch, tersor\n" + code, names)  # noqa: S102
    assert names["report"].counts()["bert.encoder.layer.0.intermediate.dense"] == 32
