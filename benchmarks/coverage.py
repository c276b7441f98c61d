"""Every model of the zoo, pruned without model-specific code by Tersor and by Torch-Pruning.

``python -m benchmarks.coverage [--only tersor|torch-pruning] [names, patterns, sources]``. Rows go to
``benchmarks/results/coverage.jsonl``; ``--table`` prints the newest row of each model.

Both sides know nothing but the module and one batch of inputs. Torch-Pruning also gets what its
own examples write down by hand for each model, derived here from the module: layers that make an
output, and how many heads a layer has; torchvision's vision transformers are treated as in its own
script, which sets their ``hidden_dim`` by hand. It removes 30 % of every group by magnitude; that
it passes means that a forward pass runs, with outputs of the same shape. Tersor removes a random
30 % of every exact width, and has to compute what zeroing computes, at another batch size.
"""

import argparse
import contextlib
import gc
import json
import resource
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from tersor.capture.structures import describe
from tersor.graph.axes import analyse_axes
from tests.conformance.zoo.capturing import captured
from tests.conformance.zoo.entry import BATCH, ZooModel
from tests.conformance.zoo.judge import GOALS, SHARE, judge, summary
from tests.conformance.zoo.models import SOURCES, select

NAME = "coverage"
# For one model on the peer's side: on swin_t it took all 23 GB of the machine.
TIME_LIMIT = 150  # seconds; most take 5 to 20
MEMORY_LIMIT = 8 << 30  # bytes of address space
PACKAGES = ("torchvision", "timm", "transformers", "torch-pruning")
# Names that layers of queries, keys and values have beside a module's number of heads.
HEADED = ("qkv", "q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What Torch-Pruning made of one model.

    Attributes:
        status: "ok", "no graph", "not pruned", "does not run", "other outputs", "unchanged".
        other_batch: Whether the pruned model runs at another batch size, too.
        kept: Share of the parameters that is left.
    """

    name: str
    source: str
    status: str
    error: str = ""
    other_batch: bool = False
    kept: float | None = None
    seconds: float = 0.0


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """TimeoutError after TIME_LIMIT of wall clock, MemoryError (or torch's own) over MEMORY_LIMIT."""

    def ring(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"took more than {TIME_LIMIT} s")

    before = signal.signal(signal.SIGALRM, ring)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))
    signal.alarm(TIME_LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def peer(entry: ZooModel) -> Peer:
    """Let Torch-Pruning remove 30 % of every group, then call the model."""
    start = time.perf_counter()
    model: Any = entry.build()
    inputs, status, kept = entry.inputs(), "no graph", None
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    other_batch, error = False, ""
    wanted = shapes(model, inputs)
    count = sum(p.numel() for p in model.parameters())
    try:
        with limited():
            pruner = make_pruner(model, inputs, output_layers(entry, model))
            status = "not pruned"
            pruner.step()
            if is_torchvision_vit(model):
                model.hidden_dim = model.conv_proj.out_channels
            status = "does not run"
            kept = sum(p.numel() for p in model.parameters()) / count
            status = "ok" if shapes(model, inputs) == wanted else "other outputs"
            status = "unchanged" if kept == 1.0 else status
            other_batch = runs(model, repeated(inputs, BATCH + 1))
    except Exception as failure:  # noqa: BLE001 - whatever it raises is its row
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return Peer(
        name=entry.name,
        source=entry.source,
        status=status,
        error=error,
        other_batch=other_batch,
        kept=kept,
        seconds=time.perf_counter() - start,
    )


def make_pruner(model: Any, inputs: Any, ignored: list[nn.Module]) -> Any:
    """Torch-Pruning's own pruner; every argument that it would share between calls is new."""
    import torch_pruning as tp

    vit = is_torchvision_vit(model)
    fixed = nn.modules.linear.NonDynamicallyQuantizableLinear  # its script leaves these alone
    return tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=SHARE,
        ignored_layers=ignored + [m for m in model.modules() if vit and isinstance(m, fixed)],
        round_to=model.encoder.layers[0].num_heads if vit else None,
        num_heads=heads(model),
        in_channel_groups={},
        out_channel_groups={},
        output_transform=scalars,
    )


def is_torchvision_vit(model: Any) -> bool:
    """Whether a model is the one that Torch-Pruning's script for torchvision mends by hand."""
    return hasattr(model, "conv_proj") and hasattr(model, "hidden_dim")


def scalars(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among the outputs: what its tracer starts from."""
    leaves: list[Tensor] = []
    describe(outputs, leaves)
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad]


def heads(model: nn.Module) -> dict[nn.Module, int]:
    """Layer -> its number of heads, as Torch-Pruning's examples for timm give it."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        number = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        if isinstance(number, int) and not isinstance(module, nn.MultiheadAttention):
            layers = [c for n, c in module.named_children() if n in HEADED]
            found |= {c: number for c in layers if isinstance(c, nn.Linear)}
    return found


def output_layers(entry: ZooModel, model: nn.Module) -> list[nn.Module]:
    """Layers whose width is an output's, so that pruning them changes what the model returns.

    Found by Tersor's analysis; a model that it can't capture gives none.
    """
    try:
        axes = analyse_axes(captured(entry).graph)
    except Exception:  # noqa: BLE001 - the row of our side says what went wrong
        return []
    held = {p.tensor.rpartition(".")[0] for p in axes.pinned if p.op == "output" and p.dim == 0}
    modules = dict(model.named_modules())
    return [modules[name] for name in sorted(held) if name in modules and name]


def shapes(model: nn.Module, inputs: Any) -> list[tuple[int, ...]]:
    """Shapes of all outputs."""
    leaves: list[Tensor] = []
    with torch.no_grad():
        describe(model(**inputs) if isinstance(inputs, dict) else model(*inputs), leaves)
    return [tuple(leaf.shape) for leaf in leaves]


def repeated(inputs: Any, size: int) -> Any:
    """The inputs with another number of samples."""

    def again(value: Any) -> Any:
        return value[torch.arange(size) % len(value)] if isinstance(value, Tensor) else value

    if isinstance(inputs, dict):
        return {name: again(value) for name, value in inputs.items()}
    return tuple(again(value) for value in inputs)


def runs(model: nn.Module, inputs: Any) -> bool:
    """Whether a call comes back."""
    try:
        shapes(model, inputs)
    except Exception:  # noqa: BLE001 - any failure is the answer
        return False
    return True


def versions() -> dict[str, str]:
    """Packages that the zoo's networks come from, and the peer."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def cover(entries: Sequence[ZooModel], sides: Sequence[str]) -> None:
    """One row a model and side, each written as soon as it is there."""
    settings = {"share": SHARE, "zoo": versions(), "threads": torch.get_num_threads()}
    for entry in entries:
        if "tersor" in sides:
            row = judge(entry)
            print(summary(row), flush=True)
            record.append(NAME, [{"side": "tersor", "found": row}], seed=0, settings=settings)
        if "torch-pruning" in sides:
            other = peer(entry)
            print(f"{other.name:46} {other.status:14} {other.error[:140]}", flush=True)
            record.append(
                NAME, [{"side": "torch-pruning", "found": other}], seed=0, settings=settings
            )
        gc.collect()


def newest(side: str) -> dict[str, dict[str, Any]]:
    """Name -> its last row of one side."""
    found: dict[str, dict[str, Any]] = {}
    path = record.RESULTS / f"{NAME}.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)["row"]
        if row["side"] == side:
            found[row["found"]["name"]] = row["found"]
    return found


def table() -> str:
    """Markdown: a line for each source, then every model that falls short, with the reason."""
    ours, theirs = newest("tersor"), newest("torch-pruning")
    lines = [
        "| zoo | models | Tersor: cut = zeroed | MAC share at goal | Torch-Pruning runs | any batch |",
        "|---|---|---|---|---|---|",
    ]
    for source in SOURCES:
        rows = [r for r in ours.values() if r["source"] == source]
        others = [r for r in theirs.values() if r["source"] == source]
        lines.append(
            f"| {source} | {len(rows)} | {sum(r['status'] == 'ok' for r in rows)} | "
            f"{sum((r['reached'] or 0) >= GOALS[r['kind']] for r in rows)} | "
            f"{sum(r['status'] == 'ok' for r in others)} of {len(others)} | "
            f"{sum(r['status'] == 'ok' and r['other_batch'] for r in others)} |"
        )
    return "\n".join([*lines, "", *short(ours), "", *failed(theirs)])


def short(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Models of ours that fail or miss a goal."""
    lines = [
        "| Tersor, model | status | MAC share | held most by | reason |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        reached = row["reached"]
        if row["status"] == "ok" and reached is not None and reached >= GOALS[row["kind"]]:
            continue
        share = "" if reached is None else f"{100 * reached:.0f} %"
        held = ", ".join(list(row["held_by"])[:3])
        reason = row["error"][:160] or ", ".join(row["unknown"])
        lines.append(f"| {name} | {row['status']} | {share} | {held} | {reason} |")
    return lines


def failed(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Models that Torch-Pruning does not prune."""
    lines = ["| Torch-Pruning, model | status | its error |", "|---|---|---|"]
    bad = [r for _, r in sorted(rows.items()) if r["status"] != "ok"]
    return lines + [f"| {r['name']} | {r['status']} | {r['error'][:160]} |" for r in bad]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="names, patterns or sources; default: all")
    parser.add_argument("--only", choices=("tersor", "torch-pruning"), help="one side")
    parser.add_argument("--table", action="store_true", help="print what there is, run nothing")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    warnings.simplefilter("ignore")
    cover(select(options.names), [options.only] if options.only else ["tersor", "torch-pruning"])


if __name__ == "__main__":
    main()
