"""Pictures before and after their edit, of a store's samples, read from the data that the store was made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from extract.omniedit import BadSample, Checks, crc_of, judged
from extract.rows import Place, SetAside, Shards
from store.errors import Refusal
from store.reader import Store


@dataclass(frozen=True)
class Pair:
    """One sample: upright RGB pictures of one size, and its box in pixels of them (null if it has none)."""

    sample: int
    source: Image.Image
    target: Image.Image
    box: tuple[float, float, float, float] | None


class Pairs:
    """The pairs of a store.

    Parameters
    ----------
    opened
        A store of ``python -m extract``.
    data
        Folder or hub id of the data that it was made from; they must hold edited pictures.

    Raises
    ------
    Refusal
        There are no data at ``data``, or the store does not say where its pictures lie.
    """

    def __init__(self, opened: Store, data: str | Path):
        samples = opened.samples
        if lacking := [name for name in ("file", "row", "image_crc32c") if name not in samples.columns]:
            raise Refusal(f"the store's samples have no column {lacking[0]!r}: give a store of `python -m extract`")
        if "shown" in samples.columns:
            raise Refusal("the store is a control whose samples saw other pictures: give the ordinary one")
        self._samples = samples
        self._shards = Shards(data, edited=True)

    def read(self, samples: Sequence[int]) -> Iterator[Pair | tuple[int, str]]:
        """The pairs of rows of ``Store.samples``, in order; of one that cannot be had its number and why."""
        rows = self._samples[list(samples)]
        places = [Place(*place) for place in rows.select("file", "row").iter_rows()]
        checks = Checks(min_area=0, max_area=1, pixels=False, edited=True)
        found = self._shards.rows(places)
        for sample, stored, place, row in zip(samples, rows.iter_rows(named=True), places, found, strict=True):
            try:
                read = row if isinstance(row, SetAside) else judged(row, place, checks)
                if isinstance(read, SetAside):
                    raise BadSample(read.reason, read.detail)
                if read.sample_id != stored["sample_id"] or crc_of(read.source) != stored["image_crc32c"]:
                    raise BadSample("the data hold another picture there than the store was made from")
                source, target = read.image, read.edited
                if target is None:
                    raise BadSample("the data hold no edited picture")
                if target.size != source.size:
                    target = target.resize(source.size, Image.Resampling.LANCZOS)
                box = tuple(stored[name] for name in ("x1", "y1", "x2", "y2"))
                yield Pair(sample, source, target, None if None in box else box)
            except BadSample as bad:
                yield sample, str(bad)
