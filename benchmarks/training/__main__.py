"""Small out of training, against the ways people get there: ``python -m benchmarks.training``.

A residual network or a small vision transformer on Fashion-MNIST. Every arm ends with the same number of units in every width, trains on
the same batches in the same order with the same loss and the same optimizer, for equal epochs; seconds are
in each row, so that a slower arm is seen.

    dense     nothing is removed
    regrow    ours: units die while it trains, and may come back
    oneshot   the lowest scores at the end of the window all at once, no latents; then the rest of the run
    posttrained  ours without training: the units that err least at once, in closed form and without labels; then all of
              the run (the trained ResNet-20 alone)
    spectral  ours: dense until stable ranks settle, then the 3 x 3 kernels of the two wide stages become pairs, of
              ranks at which so many multiply-accumulates are left
    bits4     ours: every width stays, weights end on a grid of 4 bits; the share of multiply-accumulates is 1
    bits2     the same with 2 bits
    scratch   the final architecture from random weights: the gate that every table shows
    groupnorm Torch-Pruning, group norms, the same share of every width, at the beginning (checkpoint) or at
              the end of the window (random); then the rest of the run. (Global norms left some layers 4
              of 16 channels, and training did not recover.)

``--start checkpoint`` tunes the trained ResNet-20 of ``tests/data`` (scratch still starts from random weights),
``--start random`` trains from the start, also ResNet-56 (``--blocks 9``) and a transformer of six layers (``--net vit``,
AdamW, feed-forward neurons alone may go). Test images are touched once an arm.
Runs whose rows are recorded are left out (``--again`` makes them all the same), so that a table that was cut off goes on.
``--together N`` lets N runs take turns on one card: accuracies are the same, seconds are those of all.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

from benchmarks import record
from benchmarks.training.arms import ARMS, RATE, WHOLE, Arm, Row, Setting, take_turns
from benchmarks.training.data import Data
from benchmarks.training.nets import SMALL
from tersor.core.progress import Printed

NAME = "training"
SHARES = (1 / 2, 1 / 2.6, 1 / 4)
TUNING_RATE = 0.02  # peak of trained weights
LAYERS, ADAM_RATE = 6, 1e-3  # of the transformer
VIT_ARMS = ("dense", "regrow", "oneshot", "scratch", "groupnorm")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--arms", nargs="*", choices=ARMS, help="default: all that the start allows"
    )
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--start", choices=("checkpoint", "random"), default="checkpoint")
    parser.add_argument("--net", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--blocks", type=int, help="a stage, or layers; default: 3 and 6")
    parser.add_argument("--widths", choices=("uniform", "planned"), default="uniform")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=55_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--distil", type=float, default=0.0)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--erase", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also what is recorded")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    is_tuning, is_vit = options.start == "checkpoint", options.net == "vit"
    options.blocks = options.blocks or (LAYERS if is_vit else SMALL)
    default = VIT_ARMS if is_vit else [a for a in ARMS if is_tuning or a != "posttrained"]
    options.arms = options.arms or list(default)
    is_other = is_vit or options.blocks != SMALL
    if is_other and (is_tuning or options.distil or options.widths == "planned"):
        parser.error("only ResNet-20 was trained: --start random, no --distil, no --widths planned")
    if is_other and "spectral" in options.arms:
        parser.error("the arm spectral is of ResNet-20")
    if "posttrained" in options.arms and not is_tuning:
        parser.error("the arm posttrained is of the trained ResNet-20: --start checkpoint")
    if options.together > 1 and options.device == "cpu":
        parser.error("--together is for a card")
    return options


def runs(options: argparse.Namespace, setting: Setting) -> Iterator[tuple[str, float, Setting]]:
    """Arm, share and setting of every run."""
    for seed in options.seeds:
        for share in options.shares:
            for name in options.arms:
                if name not in WHOLE or share == options.shares[0]:
                    yield name, share, replace(setting, seed=seed)


def key_of(arm: str, share: float, setting: Setting) -> str:
    """What two runs have to share for the second to be left out: all that accuracies depend on, but the device."""
    values = asdict(setting)
    for name in ("device", "is_recorded", "together"):
        del values[name]
    if arm in WHOLE:
        share = 1.0
    return json.dumps([arm, round(share, 6), values], sort_keys=True)


def recorded(path: Path = record.RESULTS / f"{NAME}.jsonl") -> set[str]:
    """Keys of all rows that have every setting; older ones lack some."""
    found = set()
    names = {field.name for field in fields(Setting)}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        entry = json.loads(line)
        row, settings = entry["row"], entry["settings"]
        settings.setdefault("kind", "resnet")  # there was nothing else
        if names <= set(settings):  # a row may say more, as which card it was
            setting = Setting(**{name: settings[name] for name in names})
            found.add(key_of(row["arm"], row["share"], setting))
    return found


def main() -> None:
    options = parsed()
    default = ADAM_RATE if options.net == "vit" else RATE
    rate = options.rate or (TUNING_RATE if options.start == "checkpoint" else default)
    setting = Setting(
        start=options.start,
        kind=options.net,
        blocks=options.blocks,
        widths=options.widths,
        epochs=options.epochs,
        images=options.images,
        batch=options.batch,
        rate=rate,
        distil=options.distil,
        temperature=options.temperature,
        erase=options.erase,
        device=options.device,
        is_recorded=options.device != "cpu",
        is_half=options.half,
        together=options.together,
    )
    data, printed = Data.load(options.images, options.device), Printed()
    there = set() if options.again else recorded()
    todo = [run for run in runs(options, setting) if key_of(*run) not in there]

    def keep(rows: list[Row], settings: list[Setting]) -> None:
        for row, own in zip(rows, settings, strict=True):
            printed.note(
                f"{row.arm} at {row.macs_share:.3f}, seed {row.seed}: {row.accuracy:.2f} % "
                f"({row.validation:.2f} %), {row.seconds:.0f} s"
            )
            if not options.dry:
                record.append(NAME, [row], seed=row.seed, settings=own)

    for begin in range(0, len(todo), options.together):
        part = todo[begin : begin + options.together]
        arms = [Arm(name, share, own, data) for name, share, own in part]
        rows = [arms[0].run()] if options.together == 1 else take_turns(arms)
        keep(rows, [own for _, _, own in part])


if __name__ == "__main__":
    main()
