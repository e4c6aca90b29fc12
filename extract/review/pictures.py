"""The picture of a sample, read from the place that the store names; a few rows in memory at a time."""

import threading
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from extract.omniedit import BadSample, crc_of, decode, image_bytes
from extract.rows import Place, SetAside, Shards
from store.errors import Refusal


class Missing(LookupError):  # noqa: N818 - an answer about the data
    """A sample's picture cannot be shown; the message says why."""


class Pictures:
    """Pictures of a store's samples; threads may share it.

    Raises
    ------
    Refusal
        There are no data at ``data``.
    """

    def __init__(self, data: str):
        self._shards = Shards(data)
        self._lock = threading.Lock()

    def source(self, sample: Mapping[str, Any]) -> bytes:
        """The encoded picture of a row of the samples table (raises `Missing`)."""
        with self._lock:
            (row,) = self._shards.rows([Place(sample["file"], sample["row"])])
        if isinstance(row, SetAside):
            raise Missing(f"the picture cannot be read: {row.reason} ({row.detail})")
        if str(row["omni_edit_id"]) != sample["sample_id"]:
            raise Missing(f"the data hold no sample {sample['sample_id']} where the store was made from it")
        try:
            encoded = image_bytes(row.get("src_img"))
        except BadSample as error:
            raise Missing(f"the picture cannot be read: {error}") from error
        if crc_of(encoded) != sample["image_crc32c"]:
            raise Missing("the data hold another picture under this id than the store was made from")
        return encoded

    def png(self, sample: Mapping[str, Any]) -> bytes:
        """The upright picture as the model saw it, as PNG, of a row of the samples table.

        Raises
        ------
        Missing
            It is not there, cannot be decoded, or is another one than the store was made from.
        """
        try:
            picture = decode(self.source(sample))
        except BadSample as error:
            raise Missing(f"the picture cannot be read: {error}") from error
        stream = BytesIO()
        picture.save(stream, "PNG", compress_level=1, icc_profile=None)
        return stream.getvalue()


def check_columns(columns: list[str]) -> None:
    """Refuse a store whose samples table does not say where pictures lie."""
    if lacking := [name for name in ("file", "row", "image_crc32c") if name not in columns]:
        raise Refusal(
            f"the store's samples have no column {lacking[0]!r}: only stores of `python -m extract` have pictures"
        )
