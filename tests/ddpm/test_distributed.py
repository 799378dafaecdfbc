"""Ranks end as they should: whatever gloo's threads still hold, no process is left hanging or killed at its end."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from ddpm.distributed import world
from ddpm.errors import BadInput

# Little is computed between the last exchange and the end: gloo's threads still hold tensors when Python ends.
SHARES = """
import torch
from ddpm.distributed import world

with world(torch.device("cpu")) as ranks:
    share = ranks.share(5)
    joined = ranks.gather(torch.arange(share.start, share.stop).float()[:, None].expand(-1, 100_000), 5)
    assert joined[:, 0].tolist() == [0, 1, 2, 3, 4]
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(6))  # half of all processes were killed before groups were freed in time
def test_ranks_that_exchanged_tensors_end_with_exit_code_0(attempt):
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARES],
            env=os.environ | common | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5", ""])
def test_what_torchrun_would_not_set_is_named(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(BadInput, match=r"WORLD_SIZE: got '.*' in the environment, needs an integer >= 1"):
        world(torch.device("cpu")).__enter__()
