"""CLUSTER_SPEC, by which Vertex AI tells a container of its fellows -> where their processes meet."""

import json
from dataclasses import dataclass

from dylora_moe.errors import CloudError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """One machine among those of a job.

    Attributes:
        address: Host of the first machine.
        port: Where its processes meet those of the others.
        rank: This machine's number.
        count: How many there are.
    """

    address: str
    port: int
    rank: int
    count: int

    def variables(self) -> dict[str, str]:
        """What torchrun would set for one process on each machine."""
        ranks = {"RANK": str(self.rank), "WORLD_SIZE": str(self.count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port), **ranks}

    def torchrun(self, processes: int) -> list[str]:
        """Arguments of torchrun for several processes on each machine; it sets their variables."""
        return [
            f"--nnodes={self.count}",
            f"--node-rank={self.rank}",
            f"--nproc-per-node={processes}",
            f"--master-addr={self.address}",
            f"--master-port={self.port}",
        ]


def rendezvous(cluster_spec: str | None) -> Rendezvous | None:
    """Where the machines of a job meet; None where there is but one.

    Pools are numbered in their order, `workerpool0` first, which has the one primary machine.

    Raises:
        CloudError: The text has another form.
    """
    if not cluster_spec:
        return None
    try:
        spec = json.loads(cluster_spec)
        cluster, task = spec["cluster"], spec["task"]
        pools = sorted(cluster)
        count = sum(len(cluster[pool]) for pool in pools)
        before = sum(len(cluster[pool]) for pool in pools[: pools.index(task["type"])])
        rank = before + int(task["index"])
        host, _, port = cluster[pools[0]][0].rpartition(":")
        found = Rendezvous(address=host, port=int(port), rank=rank, count=count)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CloudError(
            'CLUSTER_SPEC must be JSON such as {"cluster": {"workerpool0": ["host:2222"]}, "task": {"type": '
            f'"workerpool0", "index": 0}}}}, got {cluster_spec[:200]!r} ({type(error).__name__}).'
        ) from error
    if not 0 <= found.rank < found.count:
        raise CloudError(f"CLUSTER_SPEC must have the task among its machines, got number {rank} of {count}.")
    return None if found.count == 1 else found
