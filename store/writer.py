"""Filling a store block by block: shards and tables first, each whole and durable, then the block's commit."""

import contextlib
import io
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl

from store import bits, files
from store.commits import Commit, Log, read
from store.errors import Refusal
from store.layout import load_plan, table_file
from store.plan import ArrayPlan
from store.shards import ShardBuilder
from store.tokens import conform


class BadStates(ValueError):  # noqa: N818 - the states are what is wrong, by name
    """States or attention that no model should give: not finite, or a token whose state is zero throughout."""


class Writer:
    """One worker's hand on a store. Workers on disjoint blocks need no lock.

    Parameters
    ----------
    path
        A store that ``create`` made.
    worker
        Name of this worker's commit log; every worker at work at one time needs its own.
    threads
        Threads that compress.

    Raises
    ------
    Refusal
        When a writer of that name is at work.

    Examples
    --------
    >>> with Writer(path, worker="0") as writer:  # doctest: +SKIP
    ...     for b in store.pending(path):
    ...         with writer.block(b) as block:
    ...             for sample in writer.plan.block(b):
    ...                 block.add(sample, image=…, text=…, tokens=…, values={"vlm_x1": 3.0})
    """

    def __init__(self, path: str | os.PathLike, worker: str = "0", threads: int = 2):
        self.plan = load_plan(path)
        self.folder = files.locate(path)
        self.log = Log(self.folder, worker)
        self.partial = self.folder / files.PARTIAL / worker
        # What a killed writer of this name left half written; the lock says that nobody else is writing it.
        shutil.rmtree(self.partial, ignore_errors=True)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def block(self, b: int) -> "Block":
        """Block ``b``, to be filled within ``with``: committed on leaving, and not at all if an error leaves it.

        Raises
        ------
        Refusal
            When the block is committed already: readers may be at it.
        """
        if b in read(self.folder)[0]:
            raise Refusal(f"block {b} of {self.folder} is committed: `store.pending` lists the blocks that are left")
        return Block(self, b)

    def close(self) -> None:
        """Let go of the log and the temporary folder."""
        self.pool.shutdown()
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # another worker's is in there
            self.partial.parent.rmdir()
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Block:
    """A block in the making; made by ``Writer.block``."""

    def __init__(self, writer: Writer, b: int):
        self.writer, self.plan, self.number = writer, writer.plan, b
        self.samples = self.plan.block(b)
        self._ids = self.plan.samples["sample_id"]
        self._building: dict[tuple[str, int], ShardBuilder] = {}
        self._tokens: dict[int, pl.DataFrame] = {}
        self._values: dict[int, Mapping[str, Any]] = {}
        self._set_aside: dict[int, str] = {}
        self._files: dict[str, tuple[int, str]] = {}

    def add(
        self,
        sample: int,
        *,
        tokens: pl.DataFrame,
        image: np.ndarray | None = None,
        text: np.ndarray | None = None,
        text_to_image: np.ndarray | None = None,
        text_to_text: np.ndarray | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Add one sample. Shards are written as soon as their samples are complete.

        Parameters
        ----------
        sample
            Its row in the plan's samples table.
        image, text
            Hidden states ``[l, n_image, d]`` and ``[l, n_text, d]``: bfloat16 bits as uint16, or float32, as planned.
            Each needed if and only if its kind is planned.
        tokens
            Its token table, see ``store.tokens``; needs ``position`` and ``kind``.
        text_to_image, text_to_text
            Attention ``[l, q, n_image]`` and ``[l, q, n_text]`` (``[l, h, q, …]`` if heads are kept), any float;
            kept as float16. Needed if and only if planned.
        values
            Results of this sample: more columns of the samples table.

        Raises
        ------
        BadStates
            When values are not finite or a state is zero throughout; names the sample and the layer.
        ValueError
            When shape, dtype or token counts are not the planned ones.
        Refusal
            When the disk is full.
        """
        self._claim(sample)
        given = {
            "hidden/image": image,
            "hidden/text": text,
            "attention/text_to_image": text_to_image,
            "attention/text_to_text": text_to_text,
        }
        units = {}
        for name, values_lr in given.items():
            if (values_lr is not None) != (name in self.plan.arrays):
                raise ValueError(f"{name} is {'not planned' if values_lr is not None else 'planned'}: sample {sample}")
            if values_lr is not None:
                units[name] = self._checked(self.plan.arrays[name], sample, values_lr)
        counts = (int(self.plan.samples[column][sample]) for column in ("n_image", "n_text"))
        self._tokens[sample] = conform(tokens, sample, *counts)
        plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in (values or {}).items()}
        self._values[sample] = plain
        for name, values_lr in units.items():
            self._builder(name, sample).put(sample % self.plan.arrays[name].shard[0], values_lr)
        self._write_complete(sample)

    def set_aside(self, sample: int, reason: str) -> None:
        """Say that a sample cannot be had and why: it reads as NaN, and ``valid`` is False."""
        self._claim(sample)
        self._set_aside[sample] = reason
        self._write_complete(sample)

    def _claim(self, sample: int) -> None:
        if sample not in self.samples:
            raise ValueError(f"sample {sample} is not of block {self.number}, which has {self.samples}")
        if sample in self._values or sample in self._set_aside:
            raise ValueError(f"sample {sample} was added before")

    def _checked(self, array: ArrayPlan, sample: int, values_lr: np.ndarray) -> np.ndarray:
        """Values of planned shape, dtype and sanity; attention padded to whole units of float16."""
        counts = {dim: int(extents[sample]) for dim, extents in self.plan.counts(array.name).items()}
        extents = dict(zip(array.dims[2:], array.unit, strict=True)) | counts
        expected = (len(array.layers), *extents.values())
        if values_lr.shape != expected:
            named = f"(layer, {', '.join(array.dims[2:])})"
            raise ValueError(f"{array.name} of sample {sample} is {values_lr.shape}, planned {named} = {expected}")
        hidden = array.name.startswith("hidden/")
        if hidden and values_lr.dtype != array.dtype:
            raise ValueError(f"{array.name} of sample {sample} is {values_lr.dtype}, planned {array.dtype}")
        if not hidden:
            values_lr = values_lr.astype(np.float16)
        for layer, values_r in zip(array.layers, values_lr, strict=True):
            for wrong, found in (
                ("not finite", not bits.is_finite(values_r)),
                ("zero throughout for some token", hidden and bits.has_zero_row(values_r)),
            ):
                if found:
                    raise BadStates(f"{array.name} of sample {self._ids[sample]!r} at layer {layer!r} is {wrong}")
        if hidden:
            return values_lr
        whole = np.full((len(array.layers), *array.unit), array.fill, np.float16)
        whole[tuple(slice(n) for n in expected)] = values_lr
        return whole

    def _builder(self, name: str, sample: int) -> ShardBuilder:
        array = self.plan.arrays[name]
        return self._building.setdefault((name, sample // array.shard[0]), ShardBuilder(array, self.writer.pool))

    def _write_complete(self, sample: int) -> None:
        """Write the shards of which ``sample`` was the last, and forget them: memory stays bounded."""
        for name, array in self.plan.arrays.items():
            shard = sample // array.shard[0]
            members = range(shard * array.shard[0], min((shard + 1) * array.shard[0], self.plan.n_samples))
            complete = all(member in self._values or member in self._set_aside for member in members)
            if complete and (builder := self._building.pop((name, shard), None)):
                self._write(array.shard_file(shard), builder.pieces())

    def _write(self, name: str, pieces: Any) -> None:
        self._files[name] = files.write_whole(self.writer.folder / name, pieces, self.writer.partial)

    def _write_table(self, kind: str, table: pl.DataFrame) -> None:
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        self._write(table_file(kind, self.number), [buffer.getvalue()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        missing = [n for n in self.samples if n not in self._values and n not in self._set_aside]
        if missing:
            raise ValueError(
                f"block {self.number} cannot be committed: samples {missing} were neither added nor set aside"
            )
        if self._tokens:
            self._write_table(
                "tokens", pl.concat([self._tokens[n] for n in sorted(self._tokens)], how="diagonal_relaxed")
            )
            rows = [{"sample": n, **self._values[n]} for n in sorted(self._values)]
            self._write_table("results", pl.DataFrame(rows, infer_schema_length=None))
        aside = {n: self._set_aside[n] for n in sorted(self._set_aside)}
        self.writer.log.append(Commit(self.number, dict(sorted(self._files.items())), aside))
