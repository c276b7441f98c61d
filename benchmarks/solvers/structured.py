"""Narrower layers without training: LeNet-5's neurons, and the channels inside of ResNet-20's blocks.

The baselines cut by a mask: a unit whose batch norm (or row and bias) is zero adds nothing behind its ReLU, which
is the same as cutting it out. Every baseline with batch norms has them re-estimated on the same images, and is
recorded with and without. Ours gets images alone; Taylor gets their labels as well.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.prune import BATCH, Pruner, accuracy, read, reestimate_, total_macs
from benchmarks.solvers.peers import REFERENCE, packaged
from benchmarks.solvers.rows import Recorder, Row
from benchmarks.solvers.subjects import drawn_images
from tersor.graph.contracts import Graph
from tests.data.zoo import load_lenet5, load_resnet20

NEURONS = (250, 125, 50)
SHARES = (0.5, 0.25)
IMAGES = {"resnet20": 8000, "lenet5": 2000}  # that calibrate, for every method; no labels
SEARCH = 4  # as many fewer decide about widths
LABELLED = 1000  # images of gradients
STEPS: Mapping[str, int] = {"resnet20": 2, "lenet5": 25}  # of the kept counts on offer
PAIR_IMAGES, PAIR_ITERATIONS = 10_000, 60
TOGETHER, RECONSTRUCTED = "ours, layers together", "ours, 60 s of block reconstruction"
WAYS: Mapping[str, tuple[str, ...]] = {
    "resnet20": ("ours, planned", "ours, uniform"),
    "lenet5": ("ours", TOGETHER),
}
RECOVERY_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A width that one layer makes and one other reads.

    Attributes:
        make: Its weight's rows are the units.
        norm: Batch norm between; None: none.
        read: Its weight's columns are the units.
    """

    make: nn.Module
    norm: nn.BatchNorm2d | None
    read: nn.Module

    @property
    def units(self) -> int:
        """How many there are."""
        return len(weight_of(self.make))


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def inner_widths(model: nn.Module) -> list[Inner]:
    """Of LeNet-5 the 500 neurons; of a residual network the channels inside of each block."""
    modules = dict(model.named_modules())
    if "f1" in modules:
        return [Inner(make=modules["f1"], norm=None, read=modules["f2"])]
    found = []
    for name, module in modules.items():
        if name.endswith(".conv1"):
            block = name.removesuffix("conv1")
            norm = modules[block + "bn1"]
            assert isinstance(norm, nn.BatchNorm2d)
            found.append(Inner(make=module, norm=norm, read=modules[block + "conv2"]))
    return found


@dataclass(frozen=True, slots=True)
class Activity:
    """Of what the reader of a width sees: mean square, mean and variance of each unit."""

    square: Tensor
    mean: Tensor

    @property
    def variance(self) -> Tensor:
        """Of each unit."""
        return (self.square - self.mean.square()).clamp(min=0)


def activities(model: nn.Module, widths: Sequence[Inner], images: Tensor) -> list[Activity]:
    """Of every width, over images and positions."""
    sums = [torch.zeros(2, w.units, dtype=torch.float64) for w in widths]
    count = [0] * len(widths)

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].movedim(1, -1).reshape(-1, widths[index].units).double()
            sums[index] += torch.stack([rows.square().sum(0), rows.sum(0)])
            count[index] += len(rows)

        return look

    handles = [w.read.register_forward_pre_hook(hook(i)) for i, w in enumerate(widths)]
    with torch.no_grad():
        for part in images.split(BATCH):
            model(part)
    for handle in handles:
        handle.remove()
    return [Activity(*(s / c)) for s, c in zip(sums, count, strict=True)]


def read_norms(width: Inner) -> Tensor:
    """Squared norm of the reader's weights of each unit."""
    return weight_of(width.read).detach().double().movedim(1, 0).flatten(1).square().sum(1)


def magnitude(width: Inner) -> Tensor:
    """L2 norm of the rows of the maker."""
    return weight_of(width.make).detach().double().flatten(1).norm(dim=1)


def wanda_sp(width: Inner, activity: Activity) -> Tensor:
    """Sum over outputs of |W| |x|.

    Source: An et al. 2024 (FLAP), arXiv:2312.11983, section 5, the structured form of Wanda.
    """
    size = weight_of(width.read).detach().double().movedim(1, 0).flatten(1).abs().sum(1)
    return size * activity.square.sqrt()


def flap(width: Inner, activity: Activity) -> Tensor:
    """Variance of the unit times the squared norm of its readers' weights, standardised over the width.

    Source: An et al. 2024 (FLAP), arXiv:2312.11983, eq. 5 and 6.
    """
    score = activity.variance * read_norms(width)
    return (score - score.mean()) / score.std().clamp(min=1e-30)


def taylor(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """(sum of g w over a unit's row of the maker)^2, with the true labels.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8.
    """
    net = copy.deepcopy(model)
    widths = inner_widths(net)
    scores = [torch.zeros(w.units, dtype=torch.float64) for w in widths]
    weights = [weight_of(w.make) for w in widths]
    for part, truth in zip(images.split(50), labels.split(50), strict=True):
        loss = functional.cross_entropy(net(part), truth)
        slopes = torch.autograd.grad(loss, weights)
        for score, weight, slope in zip(scores, weights, slopes, strict=True):
            score.add_((weight.detach() * slope).flatten(1).sum(1).double().square())
    return scores


def uniform_kept(widths: Sequence[int], share: float) -> list[int]:
    """The same share of every width."""
    return [max(1, round(units * share)) for units in widths]


def kept_of(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """The highest of each width."""
    return [s.topk(c).indices.sort().values for s, c in zip(scores, counts, strict=True)]


def global_kept(
    scores: Sequence[Tensor], cost: Callable[[Sequence[int]], float], budget: float
) -> list[Tensor]:
    """The highest over all widths, as many as a budget holds; one of each stays."""
    order = torch.cat(list(scores)).sort(descending=True).values
    low, high = 0, len(order) - 1
    counts = [1] * len(scores)
    while low <= high:
        middle = (low + high) // 2
        trial = [max(1, int((s >= order[middle]).sum())) for s in scores]
        if cost(trial) <= budget:
            counts, low = trial, middle + 1
        else:
            high = middle - 1
    return kept_of(scores, counts)


def masked(
    model: nn.Module, kept: Sequence[Tensor], means: Sequence[Activity] | None = None
) -> nn.Module:
    """A copy without the other units; with ``means`` a bias takes up what they were on average."""
    net = copy.deepcopy(model)
    for index, (width, units) in enumerate(zip(inner_widths(net), kept, strict=True)):
        gone = torch.ones(width.units, dtype=torch.bool)
        gone[units] = False
        with torch.no_grad():
            if means is not None:
                _compensate_(width, net, gone, means[index].mean)
            silent = width.norm if width.norm is not None else width.make
            for parameter in (silent.weight, silent.bias):
                assert isinstance(parameter, Tensor)
                parameter[gone] = 0
    return net


def _compensate_(width: Inner, net: nn.Module, gone: Tensor, mean: Tensor) -> None:
    """The reader's bias, or the mean that its batch norm subtracts, takes up W mean of what went."""
    weight = weight_of(width.read).double()
    moved = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ (mean * gone)
    if isinstance(width.read, nn.Linear):
        width.read.bias += moved.float()
        return
    for name, module in net.named_modules():
        if module is width.read:
            norm = dict(net.named_modules())[name.replace("conv2", "bn2")]
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            norm.running_mean -= moved.float()


def macs_of(model: nn.Module, image: Tensor) -> Callable[[Sequence[int]], float]:
    """MACs as a function of the kept counts of the inner widths."""
    places: dict[nn.Module, int] = {}

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        places[module] = weight_of(module).numel() * (
            output[0, 0].numel() if output.dim() > 2 else 1
        )

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    widths = inner_widths(model)
    inner = {m: (i, w.units) for i, w in enumerate(widths) for m in (w.make, w.read)}

    def cost(counts: Sequence[int]) -> float:
        total = 0.0
        for module, macs in places.items():
            index, units = inner.get(module, (-1, 1))
            total += macs * (counts[index] / units if index >= 0 else 1.0)
        return total

    return cost


def uniform_share(
    widths: Sequence[int], cost: Callable[[Sequence[int]], float], budget: float
) -> float:
    """The largest share of every width within a budget, to a thousandth."""
    shares = [i / 1000 for i in range(1, 1001)]
    fitting = [s for s in shares if cost(uniform_kept(widths, s)) <= budget]
    return fitting[-1] if fitting else shares[0]


class Case:
    """One model with its images, and how rows of it are recorded."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self.recorder = name, recorder
        self.model = load_resnet20() if name == "resnet20" else load_lenet5()
        self.images, self.labels = drawn_images(recorder.seed)
        self.calibration = self.images[: IMAGES[name]]
        self.search = self.images[IMAGES[name] :][: IMAGES[name] // SEARCH]
        self.test = read("t10k")
        self.base = accuracy(self.model, *self.test)
        self.widths = inner_widths(self.model)
        self.cost = macs_of(self.model, self.images[:1])
        self.whole = self.cost([w.units for w in self.widths])

    def lacks(self, setting: str, method: str) -> bool:
        """Whether a row is still to be made."""
        return not self.recorder.has("structured", self.name, setting, method, "layer")

    def add(self, setting: str, method: str, predict: object, macs: float, source: str) -> None:
        """Judge on the test images and record."""
        found = accuracy(predict, *self.test)
        quality = {"accuracy": found, "drop": self.base - found, "MACs": macs / self.whole}
        self.recorder.add(
            Row(
                table="structured",
                model=self.name,
                setting=setting,
                method=method,
                quality=quality,
                source=source,
            )
        )


def scored(case: Case) -> dict[str, list[Tensor]]:
    """Scores of every unit, by baseline."""
    seen = activities(case.model, case.widths, case.calibration)
    pairs = list(zip(case.widths, seen, strict=True))
    return {
        "magnitude": [magnitude(w) for w in case.widths],
        "Taylor": taylor(case.model, case.images[:LABELLED], case.labels[:LABELLED]),
        "Wanda-sp": [wanda_sp(w, a) for w, a in pairs],
        "FLAP": [flap(w, a) for w, a in pairs],
    }


def baselines(case: Case, setting: str, budget: float, counts: Sequence[int]) -> None:
    """Rows of one setting: uniform widths, and FLAP's global ones."""
    needed = ("magnitude", "Taylor", "Wanda-sp", "FLAP")
    if not any(case.lacks(setting, name) for name in needed):
        return
    seen = activities(case.model, case.widths, case.calibration)
    for name, scores in scored(case).items():
        is_flap = name == "FLAP"
        whole = is_flap and len(scores) > 1
        kept = global_kept(scores, case.cost, budget) if whole else kept_of(scores, counts)
        net = masked(case.model, kept, seen if is_flap else None)
        macs = case.cost([len(k) for k in kept])
        has_norms = any(w.norm is not None for w in case.widths)
        if case.lacks(setting, name):
            case.add(setting, name, net, macs, REFERENCE)
        if has_norms and case.lacks(setting, f"{name} + batch norm"):
            reestimate_(net, case.calibration)
            case.add(setting, f"{name} + batch norm", net, macs, REFERENCE)


def torch_pruning(case: Case, setting: str, ratio: float) -> None:
    """Its criteria, ranked over the whole network at once, cut in small steps to the MACs."""
    import torch_pruning as tp

    criteria: Mapping[str, Callable[[], object]] = {
        "group norm": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "LAMP": lambda: tp.importance.LAMPImportance(p=2),
        "FPGM": lambda: tp.importance.FPGMImportance(p=2),
        "Taylor": tp.importance.GroupTaylorImportance,
    }
    for name, criterion in criteria.items():
        method = f"Torch-Pruning {name}"
        has_norms = any(w.norm is not None for w in case.widths)
        if not case.lacks(setting, f"{method} + batch norm" if has_norms else method):
            continue
        net = copy.deepcopy(case.model)
        head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1:]
        kept_layers = (
            [m for m in net.modules() if isinstance(m, nn.Conv2d)] if case.name == "lenet5" else []
        )
        pruner = tp.pruner.BasePruner(
            net,
            case.images[:2],
            importance=criterion(),
            pruning_ratio=0.99,
            iterative_steps=100,
            ignored_layers=[*head, *kept_layers],
            global_pruning=True,
        )
        base, _ = tp.utils.count_ops_and_params(net, case.images[:1])
        macs, step = base, 0
        while _too_large(case, net, macs, base * ratio, setting) and step < 100:
            if name == "Taylor":
                net.zero_grad()
                for part, truth in zip(
                    case.images[:LABELLED].split(BATCH),
                    case.labels[:LABELLED].split(BATCH),
                    strict=True,
                ):
                    torch.autograd.backward(functional.cross_entropy(net(part), truth))
            pruner.step()
            step += 1
            macs, _ = tp.utils.count_ops_and_params(net, case.images[:1])
        net.eval()
        share = macs / base * case.whole
        source = packaged("torch-pruning")
        if case.lacks(setting, method):
            case.add(setting, method, net, share, source)
        if has_norms:
            reestimate_(net, case.calibration)
            case.add(setting, f"{method} + batch norm", net, share, source)


def _too_large(case: Case, net: nn.Module, macs: float, budget: float, setting: str) -> bool:
    if case.name == "lenet5":
        return len(weight_of(inner_widths(net)[0].make)) > int(setting.split(maxsplit=1)[0])
    return macs > budget


def ours(case: Case, settings: Mapping[str, float]) -> None:
    """Planned and uniform widths, exact refits of all that is cut or reads what is cut."""
    ways = WAYS[case.name]
    wanted = [*ways, RECONSTRUCTED] if _has_reconstruction() else [*ways]
    if not any(case.lacks(s, n) for s in settings for n in wanted):
        return
    pruner = Pruner(case.model, case.calibration, case.search, step=STEPS[case.name])
    for setting, share in settings.items():
        for name in ways:
            if case.lacks(setting, name):
                _judge(case, setting, name, _pruned(case, pruner, name, share))
        if RECONSTRUCTED in wanted and case.lacks(setting, RECONSTRUCTED):
            keep = _keep(case, pruner, ways[0], share)
            found = reconstructed(pruner, keep, pruner.pruned(keep), case.calibration)
            _judge(case, setting, RECONSTRUCTED, found)


def _has_reconstruction() -> bool:
    return bool(find_spec("tersor.recover")) and bool(find_spec("tersor.recover.blocks"))


def _pruned(case: Case, pruner: Pruner, name: str, share: float) -> Graph:
    keep = _keep(case, pruner, name, share)
    small = pruner.pruned(keep)
    if name == TOGETHER:
        return pruner.together(small, keep, case.images[:PAIR_IMAGES], PAIR_ITERATIONS)
    return small


def _keep(case: Case, pruner: Pruner, name: str, share: float) -> dict[str, list[int]]:
    if case.name == "lenet5":
        (site,) = [s for s in pruner.sites if s.units == 500]
        return pruner.kept({site.name: round(share * 500)})
    if name == "ours, planned":
        return pruner.planned(share)
    inner = [s for s in pruner.sites if len(s.ops) == 1]
    units = [w.units for w in case.widths]
    each = uniform_share(units, case.cost, share * case.whole)
    step = STEPS[case.name]
    counts = {s.name: step * max(1, round(s.units * each / step)) for s in inner}
    return pruner.kept(counts)


def _judge(case: Case, setting: str, name: str, graph: Graph) -> None:
    case.add(setting, name, lambda x: graph.run([x])[0], float(total_macs(graph)), "tersor")


def reconstructed(
    pruner: Pruner, keep: Mapping[str, Sequence[int]], small: Graph, images: Tensor
) -> Graph:
    """Label-free block reconstruction, where this version has it."""
    from tersor.core.recovery import Recover
    from tersor.graph.axes.matching import counterparts
    from tersor.graph.axes.slicing import gone_from
    from tersor.recover.blocks import Teacher, reconstruct

    known = counterparts(pruner.axes, pruner.axes.removed(gone_from(pruner.axes, keep)))
    batches = [(part,) for part in images.split(BATCH)]
    done = reconstruct(
        Teacher(graph=pruner.graph, kind="logits", counterparts=known),
        small,
        batches,
        Recover(seconds=RECOVERY_SECONDS),
        seed=0,
    )
    graph: Graph = done.graph
    return graph


def run(model: str, recorder: Recorder) -> None:
    """Every cell of one model that is not recorded yet; ours last, as it takes longest."""
    case = Case(model, recorder)
    units = [w.units for w in case.widths]
    if model == "lenet5":
        settings = {f"{n} of 500 neurons": n / 500 for n in NEURONS}
    else:
        settings = {f"{share:.0%} of the MACs": share for share in SHARES}
    for setting, share in settings.items():
        budget = share * case.whole
        each = share if model == "lenet5" else uniform_share(units, case.cost, budget)
        baselines(case, setting, budget, uniform_kept(units, each))
        if packaged("torch-pruning"):
            torch_pruning(case, setting, share)
    ours(case, settings)
