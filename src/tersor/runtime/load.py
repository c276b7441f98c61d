"""From a file to something that runs: pick a build whose backend is here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tersor.artifact.file import ArtifactFile, read_artifact
from tersor.core.errors import ArtifactError, BackendError, ConfigError, DataError
from tersor.core.records import BackendInfo, BuildChoice
from tersor.graph.routed import routed
from tersor.runtime.guards import Guards
from tersor.runtime.runner import Runner


def load_runner(
    path: str | Path,
    device: str = "cpu",
    guards: Guards | None = None,
    *,
    resolve_backend: Callable[[str], Any],
) -> Runner:
    """Read an artifact and compile its first build that runs here.

    Args:
        path: The artifact.
        device: Where to run: cpu, cuda, cuda:1.
        guards: What the runner checks beyond shapes and types.
        resolve_backend: Gives the backend of a name; may raise ConfigError if there is none.

    Raises:
        ArtifactError: The file is no artifact, is damaged or was edited.
        BackendError: No build in the file runs here; says for each why, and the way out.
    """
    artifact = read_artifact(path)
    manifest = artifact.manifest
    choice, backend = pick(artifact, device, resolve_backend, str(path))
    opened = backend.load(artifact.sections(choice.backend), choice)
    try:
        executable = routed(opened, manifest.signature, choice)
    except (ConfigError, DataError) as error:  # buckets that no writer made
        raise ArtifactError(f"{path}: {error}") from error
    return Runner(executable, manifest.signature, choice.batch, guards, manifest.ranges)


def pick(
    artifact: ArtifactFile, device: str, resolve_backend: Callable[[str], Any], path: str
) -> tuple[BuildChoice, Any]:
    """The first build in a file that runs on a device, and its backend.

    Raises:
        BackendError: There is none; says for each why, and the way out.
    """
    reasons = []
    for name in artifact.manifest.backends:
        choice = artifact.manifest.choices[name]
        if device.partition(":")[0] != choice.device.partition(":")[0]:
            reasons.append(f"{name} was built for {choice.device}")
            continue
        try:
            backend = resolve_backend(name)
        except ConfigError as error:
            reasons.append(str(error))
            continue
        info: BackendInfo = backend.describe()
        if info.available:
            return replace(choice, device=device), backend
        reasons.append(f"{name} is not available: {info.reason}; {info.remedy}")
    raise BackendError(
        f"{path}: no build in it runs on {device}: "
        f"{'; '.join(reasons) or 'it has none'}; or compress again for this machine"
    )
