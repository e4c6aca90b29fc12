"""The store: hidden states and attention rows of a vision-language model, on disk, for offline analysis.

A store is a folder. It is laid out once, at full size, before the first pass; filled block by block by any
number of workers; and read, lazily or by training batches, while or after that. It is one Zarr v3 hierarchy, so
stock zarr, xarray and others read it too; FORMAT.md is the law of its bytes.

The life of a store
-------------------
>>> import store                                                       # doctest: +SKIP
>>> plan = store.Plan(layers=("embed", "0", "final"), width=3584,
...                   samples=samples, identity=identity)              # what will be, before any work
>>> store.check_space(path, sum(plan.bytes_estimate().values()))       # refuses now, not at 90 %
>>> store.create(path, plan)                                           # or goes on with the same plan
>>> with store.Writer(path, worker="0") as writer:
...     for b in store.pending(path):
...         with writer.block(b) as block:
...             for sample in plan.block(b):
...                 block.add(sample, image=image_ltd, text=text_ltd, tokens=tokens)
>>> store.verify(path).ok                                              # reads everything
True

Reading
-------
>>> s = store.open(path)                                               # doctest: +SKIP
>>> s.samples, s.tokens                     # polars: one row a sample, one row a token (lazy)
>>> s.hidden.text.sel(layer="final")        # lazy xarray, float32, NaN where nothing is
>>> for batch in s.batches(["0", "final"], tokens="instruction", batch_size=256, shuffle=True, seed=0): ...
>>> states, mask = s.read(range(4096), "final", "text")                # torch, at once

Three promises: a file has its name only when it is whole; a block counts only when its commit record, written
last, is whole; what is missing reads as NaN, null or a refusal, never as zeros.

Where to look
-------------
``plan``          what is known before the first pass, and the arrays that follow from it
``layout``        ``create``: metadata and tables at the start, and the check that a store is the one asked for
``writer``        ``Writer`` → ``block`` → ``add``
``commits``       the log of finished blocks, ``pending``
``shards``        one shard file: building it, reading it by position
``reader``        ``open`` → ``Store``; ``batches`` has its training side (torch)
``tokens``        columns of the token table
``verification``  ``verify``; ``repair`` makes damaged blocks pending again; ``inspection`` has ``inspect``, ``du``
``bits``          bfloat16 as uint16; ``files`` every touch of the disk; ``errors`` Refusal

This package knows nothing of models: names of layers and kinds of tokens are given to it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from store.batches import Batch
    from store.commits import pending
    from store.errors import Refusal
    from store.files import check_space
    from store.inspection import disk_usage
    from store.layout import create, load_plan
    from store.plan import Plan
    from store.reader import Store
    from store.reader import open_store as open
    from store.verification import Report, verify
    from store.writer import BadStates, Writer

_HOMES = {
    "Batch": "batches",
    "pending": "commits",
    "Refusal": "errors",
    "check_space": "files",
    "create": "layout",
    "disk_usage": "inspection",
    "load_plan": "layout",
    "Plan": "plan",
    "Store": "reader",
    "open": "reader",
    "Report": "verification",
    "verify": "verification",
    "BadStates": "writer",
    "Writer": "writer",
}

__all__ = [
    "BadStates",
    "Batch",
    "Plan",
    "Refusal",
    "Report",
    "Store",
    "Writer",
    "check_space",
    "create",
    "disk_usage",
    "load_plan",
    "open",
    "pending",
    "verify",
]


def __getattr__(name: str) -> Any:
    # On demand, so that the --help of every command stays instant.
    if name not in _HOMES:
        raise AttributeError(f"module 'store' has no attribute {name!r}")
    module = importlib.import_module(f"store.{_HOMES[name]}")
    return getattr(module, "open_store" if name == "open" else name)
