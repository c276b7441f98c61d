"""Processes that are the ranks of one job, as torchrun starts them but without its agent.

The agent ends all ranks as soon as one of them ends badly; without it a test sees what the others say.
"""

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from tests.e2e.helpers import ROOT, environment


@dataclass(frozen=True)
class Ended:
    """What one rank left: its exit code (minus a signal), its last line as JSON, its errors."""

    code: int
    said: Any
    errors: str


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start_ranks(world: int, *words: str) -> "list[subprocess.Popen[str]]":
    """``python words`` once for each rank."""
    common = {
        **environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def wait_for(processes: "list[subprocess.Popen[str]]", seconds: float = 400) -> list[Ended]:
    """What each of them left; those that are still there when the time is over are ended."""
    end = time.monotonic() + seconds
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
            lines = out.strip().splitlines()
            said = json.loads(lines[-1]) if lines and lines[-1].startswith(("{", "[")) else None
            found.append(Ended(process.returncode, said, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found
