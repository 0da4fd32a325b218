"""CLUSTER_SPEC, as Vertex AI sets it, and the rendezvous that follows from it."""

import json
import os
import socket
import subprocess
import sys

import pytest

from dylora_moe.cloud.workers import Rendezvous, rendezvous
from dylora_moe.errors import CloudError

FIRST = "cmle-training-workerpool0-4c1d6d97d0-0:2222"
OTHERS = [f"cmle-training-workerpool1-4c1d6d97d0-{number}:2222" for number in range(3)]


def spec(pool: str, index: int, **pools: list[str]) -> str:
    """As Vertex AI writes it, with fields that are of no use here."""
    return json.dumps(
        {
            "cluster": pools or {"workerpool0": [FIRST], "workerpool1": OTHERS},
            "environment": "cloud",
            "task": {"type": pool, "index": index},
            "job": '{"python_module":"","package_uris":[],"job_args":[]}',
            "open_ports": [3333],
        }
    )


@pytest.mark.parametrize(
    ("pool", "index", "rank"), [("workerpool0", 0, 0), ("workerpool1", 0, 1), ("workerpool1", 2, 3)]
)
def test_all_machines_meet_at_the_first(pool: str, index: int, rank: int) -> None:
    assert rendezvous(spec(pool, index)) == Rendezvous(
        address="cmle-training-workerpool0-4c1d6d97d0-0", port=2222, rank=rank, count=4
    )


def test_what_torchrun_is_told() -> None:
    meet = rendezvous(spec("workerpool1", 1))
    assert meet is not None and meet.torchrun(8) == [
        "--nnodes=4",
        "--node-rank=2",
        "--nproc-per-node=8",
        "--master-addr=cmle-training-workerpool0-4c1d6d97d0-0",
        "--master-port=2222",
    ]


@pytest.mark.parametrize("text", [None, "", spec("workerpool0", 0, workerpool0=[FIRST])])
def test_one_machine_meets_nobody(text: str | None) -> None:
    assert rendezvous(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        spec("workerpool7", 0),
        spec("workerpool1", 3),
        spec("workerpool0", 0, workerpool0=["host"]),
    ],
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(CloudError, match="CLUSTER_SPEC must"):
        rendezvous(text)


MEET = """
import torch.distributed as dist, torch
dist.init_process_group("gloo")
number = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(number)
print(dist.get_world_size(), number.item())
"""


def test_two_machines_really_meet() -> None:
    """Both on this one, with the variables that follow from what Vertex AI tells each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pools = {"workerpool0": [f"127.0.0.1:{port}"], "workerpool1": ["127.0.0.1:2222"]}
    processes = []
    for pool in pools:
        meet = rendezvous(spec(pool, 0, **pools))
        assert meet is not None
        environment = os.environ | meet.variables()
        processes.append(
            subprocess.Popen([sys.executable, "-c", MEET], env=environment, stdout=subprocess.PIPE, text=True)
        )
    assert [process.communicate(timeout=120)[0] for process in processes] == ["2 3.0\n", "2 3.0\n"]
