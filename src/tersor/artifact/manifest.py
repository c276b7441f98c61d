"""What an artifact says about itself: one record, as ``manifest.json``."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tersor.core.errors import ArtifactError, ConfigError
from tersor.core.jsonable import from_json
from tersor.core.records import BuildChoice, Plan, Signature, Verdict

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Smallest and largest value of a tensor: seen in calibration, or declared for ids."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ConfigError(f"range [{self.low}, {self.high}]: wanted finite low <= high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Ranges by tensor name, for the guards; a tensor without one is not checked.

    A float input's range is what calibration saw. An integer input's is what the model can take
    (ids below the embedding's rows), because calibration does not see every valid id.

    Attributes:
        spreads: Float input -> the outputs that are NaN in the original where the input is. A build
            may make numbers of NaN: 8-bit codes have none, and some kernels lose it in a maximum.
    """

    inputs: Mapping[str, Range] = field(default_factory=dict)
    outputs: Mapping[str, Range] = field(default_factory=dict)
    spreads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about an artifact but its tensors, its graph and its builds.

    Attributes:
        tersor: Version that made it.
        created: When, as text; it is part of the file's bytes, so the caller decides.
        signature: The model's calling convention.
        model: Content hash of the captured graph.
        choices: The choice of each build, by backend.
        plan: The plan that was carried out, if any.
        verdict: What was measured, if anything was.
        ranges: Calibrated ranges of inputs and outputs.
        created_by: More about the maker: versions, machine.
        metadata: The caller's own; JSON values.
        format: Version of the file format.
        backends: Backends that the file has a build for; the writer fills it in.
        sha256: Hash of every other entry; the writer fills it in.
    """

    tersor: str
    created: str
    signature: Signature
    model: str
    choices: Mapping[str, BuildChoice]
    plan: Plan | None = None
    verdict: Verdict | None = None
    ranges: Ranges = field(default_factory=Ranges)
    created_by: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT_VERSION
    backends: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


def read_manifest(data: bytes, where: str) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        ArtifactError: No JSON, another format version, or no manifest.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not JSON ({error})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: found format version {version!r}, wanted {FORMAT_VERSION}; "
            "read it with the version of Tersor that wrote it, or compress again"
        )
    try:
        return from_json(Manifest, content, where)
    except (ConfigError, RecursionError) as error:
        raise ArtifactError(f"{error}; the file was edited or is of another version") from error
