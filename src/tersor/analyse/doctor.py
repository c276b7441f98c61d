"""What works on this machine, what is missing and how to mend it.

``probe`` looks; ``diagnose`` judges what was seen. Nothing heavy is imported unless the caller
asks for PyTorch's own word on CUDA: versions come from the installed packages' metadata.
"""

import importlib.metadata
import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tersor.core.machine import Machine
from tersor.core.records import BackendInfo

FindingStatus = Literal["ok", "missing", "problem"]

# As in pyproject.toml; a test compares the two.
MINIMUM_VERSIONS: Mapping[str, tuple[int, ...]] = {
    "numpy": (1, 26),
    "safetensors": (0, 4),
    "torch": (2, 11),
    "scipy": (1, 11),
    "openvino": (2026, 1),
    "onnx": (1, 17),
    "onnxscript": (0, 5),
    "onnxruntime": (1, 20),
}
_EXTRAS = {
    "numpy": "tersor",
    "safetensors": "tersor",
    "torch": "tersor[compress]",
    "scipy": "tersor[compress]",
    "openvino": "tersor[openvino]",
    "onnx": "tersor[onnx]",
    "onnxscript": "tersor[onnx]",
    "onnxruntime": "tersor[onnx]",
}
_COMPILERS = ("c++", "g++", "clang++")
_COMPRESS_PACKAGES = ("torch", "scipy")
_MINIMUM_PYTHON = (3, 11)
# Instruction sets that decide which formats are fast, and any of which brings the ability.
_ABILITIES: Mapping[str, tuple[str, ...]] = {
    "256-bit vectors (avx2)": ("avx2",),
    "int8 dot products (vnni)": ("avx_vnni", "avx512_vnni"),
    "bf16 products": ("avx512_bf16", "amx_bf16"),
    "int8 matrix tiles (amx_int8)": ("amx_int8",),
}
# CUDA's major version -> the oldest driver that runs it, and any minor version of it (CUDA release notes,
# "minor version compatibility").
_DRIVERS: Mapping[int, int] = {11: 450, 12: 525, 13: 580}
# What a card computes in, from which compute capability on (CUDA C++ programming guide, tensor cores).
_TENSOR_CORES: Mapping[str, tuple[int, int]] = {
    "fp16": (7, 0),
    "int8": (7, 5),
    "bf16": (8, 0),
    "fp8": (8, 9),
}
_TRITON_CAPABILITY = (7, 0)
_SMI_SECONDS = 10.0  # a wedged driver makes nvidia-smi hang for ever


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU, as its driver reports it."""

    name: str
    driver: str
    memory: str
    capability: str = ""  # compute capability, as 9.0; empty where the driver does not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """What was seen on the machine, unjudged.

    Attributes:
        packages: Version by package name; None where it is not installed.
        gpus: NVIDIA GPUs that nvidia-smi lists.
        gpu_problem: Why nvidia-smi is there but gave no answer.
        has_nvidia_smi: Whether it is on PATH.
        torch_cuda: CUDA that PyTorch was built for; empty where unknown or none.
        torch_cudnn: cuDNN that PyTorch uses; empty where unknown or none.
        torch_asked: Whether PyTorch was imported and asked.
        torch_problem: Why the import failed.
        torch_sees_gpu: Whether PyTorch can use a GPU; None where it was not asked.
        torch_architectures: What its CUDA code was compiled for: sm_75, ..., compute_120.
        triton: Its version; None where it is not installed.
        compiler: The C++ compiler on PATH; empty without one.
    """

    packages: Mapping[str, str | None]
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str = ""
    has_nvidia_smi: bool = False
    torch_cuda: str = ""
    torch_cudnn: str = ""
    torch_asked: bool = False
    torch_problem: str = ""
    torch_sees_gpu: bool | None = None
    torch_architectures: tuple[str, ...] = ()
    triton: str | None = None
    compiler: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    group: Literal["processor", "python", "packages", "nvidia", "backends"]
    name: str
    status: FindingStatus
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """The state of this machine.

    Attributes:
        machine: Processor, cores, memory.
        findings: Everything that was looked at.
        backends: What each backend says of itself.
        run_on: Backends on which artifacts run here.
        compress_on: Backends for which models can be compressed here.
    """

    machine: Machine
    findings: tuple[Finding, ...]
    backends: tuple[BackendInfo, ...] = ()
    run_on: tuple[str, ...] = ()
    compress_on: tuple[str, ...] = field(default=())


def diagnose(
    backend_infos: Sequence[BackendInfo],
    machine: Machine,
    *,
    probes: Probes | None = None,
) -> Doctor:
    """Judge the machine.

    Args:
        backend_infos: What each installed backend says of itself.
        machine: The machine's description.
        probes: What was seen; None looks now.
    """
    seen = probe() if probes is None else probes
    packages = tuple(_package(name, seen.packages.get(name)) for name in MINIMUM_VERSIONS)
    usable = {f.name for f in packages if f.status == "ok"}
    run_on = tuple(info.name for info in backend_infos if info.available)
    can_compress = all(name in usable for name in _COMPRESS_PACKAGES)
    return Doctor(
        machine=machine,
        findings=(
            *_processor(machine),
            _python(machine),
            *packages,
            _compiler(seen.compiler),
            *_nvidia(seen),
            *(_backend(info) for info in backend_infos),
        ),
        backends=tuple(backend_infos),
        run_on=run_on,
        compress_on=run_on if can_compress else (),
    )


def probe(*, import_torch: bool | None = None) -> Probes:
    """Look at packages and at NVIDIA's driver, and ask PyTorch, which takes seconds to import.

    ``import_torch``: None asks it where the driver lists a GPU.
    """
    packages = {name: _installed(name) for name in MINIMUM_VERSIONS}
    gpus, gpu_problem, has_smi = _ask_nvidia_smi()
    seen = Probes(
        packages=packages,
        gpus=gpus,
        gpu_problem=gpu_problem,
        has_nvidia_smi=has_smi,
        triton=_installed("triton"),
        compiler=next((c for c in _COMPILERS if shutil.which(c)), ""),
    )
    asks = bool(gpus) if import_torch is None else import_torch
    return _ask_torch(seen) if asks and packages["torch"] is not None else seen


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_nvidia_smi() -> tuple[tuple[Gpu, ...], str, bool]:
    path = shutil.which("nvidia-smi")
    if path is None:
        return (), "", False
    fields = "name,driver_version,memory.total"
    try:
        answer = _smi(path, f"{fields},compute_cap")
        if answer.returncode:  # drivers before 465 do not know the last one
            answer = _smi(path, fields)
        answer.check_returncode()
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi gave no answer in {_SMI_SECONDS:.0f} s", True
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        return (), f"nvidia-smi exit {error.returncode}: {said[0] if said else 'no message'}", True
    except OSError as error:
        return (), f"nvidia-smi cannot be run: {error.strerror or error}", True
    return parse_smi(answer.stdout), "", True


def _smi(path: str, fields: str) -> "subprocess.CompletedProcess[str]":
    query = [path, f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(  # noqa: S603 - a fixed command, found on PATH
        query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False
    )


def parse_smi(text: str) -> tuple[Gpu, ...]:
    """Read nvidia-smi's lines of ``name, driver_version, memory.total`` and maybe ``compute_cap``."""
    found = []
    for line in text.splitlines():
        rest, _, last = line.rpartition(",")
        capability = last.strip() if re.fullmatch(r"\d+\.\d+", last.strip()) else ""
        row = (rest if capability else line).rsplit(",", 2)
        if len(row) == 3:
            name, driver, memory = (part.strip() for part in row)
            found.append(Gpu(name=name, driver=driver, memory=memory, capability=capability))
    return tuple(found)


def _ask_torch(seen: Probes) -> Probes:
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing shared library is an OSError
        return replace(seen, torch_asked=True, torch_problem=f"{type(error).__name__}: {error}")
    if not torch.version.cuda:
        return replace(seen, torch_asked=True)
    cudnn = torch.backends.cudnn.version()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: the findings say it
        sees = torch.cuda.is_available()
    return replace(
        seen,
        torch_asked=True,
        torch_cuda=torch.version.cuda,
        torch_cudnn="" if cudnn is None else str(cudnn),
        torch_sees_gpu=sees,
        torch_architectures=tuple(torch.cuda.get_arch_list()) if sees else (),
    )


def _compiler(found: str) -> Finding:
    return Finding(
        group="packages",
        name="C++ compiler",
        status="ok" if found else "missing",
        found=found or f"none of {', '.join(_COMPILERS)} on PATH",
        remedy=""
        if found
        else "install g++ or clang++ for compiled builds of the backend inductor",
    )


def _processor(machine: Machine) -> list[Finding]:
    gib = machine.memory_bytes / 2**30
    head = Finding(
        group="processor",
        name="processor",
        status="ok",
        found=f"{machine.processor}, {machine.cores} usable core(s), {gib:.1f} GiB",
    )
    if machine.architecture not in ("x86_64", "AMD64"):
        extra = ", ".join(machine.features) or "none of those that Tersor asks for"
        return [head, Finding(group="processor", name="features", status="ok", found=extra)]
    return [head, *(_ability(name, sets, machine) for name, sets in _ABILITIES.items())]


def _ability(name: str, sets: tuple[str, ...], machine: Machine) -> Finding:
    found = [s for s in sets if s in machine.features]
    return Finding(
        group="processor",
        name=name,
        status="ok" if found else "missing",
        found=", ".join(found) or "not on this processor",
        remedy="" if found else "none needed: Tersor measures which formats are fast without it",
    )


def _python(machine: Machine) -> Finding:
    good = _numbers(machine.python) >= _MINIMUM_PYTHON
    wanted = ".".join(str(n) for n in _MINIMUM_PYTHON)
    return Finding(
        group="python",
        name="python",
        status="ok" if good else "problem",
        found=machine.python,
        remedy="" if good else f"use Python {wanted} or newer",
    )


def _package(name: str, version: str | None) -> Finding:
    wanted = ".".join(str(n) for n in MINIMUM_VERSIONS[name])
    remedy = f"pip install '{_EXTRAS[name]}' ({name}>={wanted})"
    if version is None:
        status: FindingStatus = "missing"
    elif _numbers(version) < MINIMUM_VERSIONS[name]:
        status = "problem"
    else:
        status, remedy = "ok", ""
    found = version or "not installed"
    return Finding(group="packages", name=name, status=status, found=found, remedy=remedy)


def _numbers(version: str) -> tuple[int, ...]:
    head = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in head.group().split(".")) if head else ()


def _nvidia(seen: Probes) -> list[Finding]:
    found = [_driver(seen), *_torch_cuda(seen), *(_capability(gpu, seen) for gpu in seen.gpus)]
    return [*found, _triton(seen)] if seen.gpus else found


def _capability(gpu: Gpu, seen: Probes) -> Finding:
    """What a card computes in, and whether PyTorch has code for it."""
    own = _numbers(gpu.capability)
    name = f"compute capability of {gpu.name}"
    if not own:
        return _card(
            name, "missing", "the driver does not tell", "update NVIDIA's driver to see it"
        )
    able = [kind for kind, least in _TENSOR_CORES.items() if own >= least]
    found = f"{gpu.capability}; tensor cores: {', '.join(able) or 'none'}"
    if seen.torch_architectures and not _runs_on(own, seen.torch_architectures):
        found += f"; torch was built for {', '.join(seen.torch_architectures)}"
        return _card(name, "problem", found, "install a build of torch for this card")
    return _card(name, "ok", found)


def _runs_on(capability: tuple[int, ...], architectures: Sequence[str]) -> bool:
    """Machine code runs within its major version from its minor one on; compute_* is compiled for any newer."""
    major, minor = capability[0], (*capability, 0)[1]
    for text in architectures:
        kind, _, digits = text.partition("_")
        number = re.match(r"\d+", digits)
        if number is None:
            continue
        own = divmod(int(number.group()), 10)
        if kind == "compute" and own <= (major, minor):
            return True
        if kind == "sm" and own[0] == major and own[1] <= minor:
            return True
    return False


def _triton(seen: Probes) -> Finding:
    if seen.triton is None:
        remedy = "pip install triton (CUDA builds of torch for Linux bring it), for compiled builds"
        return _card("Triton", "missing", "not installed", remedy)
    old = [g.name for g in seen.gpus if () < _numbers(g.capability) < _TRITON_CAPABILITY]
    if old:
        least = ".".join(map(str, _TRITON_CAPABILITY))
        found = f"{seen.triton}, for capability {least} or newer; not for {', '.join(old)}"
        return _card("Triton", "problem", found, "none: builds that are not compiled run there")
    return _card("Triton", "ok", seen.triton)


def _driver(seen: Probes) -> Finding:
    if seen.gpus:
        found = "; ".join(f"{g.name}, {g.memory}, driver {g.driver}" for g in seen.gpus)
        least = _DRIVERS.get(next(iter(_numbers(seen.torch_cuda)), 0), 0)
        if any(_numbers(g.driver)[:1] < (least,) for g in seen.gpus):
            found += f"; torch's CUDA {seen.torch_cuda} wants {least} or newer"
            remedy = "update NVIDIA's driver, or install torch for an older CUDA"
            return _card("driver", "problem", found, remedy)
        return _card("driver", "ok", found)
    if seen.has_nvidia_smi:
        remedy = "reload or reinstall NVIDIA's driver; nothing is needed for CPU work"
        return _card("driver", "problem", seen.gpu_problem or "nvidia-smi lists no GPU", remedy)
    remedy = "install NVIDIA's driver if there is such a GPU; nothing is needed for CPU work"
    return _card("driver", "missing", "no nvidia-smi on PATH", remedy)


def _torch_cuda(seen: Probes) -> list[Finding]:
    version = seen.packages.get("torch")
    if version is None:
        return []
    if seen.torch_problem:
        return [
            _cuda("problem", f"torch {version}: {seen.torch_problem}", "reinstall torch"),
        ]
    if seen.torch_cuda:
        found = f"CUDA {seen.torch_cuda}, cuDNN {seen.torch_cudnn or 'none'}"
        if seen.gpus and seen.torch_sees_gpu is False:
            remedy = "see the driver above; in a container, pass the GPU in; look at CUDA_VISIBLE_DEVICES"
            return [_cuda("problem", f"{found}; torch can't use the GPU", remedy)]
        if not seen.torch_cudnn:
            return [_cuda("problem", f"{found}: convolutions are slow", "reinstall torch")]
        return [_cuda("ok", found)]
    if not (seen.torch_asked or version.endswith("+cpu")):
        return [_cuda("ok", f"torch {version}; not asked for its CUDA")]
    if seen.gpus:
        remedy = "install a CUDA build of torch to use this GPU"
        return [_cuda("problem", f"torch {version} is a CPU build", remedy)]
    return [
        _cuda("missing", f"torch {version} is a CPU build", "none needed without an NVIDIA GPU")
    ]


def _cuda(status: FindingStatus, found: str, remedy: str = "") -> Finding:
    return _card("CUDA in torch", status, found, remedy)


def _card(name: str, status: FindingStatus, found: str, remedy: str = "") -> Finding:
    return Finding(group="nvidia", name=name, status=status, found=found, remedy=remedy)


def _backend(info: BackendInfo) -> Finding:
    formats = ", ".join(dict.fromkeys([*info.precisions, *(f.name for f in info.formats)]))
    found = f"{info.version} on {info.device}: {formats}" if info.available else info.reason
    return Finding(
        group="backends",
        name=info.name,
        status="ok" if info.available else "problem",
        found=found,
        remedy=info.remedy,
    )
