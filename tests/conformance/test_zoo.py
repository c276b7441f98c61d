"""The law on whole networks: cutting a random 30 % of every exact width is zeroing it."""

import gc
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec

import pytest
import torch

from tersor.graph.axes import analyse_axes
from tersor.graph.axes.gate import EFFECT, TOLERANCE, check, random_share
from tests.conformance.zoo import families, hf_zoo, torchvision_zoo
from tests.conformance.zoo.capturing import captured
from tests.conformance.zoo.entry import ZooModel, built, picture
from tests.conformance.zoo.judge import GOALS, judge
from tests.conformance.zoo.models import select, zoo
from tests.conformance.zoo.torchvision_shim import import_torchvision

FAMILIES = list(families.entries())
# Each op's rule has its own cases in tests/unit/graph/axes; the law on these networks is for a release.
LONGER = (
    *("grouped", "dense", "volume", "group_norm", "sound"),
    *("vit_fused", "gpt", "experts", "mixer", "translator"),
)
REST = [entry for entry in zoo().values() if entry.source != "families"]
NEEDS = {"torchvision": "torchvision", "timm": "timm", "transformers": "transformers"}
# Families under their goal for the share of MACs, and what holds the rest.
UNDER_GOAL = {
    "families/modern": "the residual width runs into a LayerNorm: approximate",
    "families/mixer": "patches write into the residual width, which runs into a LayerNorm",
}


def named(entry: ZooModel) -> str:
    return entry.name


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.collect()  # cycles hold the weights of whole networks: 16 GB after 80 of them


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=pytest.mark.slow if entry.family in LONGER else (), id=entry.name)
        for entry in FAMILIES
    ],
)
def test_family(entry: ZooModel) -> None:
    row = judge(entry, each=True)
    assert row.passed, row
    assert not row.unknown
    assert not row.silent
    assert row.exact
    assert row.reached is not None
    assert (row.reached < GOALS[row.kind]) == (entry.name in UNDER_GOAL), row.reached


@pytest.mark.zoo
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", REST, ids=named)
def test_zoo(entry: ZooModel) -> None:
    if not find_spec(NEEDS[entry.source]):
        pytest.skip(f"{NEEDS[entry.source]} is not installed")
    row = judge(entry)
    assert row.passed, json.dumps(asdict(row))
    assert not row.unknown


def test_wrong_labels_do_not_pass() -> None:
    """The labels of one reader's inputs in reverse order: cutting picks other columns."""
    (entry,) = select(["families/residual"])
    graph = captured(entry).graph
    axes = analyse_axes(graph)
    gone = random_share(axes, 0.3, 0)
    assert check(graph, axes, gone).passed
    width = next(w for w in axes.widths if any(c.role == "consumer" for c in w.couplings))
    reader = next(c for c in width.couplings if c.role == "consumer")
    shape = axes.walk.stored[reader.tensor]
    turned = replace(shape[reader.dim], rows=shape[reader.dim].rows[::-1].copy())
    axes.walk.stored[reader.tensor] = [
        turned if d == reader.dim else old for d, old in enumerate(shape)
    ]
    report = check(graph, axes, gone)
    assert not report.passed
    assert report.difference > EFFECT * TOLERANCE


def test_zoo_holds_the_table() -> None:
    assert len(torchvision_zoo.TORCH_PRUNING_TABLE) == 85
    names = torchvision_zoo.names()
    assert len(set(names)) == len(names)
    assert len(hf_zoo.MODELS) == 23
    assert len({e.family for e in zoo().values() if e.source == "timm"}) >= 60


@pytest.mark.skipif(not find_spec("torchvision"), reason="torchvision is not installed")
@pytest.mark.filterwarnings("ignore")
def test_torchvision_is_complete() -> None:
    models = import_torchvision().models
    known = {n for n in models.list_models() if not n.startswith("quantized_")}
    assert known == set(torchvision_zoo.names())


def test_build_gives_the_same_weights_and_no_constants() -> None:
    entry = FAMILIES[0]
    first, second = entry.build(), entry.build()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.numel() == 1 or float(a.max()) > float(a.min())


def test_build_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    FAMILIES[0].build()
    assert torch.equal(state, torch.get_rng_state())


def test_norms_see_what_they_are_set_to() -> None:
    """After settling, a norm's input has about the mean and less than the variance it stores."""
    norm = built(lambda: torch.nn.BatchNorm2d(3), picture(16))()
    rows = picture(16)()[0].transpose(0, 1).flatten(1)
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert bool(((norm.running_mean - rows.mean(1)).abs() <= 0.21 * (2 * rows.var(1)).sqrt()).all())
    assert bool((norm.running_var >= 0.8 * rows.var(1)).all())


def test_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="nothing-like-this"):
        select(["nothing-like-this"])
