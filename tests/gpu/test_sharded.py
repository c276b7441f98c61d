"""Two GPUs under ``fully_shard``: what two processes on CPUs do in ``tests/e2e/test_sharded``, by NCCL."""

from pathlib import Path

import pytest
import torch

from tests.e2e.test_sharded import check_a_cut
from tests.ranks import start_ranks, wait_for

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", autouse=True)
def _cards() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


@pytest.mark.parametrize("algorithm", ["regrow", "ramp"])
def test_two_gpus_cut_a_sharded_model(tmp_path: Path, algorithm: str) -> None:
    program = "tests.e2e.sharded_program"
    ended = wait_for(start_ranks(2, "-m", program, "--cuda", str(tmp_path), algorithm), 300)
    assert [e.code for e in ended] == [0, 0], [e.errors for e in ended]
    check_a_cut(tmp_path, algorithm)
