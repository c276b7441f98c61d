"""The models of the tables, with calibration samples by seed and how good they are on the others."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.prune import accuracy, read
from benchmarks.solvers.layers import Batches, Subject
from benchmarks.solvers.textmodel import corpus, language_model, perplexity
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.cli.demo.models import minilm as minilm_case
from tersor.graph.contracts import Graph
from tests.data.zoo import load_lenet5, load_resnet20

# Sentences of more tokens are left out, so that nothing is spent on padding.
TOKENS = 64
SENTENCES: Mapping[str, int] = {"calibration": 256, "search": 1, "test": 200}
IMAGES, HELD_IMAGES, TEST_IMAGES = 500, 500, 2000
WINDOWS, HELD_WINDOWS = 128, 64


def graph_of(model: nn.Module, example: object) -> Graph:
    """The model as a graph."""
    call, tensors = flatten_item(example, "example")
    return capture(model, Samples(call, tensors)).graph


def batches(tensors: tuple[Tensor, ...], size: int) -> Batches:
    """Rows of all tensors, some at a time."""
    return list(zip(*(t.split(size) for t in tensors), strict=True))


def minilm_parts(
    counts: Mapping[str, int], seed: int
) -> tuple[Graph, dict[str, tuple[Tensor, ...]]]:
    """MiniLM-L6 as a graph, and its flat inputs by part, without sentences of many tokens."""
    case = minilm_case(counts, seed)  # type: ignore[arg-type]
    parts = {}
    for name in ("calibration", "test"):
        inputs = case.part(name)  # type: ignore[arg-type]
        assert isinstance(inputs, dict)
        short = inputs["attention_mask"].sum(1) <= TOKENS
        parts[name] = {key: value[short][:, :TOKENS].contiguous() for key, value in inputs.items()}
    graph = graph_of(case.model, {key: value[:2] for key, value in parts["calibration"].items()})
    names = [spec.name for spec in graph.signature.inputs]
    flat = {
        part: tuple(next(v for k, v in inputs.items() if k in name) for name in names)
        for part, inputs in parts.items()
    }
    return graph, flat


def minilm(seed: int) -> Subject:
    """MiniLM-L6 on docstrings; quality is the mean cosine with the original's embeddings."""
    graph, flat = minilm_parts(SENTENCES, seed)
    test = batches(flat["test"], 64)
    wanted = [graph.run(part)[0] for part in test]

    def judge(new: Graph) -> dict[str, float]:
        cosines = [
            functional.cosine_similarity(new.run(part)[0], old)
            for part, old in zip(test, wanted, strict=True)
        ]
        return {"cosine": float(torch.cat(cosines).double().mean())}

    return Subject(graph, batches(flat["calibration"], 32), test, judge, seed)


def resnet20(seed: int) -> Subject:
    """ResNet-20 on Fashion-MNIST."""
    return _images(load_resnet20(), seed)


def lenet5(seed: int) -> Subject:
    """LeNet-5 on Fashion-MNIST."""
    return _images(load_lenet5(), seed)


def drawn_images(seed: int) -> tuple[Tensor, Tensor]:
    """All training images with labels, in the order of a seed."""
    images, labels = read("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order], labels[order]


def _images(model: nn.Module, seed: int) -> Subject:
    images, _ = drawn_images(seed)
    test = read("t10k")
    graph = graph_of(model, images[:2])
    calibration, held = images[:IMAGES], test[0][-HELD_IMAGES:]
    pictures, labels = test[0][:TEST_IMAGES], test[1][:TEST_IMAGES]
    wanted = torch.cat([graph.run([p])[0] for p in pictures.split(500)])

    def judge(new: Graph) -> dict[str, float]:
        logits = torch.cat([new.run([p])[0] for p in pictures.split(500)])
        divergence = functional.kl_div(
            logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        )
        hits = float((logits.argmax(1) == labels).double().mean())
        return {"accuracy": 100 * hits, "KL": float(divergence)}

    return Subject(graph, batches((calibration,), 125), batches((held,), 125), judge, seed)


def lm(seed: int) -> Subject:
    """The language model; quality is its perplexity on modules it has not seen."""
    model, text = language_model(), corpus()
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
    calibration = text.train[order[:WINDOWS], :-1]
    graph = graph_of(model, calibration[:2])
    held = text.test[:HELD_WINDOWS, :-1]

    def judge(new: Graph) -> dict[str, float]:
        return {"perplexity": perplexity(lambda ids: new.run([ids])[0], text.test)}

    return Subject(graph, batches((calibration,), 16), batches((held,), 16), judge, seed)


SUBJECTS: Mapping[str, Callable[[int], Subject]] = {
    "minilm": minilm,
    "resnet20": resnet20,
    "lenet5": lenet5,
    "lm": lm,
}

__all__ = ["SUBJECTS", "accuracy", "drawn_images", "graph_of"]
