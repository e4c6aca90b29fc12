"""What has run, on its way into the store: a batch at a time, in this process or in one of its own.

A store's writer has much to do in Python where states are narrow. Beside a model on the CPU, whose every operation
asks for the interpreter, that costs a third of its speed; in a process of its own it costs nothing but a copy.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol, Self

import numpy as np

import store
from extract.processes import follow_parent, loader_context
from extract.sequence import Prepared
from store.errors import Refusal

PATIENCE = 3.0
"""Seconds for a worker of the same name that was killed a moment ago to be gone."""


@dataclass
class Ran:
    """A batch that has run; its arrays come beside it."""

    block: int
    last: bool
    """Whether it is the block's last."""
    aside: dict[int, str]
    samples: list[int] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    counts: np.ndarray | None = None
    """Kept tokens of each sample and kind, ``[b, kind]``."""


class Writing(Protocol):
    """Somebody who writes what has run."""

    def blocks(self) -> Iterator[int]:
        """Blocks to do, as `store.Writer.blocks` gives them; for one thread."""

    def take(self, ran: Ran, arrays: Mapping[str, np.ndarray], release: Callable[[], None]) -> None:
        """Write a batch, block after block in turn; ``release`` is called when the arrays are no longer needed."""

    def finish(self) -> Counter:
        """Wait until all is committed: seconds that each of the writer's stages was busy."""

    def close(self) -> None:
        """Let go of everything; what is not committed is dropped."""


@dataclass(frozen=True)
class Job:
    """What is to be written."""

    path: Any
    worker: str
    part: int
    own: range | None = None
    alone: bool = False


class Here:
    """The writer in this process."""

    def __init__(self, job: Job):
        self.job, self.writer = job, open_writer(job)
        self._block: Any = None
        self._n_query = self.writer.plan.samples["n_query"].to_list()
        self._busy: Counter = Counter()

    def blocks(self) -> Iterator[int]:
        """See `Writing`."""
        return self.writer.blocks(self.job.own, self.job.alone)

    def take(self, ran: Ran, arrays: Mapping[str, np.ndarray], release: Callable[[], None]) -> None:
        """See `Writing`."""
        began = time.perf_counter()
        if self._block is None:
            self._block = self.writer.block(ran.block).__enter__()
        for sample, reason in ran.aside.items():
            self._block.set_aside(sample, reason)
        done, end = Countdown(len(ran.samples), release), 0
        for number, (sample, one) in enumerate(zip(ran.samples, ran.prepared, strict=True)):
            start, end = end, end + int(ran.counts[number].sum())
            given = kept_arrays(arrays, number, start, ran.counts[number], self._n_query[sample], one, self.writer.plan)
            if not self.writer.plan.part:
                given |= {"tokens": one.tokens, "values": ran.values[number]}
            self._block.add(sample, **given, done=done)
        if ran.last:
            self._block, whole = None, self._block
            whole.__exit__(None, None, None)
        self._busy["hand over"] += time.perf_counter() - began

    def finish(self) -> Counter:
        """See `Writing`."""
        self.writer.flush()
        return self._busy + self.writer.busy

    def close(self) -> None:
        """See `Writing`."""
        if self._block is not None:
            self._block, half = None, self._block
            half.__exit__(RuntimeError, None, None)
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Elsewhere:
    """The writer in a process of its own, which ends with this one."""

    def __init__(self, job: Job):
        context = loader_context()
        (self._data, data), (self._claims, claims) = context.Pipe(), context.Pipe()
        self._process = context.Process(target=_serve, args=(job, data, claims, dict(os.environ)), daemon=True)
        self._process.start()
        data.close()
        claims.close()
        self._owed = 1  # answers that are to come; the first says that it is there
        self._answer()

    def blocks(self) -> Iterator[int]:
        """See `Writing`."""
        while True:
            try:
                self._claims.send(None)
                answer = self._claims.recv()
            except (EOFError, OSError):
                return  # whoever hands over next is told why
            if isinstance(answer, BaseException):
                raise answer
            if answer is None:
                return
            yield answer

    def take(self, ran: Ran, arrays: Mapping[str, np.ndarray], release: Callable[[], None]) -> None:
        """See `Writing`."""
        # One batch may be on its way while the one before is handed over there.
        while self._owed > 1:
            self._answer()
        arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        described = {name: (values.shape, values.dtype.str) for name, values in arrays.items()}
        try:
            self._data.send((ran, described))
            for values in arrays.values():
                _send(self._data.fileno(), values)
        except OSError:
            # It has left; if it could still say why, that is what is raised.
            while True:
                self._answer()
        self._owed += 1
        release()

    def finish(self) -> Counter:
        """See `Writing`."""
        while self._owed:
            self._answer()
        with _Loss():
            self._data.send(None)
        self._owed += 1
        return self._answer()

    def close(self) -> None:
        """See `Writing`."""
        self._data.close()
        self._claims.close()
        self._process.join()

    def _answer(self) -> Any:
        self._owed -= 1
        with _Loss():
            answer = self._data.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Loss:
    """Says what a broken connection means."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (EOFError, OSError)):
            raise Refusal(
                "the writing process died, most likely for want of memory: what was committed is kept, the same "
                "command goes on from there"
            ) from None


def _serve(job: Job, data: Connection, claims: Connection, environment: dict[str, str]) -> None:
    """The writing process; the server that forks it knows the environment of before (an object store's keys …)."""
    os.environ.update(environment)
    follow_parent()
    try:
        here = Here(job)
    except BaseException as failure:
        data.send(failure)
        return
    with here:
        data.send(None)
        threading.Thread(target=_claim, args=(here, claims), daemon=True).start()
        try:
            while message := data.recv():
                ran, described = message
                arrays = {name: _receive(data.fileno(), *one) for name, one in described.items()}
                here.take(ran, arrays, lambda: None)
                data.send(None)
            data.send(here.finish())
        except EOFError:
            return
        except BaseException as failure:
            data.send(failure)


def _claim(here: Here, claims: Connection) -> None:
    """Give out blocks as they are asked for."""
    blocks = here.blocks()
    try:
        while True:
            claims.recv()
            try:
                claims.send(next(blocks, None))
            except Refusal as failure:
                claims.send(failure)
    except (EOFError, OSError):
        return


def _send(descriptor: int, values: np.ndarray) -> None:
    view = memoryview(values).cast("B") if values.size else b""
    while view:
        view = view[os.write(descriptor, view) :]


def _receive(descriptor: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.empty(shape, dtype)
    view = memoryview(values).cast("B") if values.size else b""
    while view:
        got = os.readv(descriptor, [view])
        if not got:
            raise EOFError
        view = view[got:]
    return values


def open_writer(job: Job) -> store.Writer:
    """The store's writer; one of this name that was killed a moment ago is waited for."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return store.Writer(job.path, job.worker, job.part)
        except store.Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class Countdown:
    """Calls ``then`` at its ``n``-th call, or now if there is none to wait for."""

    def __init__(self, n: int, then: Callable[[], None]):
        self._left, self._then, self._lock = n, then, threading.Lock()
        if not n:
            then()

    def __call__(self) -> None:
        """Count one."""
        with self._lock:
            self._left -= 1
            ended = not self._left
        if ended:
            self._then()


def kept_arrays(
    arrays: Mapping[str, np.ndarray],
    number: int,
    start: int,
    counts: np.ndarray,
    n_query: int,
    one: Prepared,
    plan: store.Plan,
) -> dict[str, Any]:
    """What is kept of a batch's sample, whose kept tokens begin at ``start``, as `store.Writer`'s ``add`` takes it."""
    kept = {}
    if "hidden" in arrays:
        for kind, count in zip(plan.kinds, counts.tolist(), strict=True):
            kept[kind] = arrays["hidden"][:, start : start + count]
            start += count
    if "rows" in arrays:
        # A batch is padded on the right, so a sample's positions are the batch's.
        own = arrays["rows"][number][..., :n_query, : len(one.ids)]
        masks = {"image": one.image.numpy(), "text": one.text.numpy()}
        kept |= {name: own[..., masks[name.removeprefix("text_to_")]] for name in plan.attention}
    return kept
