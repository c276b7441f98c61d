"""What every level that only stores a weight has to hold, whichever method offers it."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import embedding_statistics, site_statistics
from tersor.analyse.sites import find_sites
from tersor.artifact import Artifact, Manifest, RawTensor, artifact_bytes, read_artifact
from tersor.build.build import shapes_of
from tersor.core import registry
from tersor.core.errors import ConfigError
from tersor.core.formats import PACKED
from tersor.core.records import BuildChoice, Candidate, Level, Site
from tersor.graph.apply import apply
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.axes.slicing import gone_from
from tersor.graph.changes import pack, unpack
from tersor.graph.contracts import Graph, Method, SiteChange, SiteStatistics
from tersor.graph.edit import attribute, parameters_by_name
from tersor.graph.requantize import requantized
from tersor.graph.serial import graph_tensors, graph_to_json
from tersor.methods.codebook import Codebook
from tersor.methods.datafree import Datafree
from tersor.methods.quantize import Quantize
from tersor.methods.sparsify import Sparsify
from tersor.observe.statistics import observe
from tersor.ops.moments import centred
from tersor.propose.proxy import layer_change
from tests.third_party import MODULE, PACKAGE
from tests.unit.capturing import graph_of, random, scale_error, trained


def third_party() -> Method:
    """The example of docs/adding-a-method.md."""
    spec = importlib.util.spec_from_file_location(MODULE, PACKAGE / f"{MODULE}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Method = module.NormalFloat()
    return found


METHODS: tuple[Method, ...] = (
    Quantize(),
    Codebook(),
    Sparsify(),
    Sparsify(bits=32),
    Datafree(),
    third_party(),
)


def named(method: Method) -> str:
    """Of a test."""
    return repr(method).split(" object")[0]


# Of the layer's output; a level of so many bits leaves no more on the layers below.
MOST_ERROR: Mapping[Level, float] = {
    "lut8_weight": 1e-3, "lut4_weight": 0.02, "int4_weight": 0.02, "int3_weight": 0.08,
    "int2_weight": 0.3, "sparse50_weight": 0.1, "sparse70_weight": 0.3, "sparse90_weight": 0.8,
    "sparse50_int4_weight": 0.12, "sparse2of4_weight": 0.15, "sparse2of4_int4_weight": 0.17,
}  # fmt: skip


class Net(nn.Module):
    """A table, a linear, a grouped and a plain convolution; and one too small to be packed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.wide = nn.Embedding(64, 24), nn.Linear(24, 48)
        self.grouped = nn.Conv1d(48, 32, 3, padding=1, groups=2)
        self.plain, self.small = nn.Conv1d(32, 24, 3, bias=False), nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.relu(self.wide(self.table(ids))).transpose(1, 2)
        hidden = torch.relu(self.grouped(hidden))
        found: Tensor = self.small(torch.relu(self.plain(hidden)).mean(2))
        return found


@dataclass(frozen=True)
class Case:
    graph: Graph
    ids: Tensor
    sites: Mapping[str, Site]
    statistics: Mapping[str, SiteStatistics]
    done: dict[str, list[tuple[Site, Candidate, SiteChange]]] = field(default_factory=dict)

    def made(self, method: Method) -> list[tuple[Site, Candidate, SiteChange]]:
        """A method's packed levels at all sites, worked out once."""
        if repr(method) not in self.done:
            self.done[repr(method)] = made(self, method)
        return self.done[repr(method)]


@pytest.fixture(scope="module")
def net() -> Case:
    ids = torch.randint(0, 64, (60, 12), generator=torch.Generator().manual_seed(0))
    graph = graph_of(trained(Net()), ids[:4])
    sites = find_sites(graph)
    found = dict(site_statistics(graph, sites, observe(graph, [(ids,)], 1, seed=0)))
    table = next(s for s in sites if s.op_kind == "embedding")
    found[table.name] = embedding_statistics(attribute(graph.module, table.weight))
    return Case(graph, ids, {s.name: s for s in sites}, found)


def offers(net: Case, method: Method) -> list[tuple[Site, Candidate]]:
    return [
        (site, candidate)
        for name, site in net.sites.items()
        for candidate in method.propose(site, net.statistics[name])
        if candidate.level in PACKED
    ]


def made(net: Case, method: Method) -> list[tuple[Site, Candidate, SiteChange]]:
    return [
        (site, candidate, method.apply(site, candidate, net.statistics[site.name]))
        for site, candidate in offers(net, method)
    ]


def test_every_level_is_offered_once_and_small_weights_have_none(net: Case) -> None:
    found: list[tuple[str, Level]] = []
    for method in METHODS[:3]:
        found += [(site.name, candidate.level) for site, candidate in offers(net, method)]
    assert len(found) == len(set(found))
    assert {level for _, level in found} == PACKED
    assert {name for name, _ in found} == {"table", "wide", "grouped", "plain"}


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_declared_sizes_are_those_of_the_bits(net: Case, method: Method) -> None:
    assert isinstance(method, Method)
    for site, candidate, change in net.made(method):
        assert change.packed is not None
        assert (change.level, change.codes, change.weight) == (candidate.level, None, None)
        bias = 0 if change.bias is None else 4 * change.bias.numel()
        assert candidate.size_bytes == len(change.packed.data) + bias
        assert (change.bias is None) == (site.op_kind == "embedding")


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_it_repeats_and_reads_only(net: Case, method: Method) -> None:
    before = {n: (s.weight.clone(), s.moments().xx.clone() if n != "table" else None)
              for n, s in net.statistics.items()}  # fmt: skip
    for (_, _, first), (_, _, second) in zip(net.made(method), made(net, method), strict=True):
        assert first.packed is not None
        assert second.packed is not None
        assert first.packed.data == second.packed.data
    for name, (weight, moments) in before.items():
        assert torch.equal(weight, net.statistics[name].weight)
        assert moments is None or torch.equal(moments, net.statistics[name].moments().xx)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_error_of_a_layer_is_that_of_its_floats(net: Case, method: Method) -> None:
    """By the definition: both weights on the layer's own rows, and by the moments' formula."""
    for site, candidate, change in net.made(method):
        if site.op_kind == "embedding":
            continue
        statistics = net.statistics[site.name]
        weight = change.float_weight()
        assert weight is not None
        new = weight.double().reshape(statistics.weight.shape)
        metric, _ = centred(statistics.moments())
        off = statistics.weight - new
        error = float(((off @ metric) * off).sum())
        total = float(((statistics.weight @ metric) * statistics.weight).sum())
        assert 0 <= error / total < MOST_ERROR[candidate.level]
        rows = statistics.rows().original.double()
        given = 0.0 if statistics.bias is None else statistics.bias
        assert change.bias is not None
        moved = torch.einsum("tgn,gmn->tgm", rows, -off)
        moved = moved + change.bias.double().reshape(new.shape[:2]) - given
        wanted = moved.square().mean(0).reshape(-1)
        torch.testing.assert_close(layer_change(change, statistics), wanted)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_graphs_hold_the_floats_and_know_their_bits(net: Case, method: Method) -> None:
    found = net.made(method)
    last = {site.name: change for site, _, change in found}
    graph = apply(net.graph, list(last.values()))
    assert len(graph.packed) == len(last)
    tensors = parameters_by_name(graph.module)
    for name, packed in graph.packed.items():
        assert np.array_equal(tensors[name].numpy(), packed.expand())
    (out,) = graph.run([net.ids])
    (before,) = net.graph.run([net.ids])
    assert out.shape == before.shape
    assert bool(torch.isfinite(out).all())
    assert not torch.equal(out, before)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_changes_are_kept_as_bits(net: Case, method: Method) -> None:
    changes = [change for _, _, change in net.made(method)]
    records, arrays = pack(changes)
    assert sum(a.nbytes for name, a in arrays.items() if name.endswith("packed")) == sum(
        len(c.packed.data) for c in changes if c.packed is not None
    )
    for before, after in zip(changes, unpack(records, arrays, net.sites), strict=True):
        assert before.packed is not None
        assert after.packed is not None
        assert after.packed.packing == before.packed.packing
        assert bytes(after.packed.data) == bytes(before.packed.data)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_formats_follow_a_width(net: Case, method: Method) -> None:
    axes = analyse_axes(net.graph)
    keep = {"wide": list(range(0, 24, 2))}  # of each group of the convolution behind
    small = keep_units(net.graph, axes, keep)
    removed = axes.removed(gone_from(axes, keep))
    for site, candidate, change in net.made(method):
        (found,) = requantized([change], net.graph, axes, removed, small)
        assert found.packed is not None
        assert change.packed is not None
        if site.name in ("table", "plain"):
            assert found is change  # not touched
            continue
        packing = found.packed.packing
        assert packing == change.packed.packing.resized(found.site.shape)
        assert found.site.shape[0] == (24 if site.name == "wide" else 32)
        weight = parameters_by_name(small.module)[site.weight].double()
        off = (torch.from_numpy(found.packed.expand()) - weight).square().sum()
        # To nearest, without feedback: twice the error at most of what the layer's output shows.
        assert float(off / weight.square().sum()) < 2 * MOST_ERROR[candidate.level] + 1e-3


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_other_levels_are_refused(net: Case, method: Method) -> None:
    site, candidate = offers(net, method)[0]
    foreign = replace(candidate)
    object.__setattr__(foreign, "level", "int5_weight")
    with pytest.raises(ConfigError, match="has no level 'int5_weight'"):
        method.apply(site, foreign, net.statistics[site.name])


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_weights_beyond_float16_are_left_alone(net: Case, method: Method) -> None:
    huge = replace(net.statistics["wide"], weight=net.statistics["wide"].weight * 1e6)
    found = method.propose(net.sites["wide"], huge)
    assert [c for c in found if c.level in PACKED] == []


def compressed(statistics: SiteStatistics) -> SiteStatistics:
    """Statistics behind a prefix that halved two inputs; both halves of the samples tell the same."""
    from tersor.ops.moments import moments_of

    x = random(4000, 24, seed=8) @ random(24, 24, seed=9) / 24**0.5
    xh = x + 0.02 * random(4000, 24, seed=10)
    xh[:, :2] *= 0.5
    halves = tuple(moments_of(xh[i::2].unsqueeze(1), x[i::2].unsqueeze(1)) for i in range(2))
    return replace(statistics, moments_of=lambda *_: halves)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_behind_a_compressed_prefix_the_weight_is_refitted(net: Case, method: Method) -> None:
    statistics = compressed(net.statistics["wide"])
    site = net.sites["wide"]
    for candidate in method.propose(site, net.statistics["wide"]):
        if candidate.level not in PACKED:
            continue
        change = method.apply(site, candidate, statistics)
        is_refitted = change.report["refit_damping"] is not None
        assert is_refitted != isinstance(method, Datafree)  # which looks at no sample
        assert change.packed is not None
        assert len(change.packed.data) + 4 * site.shape[0] == candidate.size_bytes


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_every_backend_runs_what_a_file_packs(
    net: Case, method: Method, name: str, tmp_path: Path
) -> None:
    """The build's constants are the floats of the bits, and the file holds the bits alone."""
    backend = registry.resolve(registry.BACKENDS, name)()
    if not backend.describe().available:
        pytest.skip(f"{name} is not installed")
    graph = apply(net.graph, list({site.name: c for site, _, c in net.made(method)}.values()))
    choice = BuildChoice(backend=name, batch=4)
    built = backend.build(graph, shapes_of(graph.signature, 4), choice)
    manifest = Manifest(
        tersor="0", created="", signature=graph.signature, model="m", choices={name: choice}
    )
    plain = {n: t for n, t in graph_tensors(graph).items() if n not in graph.packed}
    artifact = Artifact(
        manifest=manifest,
        graph=graph_to_json(graph),
        tensors={n: RawTensor.from_numpy(t.contiguous().numpy()) for n, t in plain.items()},
        builds={name: built.serialize()},
        packed=graph.packed,
    )
    path = tmp_path / "m.tersor"
    path.write_bytes(artifact_bytes(artifact))
    opened = read_artifact(path)
    assert len(opened.packed) == 4
    own = sum(len(t.data) for n, t in opened._stored.items() if n.startswith("builds."))
    assert own < min(packed.expand().nbytes for packed in graph.packed.values()) / 2
    loaded = backend.load(opened.sections(name), choice)
    inputs = {graph.signature.inputs[0].name: net.ids[:4].numpy()}
    found, wanted = loaded.run(inputs), built.run(inputs)
    assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
    assert scale_error(torch.from_numpy(next(iter(found.values()))),
                       graph.run([net.ids[:4]])[0]) < 1e-4  # fmt: skip


def test_settings_that_can_not_be() -> None:
    with pytest.raises(ConfigError, match=r"bits: found 9, wanted 2\.\.8 or 32"):
        Sparsify(bits=9)
    with pytest.raises(ConfigError, match="rounds: found 0"):
        Codebook(rounds=0)
