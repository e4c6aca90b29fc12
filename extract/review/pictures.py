"""The picture of a sample, found in local shards by its id; at most a row group at a time in memory."""

import threading
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from extract.omniedit import HUB_ID, ROWS_AT_ONCE, BadSample, decode, image_bytes, shard_files
from store.errors import Refusal


class Missing(LookupError):  # noqa: N818 - an answer about the data
    """A sample's picture cannot be shown; the message says why."""


class Pictures:
    """Pictures of named samples; threads may share it.

    Attributes
    ----------
    damaged : list[Path]
        Shards that cannot be read.

    Raises
    ------
    Refusal
        ``data`` are no local shards.
    """

    def __init__(self, data: str, wanted: Iterable[str]):
        path = Path(data).expanduser()
        if not path.exists():
            hub = "the hub cannot be asked for one row by its id; " if HUB_ID.fullmatch(data) else ""
            raise Refusal(f"--data {data} is not here: {hub}give the folder of parquet shards the store was made from")
        self.damaged: list[Path] = []
        self._places: dict[str, list[tuple[Path, int, int]]] = {}
        self._held: tuple[tuple[Path, int], int, list] = ((path, -1), 0, [])
        self._lock = threading.Lock()
        self._find(shard_files(path), set(wanted))

    def _find(self, files: list[Path], wanted: set[str]) -> None:
        for file in files:
            try:
                with pq.ParquetFile(file) as shard:
                    for group in range(shard.num_row_groups):
                        ids = shard.read_row_group(group, columns=["omni_edit_id"])["omni_edit_id"]
                        for row, name in enumerate(map(str, ids.to_pylist())):
                            if name in wanted:
                                self._places.setdefault(name, []).append((file, group, row))
            except (pa.ArrowException, OSError, KeyError):
                self.damaged.append(file)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._places

    def png(self, sample_id: str, size: tuple[int, int], crc32c: int | None) -> bytes:
        """The upright picture as the model saw it, as PNG.

        Parameters
        ----------
        sample_id
            Which.
        size, crc32c
            Its width and height, and the checksum of its encoded bytes, that the store knows (null: it knows none).

        Raises
        ------
        Missing
            It is not there, cannot be decoded, or is another one than the store was made from.
        """
        if sample_id not in self._places:
            raise Missing(f"the data hold no sample {sample_id}")
        try:
            # An id that comes twice had one good row; its bytes tell which.
            found = [image_bytes(self._cell(*place)) for place in self._places[sample_id]]
            same = [encoded for encoded in found if crc32c in (None, google_crc32c.value(encoded))]
            if not same:
                raise Missing("the data hold another picture under this id than the store was made from")
            picture = decode(same[0])
        except (BadSample, pa.ArrowException, OSError) as error:
            raise Missing(f"the picture cannot be read: {error}") from error
        if picture.size != size:
            shape = "{}×{}".format(*picture.size)
            raise Missing(f"the picture is {shape}, the store says {size[0]}×{size[1]}")
        stream = BytesIO()
        picture.save(stream, "PNG", compress_level=1, icc_profile=None)
        return stream.getvalue()

    def _cell(self, file: Path, group: int, row: int) -> dict | bytes | None:
        """One cell of the picture column; its neighbours are kept, since they are asked for next."""
        with self._lock:
            where, start, cells = self._held
            if where != (file, group) or not start <= row < start + len(cells):
                start, cells = 0, []
                with pq.ParquetFile(file) as shard:
                    for batch in shard.iter_batches(ROWS_AT_ONCE, [group], columns=["src_img"], use_threads=False):
                        if row < start + len(batch):
                            cells = batch.column(0).to_pylist()
                            break
                        start += len(batch)
                self._held = ((file, group), start, cells)
                # The row group was read; the pool would keep its room (1.2 GB for 0.5 GB of pictures).
                pa.default_memory_pool().release_unused()
            if not cells:
                raise Missing(f"{file} has changed: it has no row {row} in row group {group} any more")
            return cells[row - start]
