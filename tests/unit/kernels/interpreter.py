"""A program in a process of its own, where Triton interprets kernels: it has to be told before they are defined."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def interpreted(*arguments: str) -> dict[str, Any]:
    """What a program prints as JSON on its last line.

    Args:
        arguments: Of Python: ``-c`` and a text, or ``-m`` and a module.
    """
    run = subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found
