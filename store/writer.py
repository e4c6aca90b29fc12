"""Filling a store block by block: shards and tables first, each whole and durable, then the block's commit.

Who adds does not wait: states are checked, encoded, written and synced behind the caller's back, in order, by a
pipeline of bounded memory that hands errors back at the next call.
"""

import contextlib
import io
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl

from store import bits, commits
from store.commits import Commit
from store.errors import Refusal
from store.layout import ensure_layout, load_parts, table_file
from store.places import Place, locate
from store.plan import ArrayPlan, Plan
from store.shards import EncodedUnit, ShardFile, codec_of, encode_unit
from store.tokens import TOKEN_SCHEMA, check, conform

MEMORY = 512 * 2**20
"""Bytes of states that may wait to be written."""

ENCODING = 2
"""Threads that check and encode: more of them take the caches from each other and from whoever computes the states."""

SYNCING = 4
"""Files that are made durable at a time: a disk syncs several as fast as one."""

WAIT_SECONDS = 0.5
"""How often a worker that has nothing left looks whether others have finished, or died."""


class BadStates(ValueError):  # noqa: N818 - the states are what is wrong, by name
    """States or attention that no model should give: not finite, or a token whose state is zero throughout."""


class Writer:
    """One worker's hand on a store; several processes may fill one store at a time, each under a name of its own.

    Parameters
    ----------
    path
        A store that ``create`` or ``grow`` made.
    worker
        Name of this worker's commit log.
    part
        The part that is filled: 0 as created, others are layers that were added.
    threads
        Threads that check and encode.
    memory
        Bytes of states that may wait; ``Block.add`` blocks while there are more. The peak is about twice this (what
        was given, and what it was encoded to).

    Raises
    ------
    Refusal
        When a writer of that name is at work.

    Attributes
    ----------
    busy
        Seconds of work of each stage behind ``add`` (encode, write, sync, commit), of all its threads together.

    Notes
    -----
    An error of the disk or of the states (``Refusal``, ``BadStates``) is raised by the next call after it, by
    ``flush`` or by leaving ``with`` at the latest. What was committed before it stays.

    Examples
    --------
    >>> with Writer(path, worker="0") as writer:  # doctest: +SKIP
    ...     for b in writer.blocks():
    ...         with writer.block(b) as block:
    ...             for sample in writer.plan.block(b):
    ...                 block.add(sample, image=…, text=…, tokens=…, values={"vlm_x1": 3.0})
    """

    def __init__(
        self,
        path: str | os.PathLike | Place,
        worker: str = "0",
        part: int = 0,
        threads: int = ENCODING,
        memory: int = MEMORY,
    ):
        self.place = locate(path).of(worker)
        parts = load_parts(self.place, laid_out=False)
        if part not in range(len(parts)):
            raise Refusal(f"{self.place} has no part {part}: it has {len(parts)}; `store.grow` adds them")
        self.plan: Plan = parts[part]
        self.log = self.place.log(commits.log_file(worker))
        try:
            # What a killed writer of this name left half written; the lock says that nobody else is writing it.
            self.place.remove_partial()
            ensure_layout(self.place, parts)
        except BaseException:
            self.log.close()
            raise
        self.codecs = {name: codec_of(array) for name, array in self.plan.arrays.items()}
        self._claims: dict[int, Any] = {}
        self._begun: set[int] = set()
        self._further: dict[str, dict[str, pl.DataType]] = {}
        self._failure: BaseException | None = None
        self.busy: Counter[str] = Counter()
        self._memory, self._waiting, self._room = memory, 0, threading.Condition()
        self._encoding = ThreadPoolExecutor(threads, "encode")
        self._writing = ThreadPoolExecutor(1, "write")
        self._syncing = ThreadPoolExecutor(SYNCING, "sync")
        self._committing = ThreadPoolExecutor(1, "commit")

    def blocks(self, own: range | None = None, alone: bool = False) -> Iterator[int]:
        """Blocks to do, one at a time, each held by this worker until it is committed.

        First those of ``own`` (all, if not given). Then, unless ``alone``, what others have not come to, from the end.
        Blocks that live workers hold are waited for, and those of a worker that died are taken up. So when this ends,
        the whole part is committed (``own``, if ``alone``). On an object store nobody can hold a block: there every
        worker keeps to its own.
        """
        stopped = threading.Event()
        while left := self._left(own, alone or not self.place.holds):
            taken = False
            for b in left:
                if self.claim(b):
                    taken = True
                    yield b
            if not taken:
                stopped.wait(WAIT_SECONDS)
        self.flush()

    def _left(self, own: range | None, alone: bool) -> list[int]:
        """Blocks without a commit that this worker does not hold, in the order in which it wants them."""
        left = [b for b in self._pending() if b not in self._claims]
        if own is None:
            return left
        return [b for b in left if b in own] + [b for b in reversed(left) if b not in own and not alone]

    def claim(self, b: int) -> bool:
        """Hold block ``b`` until it is committed or given up; False if it is committed or another worker's."""
        self._raise_failure()
        if b in self._claims:
            return True
        claim = self.place.claim(f"{self.plan.part}-{b}")
        if claim is None:
            return False
        # Whoever held it before may have committed it just now.
        if b not in self._pending():
            claim.close()
            return False
        self._claims[b] = claim
        return True

    def block(self, b: int) -> "Block":
        """Block ``b``, to be filled within ``with``; an error that leaves ``with`` leaves no trace of it.

        It is committed some time after ``with`` was left; ``flush`` waits for that.

        Raises
        ------
        Refusal
            When the block is committed already, for readers may be at it, or another worker holds it.
        """
        if b in self._begun or not self.claim(b):
            raise Refusal(
                f"block {b} of {self.place} is committed, or being written: `Writer.blocks` gives those that are left"
            )
        self._begun.add(b)
        return Block(self, b)

    def flush(self) -> None:
        """Wait until every block that was left is committed; raises what went wrong."""
        for stage in (self._writing, self._committing):
            stage.submit(lambda: None).result()
        self._raise_failure()

    def close(self) -> None:
        """Let go of the log and of everything half written."""
        for stage in (self._encoding, self._writing, self._syncing, self._committing):
            stage.shutdown(cancel_futures=True)
        for b in list(self._claims):
            self._claims.pop(b).close()
        self.place.remove_partial()
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _pending(self) -> list[int]:
        committed = commits.read(self.place).of_part(self.plan.part)
        return [b for b in range(self.plan.n_blocks) if b not in committed]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _behind(self, stage: ThreadPoolExecutor, work: Any, *given: Any) -> Future:
        """Run ``work`` in a stage, unless something failed before; its failure is kept for the caller."""

        def guarded() -> Any:
            if self._failure is not None:
                return None
            began = time.perf_counter()
            try:
                return work(*given)
            except BaseException as failure:
                self._failure = self._failure or failure
                with self._room:
                    self._room.notify_all()
                return None
            finally:
                with self._room:
                    self.busy[stage._thread_name_prefix] += time.perf_counter() - began

        return stage.submit(guarded)

    def _wait(self, future: Future, stage: str) -> Any:
        """The result of an earlier stage; waiting for it is no work of this one."""
        began = time.perf_counter()
        result = future.result()
        with self._room:
            self.busy[stage] -= time.perf_counter() - began
        return result

    def _reserve(self, size: int) -> None:
        with self._room:
            # One sample is always let in, however large.
            self._room.wait_for(lambda: not self._waiting or self._waiting + size <= self._memory or self._failure)
            self._waiting += size
        self._raise_failure()

    def _release(self, size: int) -> None:
        with self._room:
            self._waiting -= size
            self._room.notify_all()


class Block:
    """A block in the making; made by ``Writer.block``."""

    def __init__(self, writer: Writer, b: int):
        self.writer, self.plan, self.number = writer, writer.plan, b
        self.samples = self.plan.block(b)
        self._ids = self.plan.samples["sample_id"]
        self._counts = {name: self.plan.counts(name) for name in self.plan.arrays}
        self._extents = {name: [self.plan.extent(name, sample) for sample in self.samples] for name in self.plan.arrays}
        self._shards: dict[str, ShardFile] = {}
        self._left = {
            name: np.bincount([int(self.plan.rows[sample]) // array.shard[0] for sample in self.samples])
            for name, array in self.plan.arrays.items()
        }
        self._tokens: dict[int, pl.DataFrame] = {}
        self._values: dict[int, Mapping[str, Any]] = {}
        self._set_aside: dict[int, str] = {}
        self._finished: dict[str, Future] = {}

    def add(
        self,
        sample: int,
        *,
        tokens: pl.DataFrame | None = None,
        image: np.ndarray | None = None,
        text: np.ndarray | None = None,
        text_to_image: np.ndarray | None = None,
        text_to_text: np.ndarray | None = None,
        values: Mapping[str, Any] | None = None,
        done: Callable[[], None] | None = None,
    ) -> None:
        """Add one sample. The arrays are the writer's: do not change them before ``done`` is called.

        Parameters
        ----------
        sample
            Its row in the plan's samples table.
        image, text
            Hidden states ``[l, n_image, d]`` and ``[l, n_text, d]``: bfloat16 bits as uint16, or float32, as planned.
            Each needed if and only if its kind is planned.
        tokens
            Its token table, see ``store.tokens``; needs ``position`` and ``kind``. For the part that was created;
            layers that were added have the same tokens and bring none.
        text_to_image, text_to_text
            Attention ``[l, q, n_image]`` and ``[l, q, n_text]`` (``[l, h, q, …]`` if heads are kept), any float;
            kept as float16. Needed if and only if planned.
        values
            Results of this sample: more columns of the samples table. Not for added layers.
        done
            Called, from another thread, when the arrays are no longer needed; not if anything fails.

        Raises
        ------
        BadStates
            When values of this or an earlier sample are not finite or a state is zero throughout; names the sample
            and the layer.
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
        arrays = {}
        for name, values_lr in given.items():
            kind, variable = name.split("/")
            name = f"{self.plan.group(kind)}/{variable}"
            if (values_lr is not None) != (name in self.plan.arrays):
                raise ValueError(f"{name} is {'not planned' if values_lr is not None else 'planned'}: sample {sample}")
            if values_lr is not None:
                self._check_shape(self.plan.arrays[name], sample, values_lr)
                arrays[name] = values_lr
        if self.plan.part == 0:
            if tokens is None:
                raise ValueError(f"sample {sample} has no token table")
            check(tokens, sample, *(int(self.plan.samples[column][sample]) for column in ("n_image", "n_text")))
            further = {name: dtype for name, dtype in tokens.schema.items() if name not in TOKEN_SCHEMA}
            if further != self.writer._further.setdefault("tokens", further):
                raise ValueError(
                    f"the token table of sample {sample} has the further columns {further}, and those before it had "
                    f"{self.writer._further['tokens']}: all are read as one table"
                )
            self._tokens[sample] = tokens
        elif tokens is not None or values:
            raise ValueError(f"sample {sample}: added layers have the tokens and results of part 0, give none")
        size = sum(values_lr.nbytes for values_lr in arrays.values())
        self.writer._reserve(size)
        self._values[sample] = {n: v.item() if isinstance(v, np.generic) else v for n, v in (values or {}).items()}
        encoding = {}
        for name, values_lr in arrays.items():
            array = self.plan.arrays[name]
            extents = values_lr.shape[1:]
            encoding[name] = [
                (cell, self._encode(array, sample, values_lr[(slice(None), *place)]))
                for cell, place in array.units(extents)
            ]
        self.writer._behind(self.writer._writing, self._write, sample, encoding, size, done)

    def set_aside(self, sample: int, reason: str) -> None:
        """Say that a sample cannot be had and why: it reads as NaN, and ``valid`` is False."""
        self._claim(sample)
        # What a library says of a broken name may be no Unicode, and could not be kept.
        self._set_aside[sample] = reason.encode(errors="replace").decode()
        self.writer._behind(self.writer._writing, self._write, sample, {}, 0, None)

    def _claim(self, sample: int) -> None:
        self.writer._raise_failure()
        if sample not in self.samples:
            raise ValueError(f"sample {sample} is not of block {self.number}, which has {self.samples}")
        if sample in self._values or sample in self._set_aside:
            raise ValueError(f"sample {sample} was added before")

    def _check_shape(self, array: ArrayPlan, sample: int, values_lr: np.ndarray) -> None:
        expected = (len(array.layers), *self._extents[array.name][sample - self.samples.start])
        if values_lr.shape != expected:
            named = f"(layer, {', '.join(array.dims[2:])})"
            raise ValueError(f"{array.name} of sample {sample} is {values_lr.shape}, planned {named} = {expected}")
        if array.name.startswith("hidden") and values_lr.dtype != array.dtype:
            raise ValueError(f"{array.name} of sample {sample} is {values_lr.dtype}, planned {array.dtype}")

    def _encode(self, array: ArrayPlan, sample: int, values_lr: np.ndarray) -> Future:
        def work() -> EncodedUnit:
            stored = values_lr.astype(np.float16, copy=False) if array.bits == "float16" else values_lr
            self._check_values(array, sample, stored)
            return encode_unit(array, self.writer.codecs[array.name], stored)

        return self.writer._behind(self.writer._encoding, work)

    def _check_values(self, array: ArrayPlan, sample: int, values_lr: np.ndarray) -> None:
        hidden = array.name.startswith("hidden")
        if bits.is_finite(values_lr) and not (hidden and bits.has_zero_row(values_lr)):
            return
        for layer, values_r in zip(array.layers, values_lr, strict=True):
            for wrong, found in (
                ("not finite", not bits.is_finite(values_r)),
                ("zero throughout for some token", hidden and bits.has_zero_row(values_r)),
            ):
                if found:
                    raise BadStates(f"{array.name} of sample {self._ids[sample]!r} at layer {layer!r} is {wrong}")

    def _write(
        self,
        sample: int,
        encoding: Mapping[str, list[tuple[tuple[int, ...], Future]]],
        size: int,
        done: Callable[[], None] | None,
    ) -> None:
        """Append a sample to its shards, and finish the shards of which it was the last."""
        row = int(self.plan.rows[sample])
        for name, cells in encoding.items():
            array = self.plan.arrays[name]
            for cell, future in cells:
                if (unit := self.writer._wait(future, "write")) is None:  # its failure is the writer's
                    return
                self._shard(array, row, cell).put(row % array.shard[0], unit)
        self.writer._release(size)
        if done:
            done()
        for name, array in self.plan.arrays.items():
            shard = row // array.shard[0]
            self._left[name][shard] -= 1
            if not self._left[name][shard]:
                prefix = f"{name}/c/{shard}/"
                for path in [path for path in self._shards if path.startswith(prefix)]:
                    self._finished[path] = self.writer._behind(
                        self.writer._syncing, self._finish, self._shards.pop(path)
                    )

    def _finish(self, shard: ShardFile) -> tuple[int, str]:
        # Where a log cannot be locked, somebody else may have taken this worker's name.
        self.writer.log.check()
        return shard.commit()

    def _shard(self, array: ArrayPlan, row: int, cell: tuple[int, ...]) -> ShardFile:
        name = array.shard_file(row // array.shard[0], cell)
        if name not in self._shards:
            self._shards[name] = ShardFile(array, self.writer.place.open_whole(name))
        return self._shards[name]

    def _table(self, kind: str, table: pl.DataFrame) -> None:
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        name = table_file(kind, self.number)
        work = self.writer.place.write_whole, name, [buffer.getvalue()]
        self._finished[name] = self.writer._behind(self.writer._syncing, *work)

    def _commit(self) -> None:
        if self._tokens:
            self._table("tokens", conform({n: self._tokens[n] for n in sorted(self._tokens)}))
            rows = [{"sample": n, **self._values[n]} for n in sorted(self._values)]
            self._table("results", pl.DataFrame(rows, infer_schema_length=None))
        files = {name: self.writer._wait(future, "commit") for name, future in sorted(self._finished.items())}
        if self.writer._failure is not None:
            return
        aside = {n: self._set_aside[n] for n in sorted(self._set_aside)}
        self.writer.log.append(Commit(self.number, files, aside, self.plan.part).line())
        if claim := self.writer._claims.pop(self.number, None):
            claim.close()

    def _discard(self) -> None:
        for shard in self._shards.values():
            with contextlib.suppress(Exception):
                shard.file.discard()
        self.writer._begun.discard(self.number)
        if claim := self.writer._claims.pop(self.number, None):
            claim.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        writer = self.writer
        missing = [n for n in self.samples if n not in self._values and n not in self._set_aside]
        if kind is not None or missing:
            writer._writing.submit(self._discard).result()
            if kind is None:
                writer._raise_failure()
                raise ValueError(
                    f"block {self.number} cannot be committed: samples {missing} were neither added nor set aside"
                )
            return
        writer._raise_failure()
        # By way of the writing stage, so that it comes after the block's last sample.
        writer._writing.submit(lambda: writer._behind(writer._committing, self._commit))
