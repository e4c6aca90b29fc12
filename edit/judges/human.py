"""A person who judges: which pair of pictures is shown when, the answers so far, and what they come to.

The person is told of no method: a pair is known by its place in an order that is drawn from the person's name, a seed
and the pictures alone, and what is shown is made of pixels, without names, paths or what is written beside them.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from PIL import Image
from tqdm import tqdm

from edit.endpoints.wire import Answer, png
from edit.judges.cache import AnswerCache, key_of
from edit.judges.judge import Item, unreadable
from edit.judges.questions import BEST, QUESTIONS, Failure, Verdict, prompt_for
from extract.local_page import Unfit
from extract.omniedit import BadSample
from store.errors import Busy, Refusal

FIELDS = ("place", "question", "grade")
SIDES = ("source", "edited")


@dataclass(frozen=True)
class Pair:
    """A source, what was made of it, and the instruction: what the person is shown."""

    key: str
    """Names the question to this person; pairs of several methods that are alike have one and are asked once."""
    item: Item
    size: tuple[int, int] | None
    """Width and height of the source; null where a picture cannot be read."""
    failure: Failure | None = None
    """Why it cannot be shown, with the path, which may name the method: not for the page."""
    trouble: str | None = None
    """The same for the page."""


class Desk:
    """What lies before one person: pairs by place ``0 … n-1``, and the grades so far; threads may share it.

    Parameters
    ----------
    items
        What is to be judged.
    rater, seed
        Whose answers these are; with the pictures they give the order.
    cache
        Holds the answers; each is there before the page is told so.

    Raises
    ------
    Busy
        The same person judges already.
    """

    def __init__(self, items: Sequence[Item], rater: str, seed: int, cache: AnswerCache):
        self.rater, self.cache = rater, cache
        self._writing = threading.Lock()
        self._own = claim(cache, rater)
        try:
            with ThreadPoolExecutor() as pool:
                looked = tqdm(pool.map(self._look, items), "reading", len(items), unit="pair", leave=False)
                self._asked = list(looked)
            found = {pair.key: pair for pair in self._asked}
            self.pairs = sorted(found.values(), key=lambda pair: hashlib.sha256(f"{seed} {pair.key}".encode()).digest())
            self._grades = {key: self._kept(key) for key in found}
        except BaseException:
            self.close()
            raise
        self._shown = lru_cache(4)(self._read)

    def close(self) -> None:
        """Let others judge under this name."""
        os.close(self._own)

    def _look(self, item: Item) -> Pair:
        try:
            source, edited = item.pictures()
        except (BadSample, OSError) as error:
            trouble = error.strerror if isinstance(error, OSError) else str(error)
            key = hashlib.sha256(json.dumps([item.sample, item.method]).encode()).hexdigest()
            return Pair(key, item, None, unreadable(error), f"a picture cannot be read: {trouble}")
        return Pair(self._key(item, source, edited), item, source.size)

    def _key(self, item: Item, source: Image.Image, edited: Image.Image) -> str:
        asked = {"judge": "human", "rater": self.rater, "prompt": prompt_for(item.instruction, item.box, source.size)}
        return key_of(asked, source, edited)

    def _kept(self, key: str) -> dict[str, int]:
        answer = self.cache.get(key)
        return {} if answer is None else json.loads(answer.text)

    def _pair(self, place: Any) -> Pair:
        if type(place) is not int or not 0 <= place < len(self.pairs):
            raise Unfit(HTTPStatus.NOT_FOUND, f"there is no pair {place!r}; there are {len(self.pairs)}")
        return self.pairs[place]

    def _done(self, pair: Pair) -> bool:
        return len(self._grades[pair.key]) == len(QUESTIONS)

    def pair(self, place: int) -> dict[str, Any]:
        """One pair as the page shows it; raises `Unfit`."""
        pair = self._pair(place)
        box = (
            pair.item.box and pair.size and [v / extent for v, extent in zip(pair.item.box, pair.size * 2, strict=True)]
        )
        return {
            "place": place,
            "instruction": pair.item.instruction,
            "size": pair.size,
            "box": box,
            "trouble": pair.trouble,
            "grades": self._grades[pair.key],
            "next_left": self.next_left(place),
        }

    def picture(self, place: int, side: str) -> bytes:
        """The source or the edited picture of a pair as PNG; raises `Unfit` where it cannot be shown."""
        pair = self._pair(place)
        if pair.trouble is not None:
            raise Unfit(HTTPStatus.NOT_FOUND, pair.trouble)
        return png(self._shown(place)[SIDES.index(side)])

    def _read(self, place: int) -> tuple[Image.Image, Image.Image]:
        pair = self.pairs[place]
        try:
            pictures = pair.item.pictures()
            same = self._key(pair.item, *pictures) == pair.key
        except (BadSample, OSError):
            same = False
        if not same:
            raise Unfit(HTTPStatus.NOT_FOUND, "a picture of this pair was changed or removed since the command started")
        return pictures

    def progress(self) -> dict[str, int]:
        """How many pairs there are, are judged, and cannot be shown."""
        aside = sum(pair.trouble is not None for pair in self.pairs)
        return {"total": len(self.pairs), "judged": sum(map(self._done, self.pairs)), "aside": aside}

    def next_left(self, place: int = -1) -> int | None:
        """The first pair to be judged after ``place``, else the first of all; null if none is left."""
        left = [at for at, pair in enumerate(self.pairs) if pair.trouble is None and not self._done(pair)]
        return next((at for at in left if at > place), left[0] if left else None)

    def keep(self, given: Any) -> dict[str, Any]:
        """Keep the answer to a question that the page sent (null takes it back), and say how far the person is.

        Raises
        ------
        Unfit
            It is no answer, or cannot be written; nothing was kept.
        """
        if not isinstance(given, Mapping) or set(given) != set(FIELDS):
            raise Unfit(HTTPStatus.BAD_REQUEST, f"an answer is a JSON object with the fields {', '.join(FIELDS)}")
        place, question, grade = (given[name] for name in FIELDS)
        pair = self._pair(place)
        if question not in QUESTIONS:
            raise Unfit(HTTPStatus.UNPROCESSABLE_ENTITY, f"question {question!r} is not one of {', '.join(QUESTIONS)}")
        if grade is not None and (type(grade) is not int or not 0 <= grade <= BEST):
            raise Unfit(HTTPStatus.UNPROCESSABLE_ENTITY, f"grade {grade!r} is no whole number from 0 to {BEST}")
        if pair.trouble is not None:
            raise Unfit(HTTPStatus.CONFLICT, f"this pair cannot be judged: {pair.trouble}")
        with self._writing:
            said = {name: old for name, old in self._grades[pair.key].items() if name != question}
            if grade is not None:
                said[question] = grade
            try:
                self.cache.put(pair.key, Answer(json.dumps(said), 0, 0))
            except Refusal as refusal:
                raise Unfit(HTTPStatus.INSUFFICIENT_STORAGE, str(refusal)) from refusal
            self._grades[pair.key] = said
        return {"grades": said, "progress": self.progress(), "next_left": self.next_left(place)}

    def outcomes(self) -> list[Verdict | Failure]:
        """What the answers so far come to, one for each item, in the items' order."""
        return [pair.failure or self._outcome(self._grades[pair.key]) for pair in self._asked]

    def _outcome(self, grades: Mapping[str, int]) -> Verdict | Failure:
        if len(grades) < len(QUESTIONS):
            return Failure(f"not judged: {self.rater} answered {len(grades)} of {len(QUESTIONS)} questions")
        return Verdict(**grades)


def claim(cache: AnswerCache, rater: str) -> int:
    """A file that only one process of a person has at a time, so that none overwrites the other's answers."""
    path = cache.folder / f"{hashlib.sha256(rater.encode()).hexdigest()[:16]}.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Refusal(f"--cache {cache.folder} cannot be written: {error.strerror}; give another folder") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise Busy(f"--rater {rater} judges into --cache {cache.folder} already: end that run first") from error
    return file
