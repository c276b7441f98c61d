"""The driver boundary: what torch and the CUDA driver say of this machine, and what a package needs.

Everything that asks the driver is a method of ``Driver``; tests put another one in its place.
"""

import ctypes
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tersor.core.errors import BackendError, ConfigError

_FAMILIES = ("cpu", "cuda")


class Driver:
    """Asks torch, which asks the CUDA driver."""

    def cuda_build(self) -> str:
        """CUDA that torch was built for; empty for a CPU build."""
        return torch.version.cuda or ""

    def devices(self) -> int:
        """CUDA devices that can be used now."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def version(self) -> int:
        """CUDA that the driver knows, as 1000 major + 10 minor; 0 where there is no driver."""
        try:
            driver, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
            driver.cuDriverGetVersion(ctypes.byref(found))
        except (OSError, AttributeError):  # no driver, or no library of one
            return 0
        return found.value

    def capability(self, index: int) -> tuple[int, int]:
        """Compute capability of a device."""
        return torch.cuda.get_device_capability(index)

    def name(self, index: int) -> str:
        """Name of a device."""
        return torch.cuda.get_device_name(index)


DRIVER = Driver()


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a compiled package depends on.

    Attributes:
        device: cpu or cuda.
        torch: Version: the package links against its libraries.
        machine: Processor architecture.
        features: Vector instructions of the processor, where code for it is in the package.
        capability: Compute capability of the GPU, such as 9.0; empty on a CPU.
        driver: CUDA that the driver knows, such as 13.0; empty on a CPU.
    """

    device: str
    torch: str
    machine: str
    features: str = ""
    capability: str = ""
    driver: str = ""


def family(device: str) -> str:
    """Cpu or cuda.

    Raises:
        ConfigError: Another device.
    """
    found, _, index = device.partition(":")
    if found not in _FAMILIES or (index and not index.isdecimal()) or (found == "cpu" and index):
        raise ConfigError(
            f"inductor: device {device!r}, wanted cpu, cuda or cuda:N; use another backend for that "
            "device"
        )
    return found


def index_of(device: str) -> int:
    """Number of a CUDA device; the first one where none is given."""
    return int(device.partition(":")[2] or 0)


def problem(device: str, driver: Driver = DRIVER) -> tuple[str, str]:
    """Why a device can't be used, and what to do; two empty texts where it can."""
    if family(device) == "cpu":
        return "", ""
    build = driver.cuda_build()
    if not build:
        return (
            f"torch {torch.__version__} is a CPU build",
            "install a CUDA build of torch, or use device=cpu",
        )
    count = driver.devices()
    if count == 0:
        version = driver.version()
        if version == 0:
            return (
                f"torch is built for CUDA {build}, but there is no CUDA driver",
                "install NVIDIA's driver, or use device=cpu",
            )
        if _number(build) > version:
            return (
                f"the driver knows CUDA {_text(version)}, torch is built for CUDA {build}",
                "update NVIDIA's driver, or install a torch for that CUDA",
            )
        return (
            f"CUDA {_text(version)} is there, but no usable device",
            "see nvidia-smi and CUDA_VISIBLE_DEVICES, or use device=cpu",
        )
    if index_of(device) >= count:
        return (
            f"found {count} CUDA device(s), wanted number {index_of(device)}",
            f"use cuda:0 to cuda:{count - 1}",
        )
    return "", ""


def check_device(device: str, driver: Driver = DRIVER) -> None:
    """Refuse a device that can't be used.

    Raises:
        ConfigError: No such kind of device.
        BackendError: Not on this machine.
    """
    reason, remedy = problem(device, driver)
    if reason:
        raise BackendError(f"inductor: device {device}: {reason}; {remedy}")


def read_host(device: str, driver: Driver = DRIVER) -> Host:
    """What packages built here depend on."""
    kind, version = family(device), str(torch.__version__)
    if kind == "cpu":
        features = torch.backends.cpu.get_cpu_capability()
        return Host(device=kind, torch=version, machine=platform.machine(), features=features)
    major, minor = driver.capability(index_of(device))
    return Host(
        device=kind,
        torch=version,
        machine=platform.machine(),
        capability=f"{major}.{minor}",
        driver=_text(driver.version()),
    )


def mismatch(found: Host, wanted: Host) -> str:
    """Why a package that wants one host does not run on another; empty where it does.

    A newer driver runs what was built under an older one; everything else has to be the same.
    """
    differing = [
        f"{name} {getattr(found, name) or 'none'}, wanted {getattr(wanted, name) or 'none'}"
        for name in ("device", "torch", "machine", "features", "capability")
        if getattr(found, name) != getattr(wanted, name)
    ]
    if not differing and wanted.driver and _number(found.driver) < _number(wanted.driver):
        differing = [f"driver for CUDA {found.driver}, wanted at least {wanted.driver}"]
    return "; ".join(f"found {text}" for text in differing)


def facts(device: str, driver: Driver = DRIVER) -> Mapping[str, Any]:
    """What a report says of the device."""
    if family(device) == "cpu" or problem(device, driver)[0]:
        return {}
    host = read_host(device, driver)
    return {
        "name": driver.name(index_of(device)),
        "capability": host.capability,
        "driver": host.driver,
        "cuda": driver.cuda_build(),
    }


def _number(version: str) -> int:
    """1000 major + 10 minor, as the driver counts."""
    major, _, minor = version.partition(".")
    return 1000 * int(major or 0) + 10 * int(minor.partition(".")[0] or 0)


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
