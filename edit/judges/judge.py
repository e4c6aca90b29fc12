"""What every judge can do, and many pictures judged by one: progress, failures set aside, a table."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import polars as pl
from PIL import Image
from tqdm import tqdm

from edit.endpoints.endpoint import POLL
from edit.endpoints.wire import Answer, shown
from edit.judges.cache import AnswerCache, key_of
from edit.judges.questions import QUESTIONS, Cost, Failure, Unclear, Verdict, parse
from extract.omniedit import BadSample, decode
from store.errors import Refusal

SCHEMA = {
    "sample": pl.String,
    "method": pl.String,
    "judge": pl.String,
    **dict.fromkeys(QUESTIONS, pl.Int8),
    "reason": pl.String,
    "failed": pl.String,
    "tokens_in": pl.Int64,
    "tokens_out": pl.Int64,
    "money": pl.Float64,
}
"""Columns of the table: who judged (a model's or a person's name), grades (null where ``failed`` says why there are
none), the judge's reason, what the answer cost when it was given."""


class Judge(Protocol):
    """A model that can be asked the three questions; threads may share it."""

    name: str
    """Stands beside its verdicts."""
    concurrency: int
    """How many pictures it can judge at a time."""
    spent: float
    """Money that this run has cost so far; answers from the cache cost nothing."""

    def judge(
        self, source: Image.Image, edited: Image.Image, instruction: str, box: Sequence[float] | None = None
    ) -> Verdict | Failure:
        """The verdict on one edit, or why there is none.

        Parameters
        ----------
        source, edited
            RGB pictures.
        instruction
            What the editor was told.
        box
            Where the meant subject lies, x1 y1 x2 y2 in pixels of the source, if the judge is to know.

        Raises
        ------
        Refusal
            No other picture can be judged either: a wrong key, a spent budget.
        """
        ...

    def stop(self) -> None:
        """Begin no further attempt; called from another thread."""
        ...


@dataclass(frozen=True)
class Item:
    """One edited picture to be judged."""

    sample: str
    method: str
    """What made it; judges are not told."""
    instruction: str
    source: Image.Image | Path
    edited: Image.Image | Path
    box: tuple[float, float, float, float] | None = None

    def pictures(self) -> tuple[Image.Image, Image.Image]:
        """Source and edited picture, upright RGB (raises `BadSample`, `OSError`)."""
        source, edited = (
            decode(picture.read_bytes()) if isinstance(picture, Path) else picture.convert("RGB")
            for picture in (self.source, self.edited)
        )
        return source, edited


def answer_for(
    cache: AnswerCache | None, asked: dict[str, Any], source: Image.Image, edited: Image.Image, ask
) -> Answer:
    """The kept answer to a question, else what ``ask()`` gives, which is kept before anybody sees it."""
    if cache is None:
        return ask()
    key = key_of(asked, source, edited)
    answer = cache.get(key)
    if answer is None:
        answer = ask()
        cache.put(key, answer)
    return answer


def verdict_of(answer: Answer, money: float = 0.0) -> Verdict | Failure:
    """What an answer means; one that cannot be read is a failure with its reason."""
    cost = Cost(answer.tokens_in, answer.tokens_out, money)
    try:
        verdict = parse(answer.text)
    except Unclear as unclear:
        said = f": {shown(answer.text)}" if answer.text else ""
        return Failure(f"the model stopped ({shown(answer.ended)}){said}" if answer.ended else str(unclear), cost)
    return Verdict(*(getattr(verdict, name) for name in QUESTIONS), verdict.reason, cost)


def judge_all(judge: Judge, items: Sequence[Item], quiet: bool = False) -> pl.DataFrame:
    """All verdicts, one row an item in their order, in `SCHEMA`; a picture that cannot be judged says why.

    What a judge refuses ends the run: the rows that are left say so. An interruption ends it as well, once the
    answers that are on their way are in the cache.

    Raises
    ------
    Refusal
        The judge refused before it had answered anything.
    """
    found: list[Verdict | Failure | None] = [None] * len(items)
    refusal, failed = None, 0
    with (
        ThreadPoolExecutor(judge.concurrency, "judge") as pool,
        tqdm(total=len(items), desc="judging", unit="picture", disable=quiet) as bar,
    ):
        places = {pool.submit(_judged, judge, item): place for place, item in enumerate(items)}
        try:
            left = set(places)
            while left:
                ready, left = wait(left, POLL, FIRST_COMPLETED)
                for done in ready:
                    found[places[done]] = one = done.result()
                    failed += isinstance(one, Failure)
                bar.set_postfix_str(f"{judge.spent:.4f} spent, {failed} failed", refresh=False)
                bar.update(len(ready))
        except Refusal as refused:
            refusal = refused
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            judge.stop()
    for done, place in places.items():  # those that were on their way
        if not done.cancelled() and done.exception() is None:
            found[place] = done.result()
    if refusal is not None and not any(found):
        raise refusal
    return table_of(items, [one or Failure(f"not asked: {refusal}") for one in found], judge.name)


def table_of(items: Sequence[Item], found: Sequence[Verdict | Failure], judge: str) -> pl.DataFrame:
    """What ``judge`` said of each item as a table in `SCHEMA`, one row an item in their order."""
    rows = [_row(item, one, judge) for item, one in zip(items, found, strict=True)]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def unreadable(error: BadSample | OSError) -> Failure:
    """Why a pair whose picture cannot be read has no verdict."""
    return Failure(f"a picture cannot be read: {shown(str(error))}")


def _judged(judge: Judge, item: Item) -> Verdict | Failure:
    try:
        source, edited = item.pictures()
    except (BadSample, OSError) as error:
        return unreadable(error)
    return judge.judge(source, edited, item.instruction, item.box)


def _row(item: Item, found: Verdict | Failure, judge: str) -> tuple:
    cost = (found.cost.tokens_in, found.cost.tokens_out, found.cost.money)
    named = (item.sample, item.method, judge)
    if isinstance(found, Failure):
        return (*named, None, None, None, None, found.reason, *cost)
    return (*named, *(getattr(found, name) for name in QUESTIONS), found.reason, None, *cost)
