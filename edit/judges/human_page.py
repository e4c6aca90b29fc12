"""The page on which a person judges; see `extract.local_page` for who may open it."""

import contextlib
import re
from http import HTTPStatus
from pathlib import Path
from typing import Any

from edit.judges.cache import AnswerCache
from edit.judges.config import HumanSettings
from edit.judges.human import SIDES, Desk
from edit.judges.judge import Item
from edit.judges.questions import RUBRIC, Failure, Verdict
from extract.local_page import PageHandler, PageServer, Unfit, as_json


class Server(PageServer):
    """Serves ``desk`` until the person says that it is finished."""

    desk: Desk
    finished = False

    def __init__(self, port: int):
        super().__init__(port, Handler)


class Handler(PageHandler):
    """One connection of the page of a judge."""

    server: Server
    folder = Path(__file__).parent / "page"
    takes = ("answers", "finish")

    def do_POST(self) -> None:  # noqa: N802 - the name that http.server calls
        """An answer, or that there are no more; then the server ends, once the page knows."""
        super().do_POST()
        if self.server.finished:
            self.server.shutdown()

    def get(self, path: str) -> tuple[str, bytes]:
        """The questions and how far the person is; a pair; one of its pictures."""
        desk = self.server.desk
        if path == "start":
            rubric = [{"name": name, "question": asked, "meanings": told} for name, (asked, told) in RUBRIC.items()]
            return as_json({"rubric": rubric, "progress": desk.progress(), "next_left": desk.next_left()})
        if asked := re.fullmatch(r"pairs/(\d{1,9})", path):
            return as_json(desk.pair(int(asked[1])))
        if asked := re.fullmatch(rf"pictures/(\d{{1,9}})/({'|'.join(SIDES)})", path):
            return "image/png", desk.picture(int(asked[1]), asked[2])
        raise Unfit(HTTPStatus.NOT_FOUND, f"there is no {path!r} here")

    def post(self, path: str, given: Any) -> dict[str, Any]:
        """Keep an answer, or finish."""
        desk = self.server.desk
        if path == "answers":
            return desk.keep(given)
        if (left := desk.next_left()) is not None:
            raise Unfit(HTTPStatus.CONFLICT, f"pair {left + 1} is not judged yet; Ctrl-C in the terminal ends early")
        self.server.finished = True
        return {}


def judge_by_hand(items: list[Item], settings: HumanSettings, cache: AnswerCache) -> list[Verdict | Failure]:
    """Serve the page until the person has finished, or Ctrl-C: what was answered, one for each item.

    Raises
    ------
    Refusal
        The port is taken, the answers cannot be kept, or the same person judges already.
    """
    with (
        Server(settings.port) as server,
        contextlib.closing(Desk(items, settings.rater, settings.order_seed, cache)) as desk,
    ):
        server.desk = desk
        told = desk.progress()
        alike = len(items) - told["total"]
        print(
            f"pairs     {told['total']}: {told['judged']} judged before, {told['aside']} cannot be shown"
            + (f"; {alike} more are the same as another one" if alike else "")
        )
        print(f"page      {server.url}  (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.1)
        return desk.outcomes()
