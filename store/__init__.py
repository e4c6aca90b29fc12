"""The store: hidden states and attention rows of a vision-language model, on disk, for offline analysis.

A store is a folder, or a prefix of an object store (``s3://…``). It is laid out once, at full size, before the
first pass; filled block by block by any number of workers; read, lazily or by training batches, while or after that;
and grown later by samples, layers and derived arrays. It is one Zarr v3 hierarchy, so stock zarr, xarray and others
read it too; FORMAT.md is the law of its bytes.

The life of a store
-------------------
>>> import store                                                       # doctest: +SKIP
>>> plan = store.Plan(layers=("embed", "0", "final"), width=3584,
...                   samples=samples, identity=identity)              # what will be, before any work
>>> store.check_space(path, sum(plan.bytes_estimate().values()))       # refuses now, not at 90 %
>>> store.create(path, plan)                                           # or goes on with the same plan
>>> with store.Writer(path, worker="0") as writer:
...     for b in writer.blocks():
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

>>> s.batches("final", layout="ragged").state_dict()                   # goes on in mid-epoch

Growing
-------
>>> store.grow(path, larger_plan)           # samples and layers it lacks    # doctest: +SKIP
>>> with store.derive(path, "mass", ("sample", "layer"), (n, 28)) as out: out.write(mass_sl)
>>> store.copy(path, target, layers=["final"], codec="planes")
>>> store.drop(path, "attention/text_to_text")

Three promises: a file has its name only when it is whole; a block counts only when its commit record, written
last, is whole; what is missing reads as NaN, null or a refusal, never as zeros.

Where to look
-------------
``plan``          what is known before the first pass, and the arrays that follow from it
``layout``        ``create`` and ``grow``: metadata and tables at the start, the check that a store is the one asked for
``writer``        ``Writer`` → ``block`` → ``add``, and the pipeline behind it
``commits``       the log of finished blocks, ``pending``
``codecs``        how a chunk is compressed; ``zarr_codecs`` teaches zarr-python those that are our own
``shards``        one shard file: writing it, reading it by position
``reader``        ``open`` → ``Store``; ``batches`` has its training side (torch)
``growth``        ``derive``, ``drop``, ``copy``
``tokens``        columns of the token table
``verification``  ``verify``; ``repair`` makes damaged blocks pending again; ``inspection`` has ``inspect``, ``du``
``places``        every touch of a disk or an object store; ``sealing`` JSON that carries its checksum
``bits``          bfloat16 as uint16; ``errors`` Refusal

This package knows nothing of models: names of layers and kinds of tokens are given to it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from store.batches import Batch, Batches, RaggedBatch
    from store.commits import pending
    from store.errors import Busy, Refusal
    from store.growth import copy, derive, drop
    from store.inspection import disk_usage
    from store.layout import create, grow, load_parts, load_plan
    from store.places import check_space, locate
    from store.plan import Plan
    from store.reader import Store
    from store.reader import open_store as open
    from store.runs import note
    from store.verification import Report, verify
    from store.writer import BadStates, Writer

_HOMES = {
    "Batch": "batches",
    "Batches": "batches",
    "RaggedBatch": "batches",
    "pending": "commits",
    "Busy": "errors",
    "Refusal": "errors",
    "copy": "growth",
    "derive": "growth",
    "drop": "growth",
    "disk_usage": "inspection",
    "create": "layout",
    "grow": "layout",
    "load_parts": "layout",
    "load_plan": "layout",
    "check_space": "places",
    "locate": "places",
    "note": "runs",
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
    "Batches",
    "Busy",
    "Plan",
    "RaggedBatch",
    "Refusal",
    "Report",
    "Store",
    "Writer",
    "check_space",
    "copy",
    "create",
    "derive",
    "disk_usage",
    "drop",
    "grow",
    "load_parts",
    "load_plan",
    "locate",
    "note",
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
