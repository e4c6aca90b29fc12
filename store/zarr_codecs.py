"""The store's own codecs for zarr-python, which finds them by their entry points once this package is installed.

Without it, zarr says that it knows no codec of that name; ``zstd`` and ``none`` need nothing of ours.
"""

import asyncio
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from zarr.abc.codec import BytesBytesCodec

from store.codecs import SCALED


@dataclass(frozen=True)
class ScaledCodec(BytesBytesCodec):
    """A codec of bfloat16 states, kept as uint16, in chunks whose last axis is whole.

    Parameters
    ----------
    width
        The last extent of the chunks.
    """

    is_fixed_size: ClassVar[bool] = False
    name: ClassVar[str]
    width: int

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ScaledCodec":
        """The codec that an array's metadata describe; TypeError or ValueError if they do not."""
        if data.get("name") != _zarr_name(cls.name):
            raise ValueError(f"codec {data.get('name')!r} is not {_zarr_name(cls.name)!r}")
        return cls(**data["configuration"])

    def to_dict(self) -> dict[str, Any]:
        """What an array's metadata say of it."""
        return {"name": _zarr_name(self.name), "configuration": {"width": self.width}}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Refuse (ValueError) arrays that are not of 16-bit words or of another width."""
        if dtype.to_native_dtype() != np.dtype("uint16") or shape[-1] != self.width:
            raise ValueError(
                f"{_zarr_name(self.name)} of width {self.width} is for uint16 (bfloat16 bits) of that last extent, "
                f"not for {dtype.to_native_dtype()} of {shape}"
            )

    def _encode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        rows = np.ascontiguousarray(chunk_bytes.as_numpy_array()).view("<u2").reshape(-1, self.width)
        return chunk_spec.prototype.buffer.from_bytes(SCALED[self.name](self.width).encode(rows))

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        out = np.empty((math.prod(chunk_spec.shape) // self.width, self.width), "<u2")
        SCALED[self.name](self.width).decode_into(memoryview(chunk_bytes.as_numpy_array()), out, len(out))
        return chunk_spec.prototype.buffer.from_array_like(out.reshape(-1).view("B"))

    async def _encode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._encode_sync, chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """NotImplementedError: the size depends on the values."""
        raise NotImplementedError


@dataclass(frozen=True)
class PlanesCodec(ScaledCodec):
    """``planes``: lossless."""

    name: ClassVar[str] = "planes"


@dataclass(frozen=True)
class Int8Codec(ScaledCodec):
    """``int8``: lossy."""

    name: ClassVar[str] = "int8"


@dataclass(frozen=True)
class Fp8Codec(ScaledCodec):
    """``fp8``: lossy."""

    name: ClassVar[str] = "fp8"


def _zarr_name(name: str) -> str:
    return f"analysis_by_proxy.{name}"


ZARR_CODECS = {kind.name: kind for kind in (PlanesCodec, Int8Codec, Fp8Codec)}
"""The classes by the name of their codec."""
