"""Mending a store: what is damaged becomes work that is left, and the command that filled the store does it again."""

import contextlib
import hashlib
import os

from store import commits, runs
from store.commits import Commit
from store.errors import Refusal
from store.growth import remove_derived, sweep_derived
from store.layout import FORMAT_1, PLAN_FILE, alone, lay_out, load_parts, read_plan, remove_old_tables, twin
from store.places import Place, locate
from store.sealing import Unsealed, unseal
from store.verification import Report, verify


def repair(path: str | os.PathLike | Place) -> Report:
    """Restore what has a second copy, rewrite the Zarr metadata from the plan, take back commits of damaged blocks.

    States cannot be mended, only computed again: afterwards ``pending`` names their blocks. A damaged derived array
    and a damaged note of a run are dropped.

    Returns
    -------
    Report
        Of the store as it is now.

    Raises
    ------
    Refusal
        When ``path`` is no store, a writer is at work on it, or the plan is damaged beyond its second copy.
    """
    place = locate(path).of("repair")
    with alone(place), contextlib.ExitStack() as stack:
        _restore_record(place)
        parts = load_parts(place, laid_out=False)
        logs = {}
        for worker in commits.workers(place):
            logs[worker] = place.log(commits.log_file(worker))
            stack.callback(logs[worker].close)
        stack.callback(place.remove_partial)
        if read_plan(place)["format_version"] > 1:
            lay_out(place, parts)
            remove_old_tables(place)
            sweep_derived(place)
        report = verify(place)
        whole = set(commits.read(place).by_block) - set(report.damaged_blocks)
        for log in logs.values():
            lines = [commit for line in log.read().splitlines() if (commit := Commit.parse(line))]
            log.replace([commit.line() for commit in lines if (commit.part, commit.block) in whole])
        for name in report.damaged_derived:
            remove_derived(place, parts, name)
        for name in list(runs.damaged(place)):
            place.remove(name)
    return verify(place)


def _restore_record(place: Place) -> None:
    """Make each file of the record and its twin equal again, by the one that is whole."""
    with contextlib.suppress(Refusal):
        if read_plan(place)["format_version"] == 1:
            return
    stored = _restore(place, PLAN_FILE, lambda data: unseal(data))
    for key in FORMAT_1:
        name = unseal(stored)[key]
        _restore(place, name, lambda data, name=name: hashlib.sha256(data).hexdigest()[:16] in name)


def _restore(place: Place, name: str, whole: object) -> bytes:
    copies = {}
    for path in (name, twin(name)):
        with contextlib.suppress(FileNotFoundError, Unsealed):
            data = place.read(path)
            if whole(data):
                copies[path] = data
    if not copies:
        raise Refusal(f"{place}/{name} and its second copy are both damaged: make the store again")
    good = copies.get(name, copies.get(twin(name)))
    for path in (name, twin(name)):
        if copies.get(path) != good:
            place.write_whole(path, [good])
    return good
