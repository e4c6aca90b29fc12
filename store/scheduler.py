"""Dask clusters that a command is given by ``--dask``: a client of one, and whether anybody still works there."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from store.errors import Refusal

if TYPE_CHECKING:
    from dask.distributed import Client

ABANDONED = 60.0  # seconds without any worker after which nobody is waited for
PATIENCE = "30s"  # for a scheduler to answer


@contextmanager
def connect(address: str) -> Iterator["Client"]:
    """A client of the scheduler at ``address``; ``local`` and ``local:4`` start one here with workers of their own.

    Raises
    ------
    Refusal
        No scheduler answers there, or it has no workers.
    """
    import dask
    from dask.distributed import Client, LocalCluster

    local = re.fullmatch(r"local(?::(\d+))?", address)
    if not local:
        try:
            client = Client(address, timeout=PATIENCE)
        except (OSError, ValueError, TimeoutError) as failure:
            raise Refusal(f"--dask {address}: no scheduler answers there ({failure}); is it running?") from None
        with client:
            if not count_workers(client):
                raise Refusal(
                    f"--dask {address}: the scheduler has no workers; start some with `dask worker {address}`"
                )
            yield client
        return
    # Workers must be able to start loaders, which a daemon may not.
    with (
        dask.config.set({"distributed.worker.daemon": False}),
        LocalCluster(
            n_workers=int(local[1]) if local[1] else None,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def count_workers(client: "Client") -> int:
    """How many workers a cluster has now."""
    return len(client.scheduler_info(n_workers=-1)["workers"])


class Watch:
    """Looks, whenever it is called, whether a cluster still has workers."""

    def __init__(self, client: "Client", address: str):
        self.client, self.address = client, address
        self._seen = time.monotonic()

    def __call__(self) -> None:
        """Look.

        Raises
        ------
        Refusal
            When there has been no worker for ``ABANDONED`` seconds.
        """
        if count_workers(self.client):
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > ABANDONED:
            raise Refusal(f"--dask {self.address}: its workers are gone; start some and give the same command again")
