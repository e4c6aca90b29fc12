"""Notes of the runs that filled a store: what was asked, what was checked, where the time went."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from store.places import RECORD, Place
from store.sealing import Unsealed, seal, unseal

FOLDER = f"{RECORD}/runs"


def note(place: Place, name: str, told: Mapping[str, Any]) -> None:
    """Keep what a run tells of itself (JSON-able) under its name, in the place of what it told before."""
    place.write_whole(f"{FOLDER}/{name}.json", [seal(told)])


def read(place: Place) -> list[dict[str, Any]]:
    """What runs told, in the order of their names; damaged notes are left out (`verify` names them)."""
    found = []
    for name in place.names(FOLDER):
        with contextlib.suppress(Unsealed):
            found.append(unseal(place.read(name)))
    return found


def damaged(place: Place) -> Iterator[str]:
    """Files of notes that are not as they were written."""
    for name in place.names(FOLDER):
        try:
            unseal(place.read(name))
        except Unsealed:
            yield name
