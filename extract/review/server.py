"""The page of one review and the command that serves it; see `extract.local_page` for who may open it."""

import contextlib
import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import polars as pl

import store
from extract.local_page import PageHandler, PageServer, Unfit, as_json
from extract.review.config import ReviewConfig
from extract.review.desk import Desk
from extract.review.pictures import Missing, Pictures, check_columns
from extract.review.verdicts import VerdictLog
from store.errors import Refusal

LOOKED_FOR = 8  # samples of which the data must hold one


class Server(PageServer):
    """Serves ``desk``."""

    desk: Desk

    def __init__(self, port: int):
        super().__init__(port, Handler)


class Handler(PageHandler):
    """One connection of the page of a review."""

    server: Server
    folder = Path(__file__).parent / "page"
    takes = ("verdicts",)

    def get(self, path: str) -> tuple[str, bytes]:
        """A sample, its picture, or how far the review is."""
        desk = self.server.desk
        if path == "progress":
            return as_json({"progress": desk.progress(), "next_left": desk.next_left()})
        if asked := re.fullmatch(r"(samples|pictures)/(\d{1,9})", path):
            place = int(asked[2])
            return as_json(desk.sample(place)) if asked[1] == "samples" else ("image/png", desk.picture(place))
        raise Unfit(HTTPStatus.NOT_FOUND, f"there is no {path!r} here")

    def post(self, path: str, given: Any) -> dict[str, Any]:
        """Keep a verdict."""
        try:
            return self.server.desk.judge(given)
        except OSError as error:
            raise Unfit(HTTPStatus.INSUFFICIENT_STORAGE, f"the file of verdicts: {error.strerror}") from error


def verdicts_path(config: ReviewConfig, path: Path | str) -> Path:
    """The file of verdicts: the one asked for, else beside the store at ``path``."""
    if config.out is not None:
        if ":/" in str(config.out):
            raise Refusal(f"--out {config.out} is a URL; give a file on this machine")
        return config.out
    if not isinstance(path, Path):
        raise Refusal(f"{config.store} is an object store, where no file can be added to; give --out FILE")
    return path.parent / f"{path.name}.verdicts.jsonl"


def chosen_samples(samples: pl.DataFrame, split: str | None) -> pl.DataFrame:
    """The rows of a split, all if none is given, without those that were not extracted yet: their boxes may come."""
    chosen = samples if split is None else samples.filter(pl.col("split") == split)
    if chosen.is_empty():
        raise Refusal(f"--split {split!r} has no sample; the store has {', '.join(sorted(set(samples['split'])))}")
    done = chosen.filter(pl.col("valid") | pl.col("set_aside").is_not_null())
    if done.is_empty():
        raise Refusal("no sample of the store is extracted yet; review it when `python -m extract` has filled it")
    if len(done) < len(chosen):
        print(f"{len(chosen) - len(done)} samples are not extracted yet and left out of this review")
    return done


def review(config: ReviewConfig) -> None:
    """Serve the page until Ctrl-C, then say how the review went; see `ReviewConfig`.

    Raises
    ------
    Refusal
        The store, the data or the file of verdicts cannot be used, or the port is taken.
    """
    opened = store.open(config.store)
    samples = chosen_samples(opened.samples, config.split)
    check_columns(samples.columns)
    pictures = Pictures(config.data)
    if not any(there(pictures, row) for row in samples.head(LOOKED_FOR).iter_rows(named=True)):
        raise Refusal(f"--data {config.data} holds none of the store's samples; give the data it was made from")
    with (
        Server(config.port) as server,
        contextlib.closing(VerdictLog(verdicts_path(config, opened.path), opened.plan.identity_hash)) as log,
    ):
        server.desk = desk = Desk(samples, pictures, log, config.reviewer)
        print_start(desk)
        print(f"page      {server.url}  (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.1)
    print(f"\n{desk.summary()}\nkept in {log.path}")


def there(pictures: Pictures, sample: Mapping[str, Any]) -> bool:
    """Whether the data hold a sample's picture."""
    with contextlib.suppress(Missing):
        return bool(pictures.source(sample))
    return False


def print_start(desk: Desk) -> None:
    """What there is to review."""
    samples, log = desk.samples, desk.log
    if log.cut:
        print(f"{log.path}: {log.cut} bytes of a line that was never confirmed are cut off")
    print(f"verdicts  {log.path}: {desk.progress()['left']} of {len(samples)} samples left")
