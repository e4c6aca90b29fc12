"""JSON that carries its own checksum: what is torn or changed is noticed."""

import json
from collections.abc import Mapping
from typing import Any

from store.places import crc32c_of
from store.plan import canonical_json


class Unsealed(ValueError):  # noqa: N818 - the document is what is wrong, by name
    """A document whose checksum is missing or wrong."""


def seal(document: Mapping[str, Any]) -> bytes:
    """One line of canonical JSON with the field ``crc32c``: of the line without it, 8 hex digits."""
    checksum = crc32c_of(canonical_json(document).encode())
    return canonical_json({**document, "crc32c": f"{checksum:08x}"}).encode() + b"\n"


def unseal(line: bytes) -> dict[str, Any]:
    """The document of a line.

    Raises
    ------
    Unsealed
        When it is not as it was sealed.
    """
    try:
        document = json.loads(line)
        checksum = document.pop("crc32c")
        whole = f"{crc32c_of(canonical_json(document).encode()):08x}" == checksum and line == seal(document)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise Unsealed("it fails its checksum")
    return document
