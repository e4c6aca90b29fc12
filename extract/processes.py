"""Where loader processes come from: a server that has imported what they need once, and forks them in no time."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

FEW_SAMPLES = 512
"""Of so many samples, processes of their own cost more to start than they save."""

NICE = 10
"""By how much processes that help step back: where cores are few, the model must not wait for one."""


def loader_context() -> BaseContext:
    """How loaders are started: not by a fork of this process, whose threads would not survive one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["extract.loading", "extract.writing"])
    return context


def follow_parent() -> None:
    """End this process when its parent ends, however that happens; Ctrl-C is for the parent, and so are the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def start_early(loaders: int | None, limit: int | None) -> None:
    """Have the server import beside this process, which has as much to import itself; it ends with this process."""
    if loaders if loaders is not None else limit is None or limit >= FEW_SAMPLES:
        loader_context()
        forkserver.ensure_running()
