"""Mending a store: what is damaged becomes work that is left, and the command that filled the store does it again."""

import os
import shutil
from pathlib import Path

from store import commits, files
from store.layout import lay_out, load_plan
from store.verification import Report, verify


def repair(path: str | os.PathLike) -> Report:
    """Rewrite the Zarr metadata from the plan, and take back the commits of damaged blocks.

    States cannot be mended, only computed again: afterwards ``pending`` names their blocks.

    Returns
    -------
    Report
        Of the store as it is now.

    Raises
    ------
    Refusal
        When ``path`` is no store, or a writer is at work on it.
    """
    folder = files.locate(path)
    plan = load_plan(folder)
    partial = folder / files.PARTIAL
    logs = [commits.Log(folder, log.stem) for log in sorted((folder / commits.FOLDER).glob("*.jsonl"))]
    try:
        draft = partial / "layout"
        shutil.rmtree(draft, ignore_errors=True)
        files.make_folder(partial)
        lay_out(draft, plan)
        for place in draft.rglob("*"):
            within: Path = place.relative_to(draft)
            if place.is_file() and within.parts[0] != files.RECORD:
                files.write_whole(folder / within, [place.read_bytes()], partial)
        report = verify(folder)
        whole = set(commits.read(folder)[0]) - set(report.damaged_blocks)
        for log in logs:
            log.keep(whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for log in logs:
            log.close()
    return verify(folder)
