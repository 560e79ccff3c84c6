"""The stores of torch through which workers find each other. Torch is imported when one is made, never before."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ferry.verbs.train.crew.spec import Cluster

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


def file_store(path: Path, world_size: int) -> Store:
    """Return a store for one node: a file, so there is no port that could be taken."""
    import torch.distributed as dist

    store: Store = dist.FileStore(str(path), world_size)  # type: ignore[attr-defined]
    return store


def tcp_store(cluster: Cluster, *, is_host: bool, timeout_s: float) -> Store:
    """Return a connection to the store of node 0, which the host starts."""
    import torch.distributed as dist

    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        cluster.address,
        cluster.port,
        is_master=is_host,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )
    return store


def part_of(store: Store, name: str) -> Store:
    """Return a view of a store in which every key starts with the name."""
    from torch.distributed.distributed_c10d import PrefixStore

    return PrefixStore(f"{name}/", store)
