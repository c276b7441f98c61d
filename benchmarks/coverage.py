"""Every model of the zoo, pruned without model-specific code by Tersor and by Torch-Pruning.

``python -m benchmarks.coverage [--only tersor|torch-pruning] [names, patterns, sources]``. Rows go to
``benchmarks/results/coverage.jsonl``, or to the file that ``--into`` names; ``--table`` prints the
newest row of each model, ``--newest`` leaves only those in the file.

Both sides know nothing but the module and one batch of inputs. Torch-Pruning also gets what its
own examples write down by hand for each model, derived here from the module: layers that make an
output, how many heads a layer has, and after pruning the sizes that attention modules remember;
torchvision's vision transformers are treated as in its own script, which sets their
``hidden_dim``. Its scripts differ in what they do with heads and in what they leave alone: each of
their settings is tried, and the first one that works is the row. It removes 30 % of every group by
magnitude; that it passes means that a forward pass runs, with outputs of the same shape. Tersor
removes a random 30 % of every exact width, and has to compute what zeroing computes, at another
batch size.
"""

import argparse
import contextlib
import gc
import json
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
SIDES = ("tersor", "torch-pruning")
# For one model and setting on the peer's side: on swin_t it took all 23 GB of the machine.
TIME_LIMIT = 120  # seconds of processor time; most take 5 to 20
MEMORY_LIMIT = 8 << 30  # bytes of address space beyond what the process has with the model
PACKAGES = ("torchvision", "timm", "transformers", "torch-pruning")
# Names that its examples and the zoo's sources give to layers of queries, keys and values, with
# how many of these a layer makes, and to what an attention module remembers of its sizes.
HEADED = {"qkv": 3, "qkv_proj": 3, "kv": 2} | dict.fromkeys(
    (
        "q",
        "k",
        "v",
        "query",
        "key",
        "value",
        "q_proj",
        "k_proj",
        "v_proj",
        "q_lin",
        "k_lin",
        "v_lin",
    ),
    1,
)
SHARED = ("k", "v", "key", "value", "k_proj", "v_proj")  # of several queries' heads
NUMBERS = ("num_heads", "num_attention_heads", "n_heads")
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "size")
WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "embed_dim", "hidden_size", "dim")
# Parts of detectors and of RAFT that its script for torchvision leaves alone.
LEFT_ALONE = ("backbone.fpn", "head", "proposals", "box", "mask", "keypoints",
              "corr_block", "update_block", "mask_predictor")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What Torch-Pruning made of one model.

    Attributes:
        status: "ok", "no graph", "not pruned", "does not run", "other outputs", "unchanged".
        setting: The one of SETTINGS that this is the result of.
        other_batch: Whether the pruned model runs at another batch size, too.
        kept: Share of the parameters that is left.
        seconds: Processor time of that setting.
    """

    name: str
    source: str
    status: str
    setting: str
    error: str = ""
    other_batch: bool = False
    kept: float | None = None
    seconds: float = 0.0


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """TimeoutError over TIME_LIMIT of processor time, MemoryError (or torch's) over MEMORY_LIMIT."""

    def ring(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"took more than {TIME_LIMIT} s")

    before = signal.signal(signal.SIGPROF, ring)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    allowed = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def peer(entry: ZooModel) -> Peer:
    """Let Torch-Pruning remove 30 % of every group, then call the model.

    Returns:
        The row of the first setting that works, else of the first one.
    """
    kept = output_layers(entry)
    rows: list[Peer] = []
    for setting, applies in SETTINGS.items():
        if not applies(entry):
            continue
        rows.append(attempt(entry, kept, setting))
        if rows[-1].status == "ok":
            return rows[-1]
        if "TimeoutError" in rows[-1].error:  # its graph is the same in all of them
            break
    return rows[0]


def attempt(entry: ZooModel, kept: Sequence[str], setting: str) -> Peer:
    """Prune a fresh model in one setting; layers named in ``kept`` stay as wide as they are."""
    start = time.process_time()
    model: Any = entry.build()
    inputs, status, share = entry.inputs(), "no graph", None
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    other_batch, error = False, ""
    wanted = shapes(model, inputs)
    count = sum(p.numel() for p in model.parameters())
    try:
        with limited():
            pruner = make_pruner(model, inputs, kept, setting)
            status = "not pruned"
            remembered = attention_widths(model)
            pruner.step()
            mend(model, pruner.num_heads, remembered)
            status = "does not run"
            share = sum(p.numel() for p in model.parameters()) / count
            status = "ok" if shapes(model, inputs) == wanted else "other outputs"
            status = "unchanged" if share == 1.0 else status
            other_batch = runs(model, repeated(inputs, BATCH + 1))
    except Exception as failure:  # noqa: BLE001 - whatever it raises is its row
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return Peer(
        name=entry.name,
        source=entry.source,
        status=status,
        setting=setting,
        error=error,
        other_batch=other_batch,
        kept=share,
        seconds=time.process_time() - start,
    )


def make_pruner(model: Any, inputs: Any, kept: Sequence[str], setting: str) -> Any:
    """Torch-Pruning's own pruner; every argument that it would share between calls is new."""
    import torch_pruning as tp

    modules = dict(model.named_modules())
    ignored = [modules[name] for name in kept]
    if setting == "parts left alone":
        ignored += [modules[name] for name in LEFT_ALONE if name in modules]
    vit = is_torchvision_vit(model)
    fixed = nn.modules.linear.NonDynamicallyQuantizableLinear  # its script leaves these alone
    whole = setting == "whole heads"
    return tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=SHARE,
        ignored_layers=ignored + [m for m in model.modules() if vit and isinstance(m, fixed)],
        round_to=model.encoder.layers[0].num_heads if vit else None,
        num_heads=heads(model),
        prune_num_heads=whole,
        prune_head_dims=not whole,
        head_pruning_ratio=SHARE if whole else 0.0,
        in_channel_groups={},
        out_channel_groups={},
        output_transform=scalars,
        **(merging(model) if setting == "patch merging" else {}),
    )


def merging(model: nn.Module) -> dict[str, Any]:
    """What its example for Swin adds by hand: how to prune modules that merge patches."""
    import torch_pruning as tp

    class Merging(tp.BasePruningFunc):  # type: ignore[misc]
        """[..., 4 dim] -> norm -> reduction."""

        def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
            tp.prune_linear_out_channels(layer.reduction, idxs)
            if layer.norm.normalized_shape[0] != layer.reduction.in_features:
                tp.prune_layernorm_out_channels(
                    layer.norm, idxs
                )  # behind it, in the second version
            return layer

        def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
            width = layer.reduction.in_features // 4
            everywhere = [i + k * width for k in range(4) for i in idxs]
            if layer.norm.normalized_shape[0] == layer.reduction.in_features:
                tp.prune_layernorm_out_channels(layer.norm, everywhere)
            tp.prune_linear_in_channels(layer.reduction, everywhere)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.reduction.out_features)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.reduction.in_features) // 4

    kinds = {type(m) for m in model.modules() if is_merging(m)}
    return {
        "customized_pruners": {kind: Merging() for kind in kinds},
        "root_module_types": [nn.Linear, nn.LayerNorm, *kinds],
    }


def is_merging(module: nn.Module) -> bool:
    """Whether a module is like Swin's, which lays four patches beside each other."""
    parts = dict(module.named_children())
    return isinstance(parts.get("reduction"), nn.Linear) and isinstance(
        parts.get("norm"), nn.LayerNorm
    )


def is_torchvision_vit(model: Any) -> bool:
    """Whether a model is the one that Torch-Pruning's script for torchvision mends by hand."""
    return hasattr(model, "conv_proj") and hasattr(model, "hidden_dim")


def scalars(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among the outputs: what its tracer starts from."""
    leaves: list[Tensor] = []
    describe(outputs, leaves)
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad]


def headed(module: nn.Module) -> dict[str, nn.Module]:
    """Its layers of queries, keys and values, by name."""
    return {
        name: layer
        for name, layer in module.named_children()
        if name in HEADED and isinstance(layer, nn.Linear | nn.Conv2d)
    }


def heads(model: nn.Module) -> dict[nn.Module, int]:
    """Layer -> its number of heads, as Torch-Pruning's examples for timm and LLMs give it."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        number = _first(module, NUMBERS) or _first(config, NUMBERS)
        shared = _first(module, ("num_key_value_heads",)) or _first(
            config, ("num_key_value_heads",)
        )
        if number is None or isinstance(module, nn.MultiheadAttention):
            continue
        for name, layer in headed(module).items():
            found[layer] = shared if shared and name in SHARED else number
    return found


def _first(owner: Any, names: Sequence[str]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and v > 0), None)


def attention_widths(model: nn.Module) -> dict[nn.Module, int]:
    """Attention module -> how wide all its heads are together."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        for name, layer in list(headed(module).items())[:1]:
            found[module] = layer_width(layer) // HEADED[name]
    return found


def layer_width(layer: Any) -> int:
    """Outputs of a linear layer or a convolution."""
    width: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return width


def mend(model: Any, numbers: dict[nn.Module, int], before: dict[nn.Module, int]) -> None:
    """Tell attention modules their new sizes, as its examples do by hand after pruning."""
    if is_torchvision_vit(model):
        model.hidden_dim = model.conv_proj.out_channels
    for module, width in before.items():
        name, layer = next(iter(headed(module).items()))
        if layer not in numbers:
            continue
        now = layer_width(layer) // HEADED[name]
        new = dict.fromkeys(NUMBERS, numbers[layer])
        new |= dict.fromkeys(HEAD_SIZES, now // numbers[layer])
        new |= {n: now for n in WIDTHS if vars(module).get(n) == width}
        for attribute, value in new.items():
            if isinstance(vars(module).get(attribute), int):
                setattr(module, attribute, value)


def has_heads(entry: ZooModel) -> bool:
    """Whether there is a layer that is known to have heads."""
    return bool(heads(entry.build()))


def has_merging(entry: ZooModel) -> bool:
    """Whether patches are merged as in Swin."""
    return any(is_merging(m) for m in entry.build().modules())


def has_left_alone(entry: ZooModel) -> bool:
    """Whether its script would leave more alone than the layers that make outputs."""
    names = {name for name, _ in entry.build().named_modules()}
    return (
        bool({"backbone.fpn", "proposals", "update_block"} & names)
        or {
            "backbone",
            "head",
        }
        <= names
    )


SETTINGS: dict[str, Callable[[ZooModel], bool]] = {
    "head sizes": lambda _: True,
    "whole heads": has_heads,
    "patch merging": has_merging,
    "parts left alone": has_left_alone,
}


def output_layers(entry: ZooModel) -> list[str]:
    """Names of layers whose width is an output's: pruning them changes what the model returns.

    Found by Tersor's analysis; a model that it can't capture gives none.
    """
    try:
        axes = analyse_axes(captured(entry).graph)
    except Exception:  # noqa: BLE001 - the row of our side says what went wrong
        return []
    model = entry.build()
    stored = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for parameter in stored.values())
    kept = {
        id(stored[p.tensor])
        for p in axes.pinned
        # An embedding that is the last layer, too, may be held by its numbers of words.
        if p.dim == 0
        and p.tensor in stored
        and (p.op == "output" or uses[id(stored[p.tensor])] > 1)
    }
    return [
        name
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.Embedding)
        and any(id(p) in kept for p in module.parameters(recurse=False))
    ]  # fmt: skip


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


def cover(entries: Sequence[ZooModel], sides: Sequence[str], into: str) -> None:
    """One row a model and side, each written as soon as it is there."""
    settings = {"share": SHARE, "zoo": versions(), "threads": torch.get_num_threads()}
    for entry in entries:
        if "tersor" in sides:
            row = judge(entry)
            print(summary(row), flush=True)
            record.append(into, [{"side": "tersor", "found": row}], seed=0, settings=settings)
        if "torch-pruning" in sides:
            other = peer(entry)
            about = f"{other.setting:16} {other.seconds:5.1f} s  {other.error[:140]}"
            print(f"{other.name:46} {other.status:14} {about}", flush=True)
            record.append(
                into, [{"side": "torch-pruning", "found": other}], seed=0, settings=settings
            )
        gc.collect()


def newest(into: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Side and name -> the last line of a model, in the order of the zoo.

    Models that the zoo no longer has are left out.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    path = record.RESULTS / f"{into}.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        found[line["row"]["side"], line["row"]["found"]["name"]] = line
    keys = [(side, entry.name) for side in SIDES for entry in select([])]
    return {key: found[key] for key in keys if key in found}


def drop_older(into: str) -> None:
    """Leave one line for each side and model in the file."""
    lines = [json.dumps(line, sort_keys=True) for line in newest(into).values()]
    path = record.RESULTS / f"{into}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def of_side(side: str, into: str) -> dict[str, dict[str, Any]]:
    """Name -> what was found there by one side."""
    lines = newest(into).items()
    return {name: line["row"]["found"] for (which, name), line in lines if which == side}


def table(into: str) -> str:
    """Markdown: a line for each source, then every model that falls short, with the reason."""
    ours, theirs = of_side("tersor", into), of_side("torch-pruning", into)
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
    parser.add_argument("--only", choices=SIDES, help="one side")
    parser.add_argument("--into", default=NAME, help="another results file than coverage")
    parser.add_argument("--table", action="store_true", help="print what there is, run nothing")
    parser.add_argument("--newest", action="store_true", help="drop older rows, run nothing")
    options = parser.parse_args()
    if options.newest:
        drop_older(options.into)
    if options.table:
        print(table(options.into))
    if options.table or options.newest:
        return
    warnings.simplefilter("ignore")
    cover(select(options.names), [options.only] if options.only else SIDES, options.into)


if __name__ == "__main__":
    main()
