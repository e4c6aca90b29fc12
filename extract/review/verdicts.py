"""The file of verdicts: one JSON line each, on the disk before anybody is told; the last one of a sample counts.

A line has ``sample_id``, ``verdict`` (accepted, fixed, rejected; withdrawn takes the last one back), ``box`` (the final
one, ``xyxy`` in pixels of the upright source picture; null if rejected), ``reason`` (of a rejection), ``box_before``
(the one that was shown first), ``reviewer``, ``time`` (UTC) and ``identity_hash`` (of the store that was reviewed).
A last line without its end is one that was never confirmed: it does not count, and the next review cuts it off.
"""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from extract.omniedit import BOX_COLUMNS
from store.errors import Refusal

Box = tuple[float, float, float, float]

ACCEPTED, FIXED, REJECTED = VERDICTS = ("accepted", "fixed", "rejected")
WITHDRAWN = "withdrawn"
BOUND = 1e9  # no picture is as large; a JSON number may be any, even one that no float holds
SCHEMA = {
    "sample_id": pl.String,
    "verdict": pl.String,
    "box": pl.Array(pl.Float64, 4),
    "reason": pl.String,
    "box_before": pl.Array(pl.Float64, 4),
    "reviewer": pl.String,
    "time": pl.Datetime("us", "UTC"),
    "identity_hash": pl.String,
}


@dataclass(frozen=True)
class Verdict:
    """What a person said about one sample; see the module."""

    sample_id: str
    verdict: str
    box: Box | None
    reason: str | None
    box_before: Box | None
    reviewer: str | None
    time: str
    identity_hash: str

    def __post_init__(self):
        """Raise `ValueError` where the fields contradict each other."""
        if self.verdict not in (*VERDICTS, WITHDRAWN):
            raise ValueError(f"verdict {self.verdict!r} is not one of {', '.join((*VERDICTS, WITHDRAWN))}")
        if (self.box is not None) != (self.verdict in (ACCEPTED, FIXED)):
            raise ValueError(f"verdict {self.verdict!r} with box {self.box}")


def box_of(value: Any) -> Box | None:
    """Four finite numbers, x1 < x2 and y1 < y2, as a box; null stays null.

    Raises
    ------
    ValueError
        It is none.
    """
    if value is None:
        return None
    if not (
        isinstance(value, list | tuple)
        and len(value) == 4
        and all(isinstance(one, int | float) and not isinstance(one, bool) and -BOUND < one < BOUND for one in value)
        and value[0] < value[2]
        and value[1] < value[3]
    ):
        raise ValueError(f"box {value!r} is not four numbers with x1 < x2 and y1 < y2")
    x1, y1, x2, y2 = map(float, value)
    return x1, y1, x2, y2


def now() -> str:
    """The present moment, UTC, as it is written."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class VerdictLog:
    """The open file of verdicts of one store; no second one can be open.

    Attributes
    ----------
    last : dict[str, Verdict]
        The verdict that counts, by sample id.
    cut : int
        Bytes of a torn last line that were cut off.

    Raises
    ------
    Refusal
        The file cannot be written, is in use, is damaged, or has verdicts of another store.
    """

    def __init__(self, path: Path, identity_hash: str):
        self.path, self.identity_hash = path, identity_hash
        self._lock = threading.Lock()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise Refusal(f"--out {path} cannot be written: {error.strerror}") from error
        try:
            self._take()
        except BaseException:
            os.close(self._file)
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refusal(
                f"--out {self.path} is in use by another review; end that one or give another file"
            ) from error
        whole, found = 0, []
        for found_verdict, end in lines_of(self.path):
            found.append(found_verdict)
            whole = end
        if others := {verdict.identity_hash for verdict in found} - {self.identity_hash}:
            raise Refusal(
                f"--out {self.path} has verdicts of another store (identity {min(others)[:16]}, "
                f"this one is {self.identity_hash[:16]}); give another file"
            )
        self.last = counting(found)
        self.cut = os.fstat(self._file).st_size - whole
        os.ftruncate(self._file, whole)
        self._size = os.lseek(self._file, 0, os.SEEK_END)
        # A new file's name is on the disk only when its folder is.
        folder = os.open(self.path.resolve().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def append(self, verdict: Verdict) -> None:
        """Put a verdict on the disk; what cannot be written whole leaves no trace (raises `OSError`)."""
        line = (json.dumps(asdict(verdict), ensure_ascii=False) + "\n").encode()
        with self._lock:
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, 0, os.SEEK_END)
                raise
            self._size += len(line)
            if verdict.verdict == WITHDRAWN:
                self.last.pop(verdict.sample_id, None)
            else:
                self.last[verdict.sample_id] = verdict

    def close(self) -> None:
        """Let the file go, after the verdict that is being written."""
        with self._lock:
            os.close(self._file)
            self._file = -1  # whoever still writes is told so


def lines_of(path: Path) -> Iterator[tuple[Verdict, int]]:
    """Every whole line as a verdict, with the byte where it ends.

    Raises
    ------
    Refusal
        A line is none; the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Refusal(f"{path} is no file of verdicts: {error.strerror}") from error
    end = 0
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        end += len(line) + 1
        try:
            fields = json.loads(line)
            fields |= {name: box_of(fields[name]) for name in ("box", "box_before")}
            yield Verdict(**fields), end
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal(f"{path}, line {number} is no verdict ({error}); mend or delete the line") from error


def counting(verdicts: list[Verdict]) -> dict[str, Verdict]:
    """The verdicts that count, by sample id: each one's last, unless it took the one before back."""
    last = {verdict.sample_id: verdict for verdict in verdicts}
    return {name: verdict for name, verdict in last.items() if verdict.verdict != WITHDRAWN}


def read(path: str | os.PathLike) -> pl.DataFrame:
    """The verdicts that count, one row a sample, in the order in which the samples were first met.

    Returns
    -------
    polars.DataFrame
        Columns as of `SCHEMA`; ``verdict`` is accepted, fixed or rejected, ``box`` null where rejected.

    Raises
    ------
    Refusal
        ``path`` is no file of verdicts.
    """
    last = counting([verdict for verdict, _ in lines_of(Path(path))])
    rows = [asdict(verdict) | {"time": datetime.fromisoformat(verdict.time)} for verdict in last.values()]
    return pl.DataFrame(rows, schema=SCHEMA)


def boxes_by_id(path: str | os.PathLike) -> dict[str, Box | None]:
    """The final box of every sample with a verdict, ``xyxy`` in source pixels; null where it was rejected."""
    return {verdict.sample_id: verdict.box for verdict in counting([v for v, _ in lines_of(Path(path))]).values()}


def apply(samples: pl.DataFrame, verdicts: pl.DataFrame) -> pl.DataFrame:
    """A store's samples as a person left them.

    Parameters
    ----------
    samples
        ``store.open(path).samples``, or rows of it.
    verdicts
        From `read`; those of samples that are not there are left out.

    Returns
    -------
    polars.DataFrame
        ``samples`` with a column ``verified`` (accepted, fixed, rejected; null without a verdict), the final boxes in
        ``x1 … y2``, and ``valid`` false for what was rejected; all other columns and the order as they were.
    """
    ids = samples.select("sample_id")
    told = ids.join(verdicts.select("sample_id", "verdict", "box"), on="sample_id", how="left", maintain_order="left")
    boxes = {
        name: told["box"].arr.get(place).cast(samples.schema[name]).fill_null(samples[name])
        for place, name in enumerate(BOX_COLUMNS)
    }
    valid = samples["valid"] & told["verdict"].ne_missing(REJECTED)
    return samples.with_columns(valid=valid, verified=told["verdict"], **boxes)
