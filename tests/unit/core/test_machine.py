import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from tersor.core import machine
from tersor.core.jsonable import from_json, to_json
from tersor.core.machine import Machine, describe_machine, usable_cores

ONE = Machine(
    processor="p",
    architecture="x86_64",
    features=("avx2",),
    cores=2,
    memory_bytes=1,
    system="Linux 6",
    python="3.12",
)


@pytest.mark.parametrize(
    "change", [{"processor": "q"}, {"features": ()}, {"cores": 4}, {"architecture": "arm64"}]
)
def test_what_changes_speed_changes_the_fingerprint(change: Any):
    assert dataclasses.replace(ONE, **change).fingerprint() != ONE.fingerprint()


@pytest.mark.parametrize("change", [{"system": "Linux 7"}, {"python": "3.11"}])
def test_what_does_not_keeps_it(change: Any):
    assert dataclasses.replace(ONE, **change).fingerprint() == ONE.fingerprint()
    assert len(ONE.fingerprint()) == 16


def test_describes_this_machine():
    found = describe_machine()
    assert found.cores == usable_cores() == len(os.sched_getaffinity(0))
    assert found.memory_bytes > 2**20
    assert found.processor
    assert from_json(Machine, to_json(found)) == found
    assert describe_machine().fingerprint() == found.fingerprint()


def test_reads_cpuinfo(monkeypatch: pytest.MonkeyPatch):
    text = "processor : 0\nmodel name\t: Fast 9000\nflags\t\t: fpu avx2 amx_int8 x\n\nprocessor : 1\nflags : avx512f\n"
    monkeypatch.setattr(Path, "read_text", lambda *_a, **_k: text)
    found = describe_machine()
    assert found.processor == "Fast 9000"
    assert found.features == ("avx2", "amx_int8")


def test_without_cpuinfo_the_parts_stay_empty(monkeypatch: pytest.MonkeyPatch):
    def absent(*_args: Any, **_kwargs: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    found = describe_machine()
    assert found.features == ()
    assert found.processor == found.architecture
