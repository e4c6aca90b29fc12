"""How a chunk is compressed: one codec per name, chunks in, bytes out. FORMAT.md is the law of the frames.

``zstd`` writes Blosc frames, which every Zarr reader decodes: the high bytes of floats repeat, the low ones are noise,
so each byte plane is entropy-coded alone. ``planes``, ``int8`` and ``fp8`` are for bfloat16 states and first take out
how large each channel and each token is. All of it is integers or single IEEE operations, so that equal states give
equal bytes on every machine.

Shapes: ``r`` rows (tokens) of a chunk, ``d`` width (channels).
"""

import functools
import math
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard
from numcodecs import Blosc

from store.bits import BFLOAT16_NAN
from store.errors import Refusal

CODECS = ("none", "zstd", "planes", "int8", "fp8")
"""Names of the codecs."""

LOSSY = ("int8", "fp8")
"""Codecs that change the values."""

_LOCAL = threading.local()

# ---------------------------------------------------------------------------------------------------------- buffers


def _scratch(purpose: str, n: int, dtype: Any) -> np.ndarray:
    """A buffer of ``n`` values that this thread uses again: fresh pages cost more than the codecs do."""
    dtype = np.dtype(dtype)
    kept = getattr(_LOCAL, purpose, None)
    if kept is None or kept.nbytes < n * dtype.itemsize:
        kept = np.empty(n * dtype.itemsize, np.uint8)
        setattr(_LOCAL, purpose, kept)
    return kept[: n * dtype.itemsize].view(dtype)


_PIECE = 1 << 17
"""Values worked on at a time: several passes over them stay in the cache."""


def _row_pieces(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _PIECE // width)
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


# ---------------------------------------------------------------------------------------------- zstd, Blosc's frames


def _compress(values: np.ndarray | bytes) -> bytes:
    """One zstd frame. With a table of 64 entries zstd finds runs but no other matches.

    Among exponents a match is chance and costs more bits than Huffman's code: this is smaller than level 1, compresses
    three times as fast and decompresses four times as fast.
    """
    return _compressor().compress(values)


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_LOCAL, "compressor"):
        settings = zstandard.ZstdCompressionParameters(
            compression_level=1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, window_log=17
        )
        _LOCAL.compressor = zstandard.ZstdCompressor(compression_params=settings)
    return _LOCAL.compressor


def _decompress(frame: memoryview, size: int) -> np.ndarray:
    """The ``size`` bytes of a zstd frame; ValueError if it is damaged or of another size."""
    try:
        # Asked first: the decompressor allocates whatever a damaged frame claims.
        if zstandard.frame_content_size(frame) != size:
            raise ValueError(f"a part is not of {size} bytes")
        if not hasattr(_LOCAL, "decompressor"):
            _LOCAL.decompressor = zstandard.ZstdDecompressor()
        return np.frombuffer(_LOCAL.decompressor.decompress(frame), np.uint8)
    except zstandard.ZstdError as failure:
        raise ValueError(f"zstd: {failure}") from None


_BLOSC = struct.Struct("<4B4I")  # version, version of zstd's format, flags, item size, bytes, block, frame, 1st block
_BLOSC_HEADER = 16
_BLOSC_ZSTD = 0x80
_BLOSC_SHUFFLE, _BLOSC_MEMCPY, _BLOSC_WHOLE = 0x01, 0x02, 0x10
_OWN_ITEMS = 1 << 18  # NumPy merges the planes of a frame up to this faster than c-blosc
_BLOSC_LEAST = 128  # items; decoders take a smaller block as one stream
_SMALL_ITEMS = 1 << 16  # chunks of up to so many are compressed several at a time


def encode_blosc(values: np.ndarray) -> bytes:
    """A Blosc frame of one block, byte-shuffled, every byte plane a zstd stream of its own or raw.

    c-blosc itself never splits zstd's blocks into planes, and its zstd looks for matches.

    Parameters
    ----------
    values
        C-contiguous, not empty, of 1, 2, 4 or 8 bytes an item.
    """
    words = values.reshape(-1).view(f"<u{values.itemsize}")
    planes = _scratch("planes", words.nbytes, np.uint8).reshape(words.itemsize, words.size)
    shifted = _scratch("shifted", min(_PIECE, words.size), words.dtype)
    for start in range(0, words.size, _PIECE):
        piece = words[start : start + _PIECE]
        np.copyto(planes[0, start : start + len(piece)], piece, casting="unsafe")
        for j in range(1, words.itemsize):
            np.right_shift(piece, 8 * j, out=shifted[: len(piece)])
            np.copyto(planes[j, start : start + len(piece)], shifted[: len(piece)], casting="unsafe")
    split = words.size >= _BLOSC_LEAST
    planes = planes if split else planes.reshape(1, -1)
    return _blosc_frame(planes, [_compress(plane) for plane in planes], words.itemsize, split)


def encode_blosc_each(chunks: np.ndarray) -> list[bytes]:
    """``encode_blosc`` of each of several small chunks ``[n, …]`` of 2 bytes an item, the same bytes.

    All byte planes are compressed by one call: a chunk then costs 4 µs of Python instead of 10, and a thread that runs
    a model beside this one is asked for the interpreter once instead of twice a chunk.
    """
    words = chunks.reshape(len(chunks), -1).view("<u2")
    n, size = words.shape
    planes = _scratch("planes", 2 * words.size, np.uint8).reshape(n, 2, size)
    np.copyto(planes[:, 0], words, casting="unsafe")
    shifted = _scratch("shifted", words.size, words.dtype).reshape(words.shape)
    np.copyto(planes[:, 1], np.right_shift(words, 8, out=shifted), casting="unsafe")
    segments = np.empty((2 * n, 2), np.uint64)
    segments[:, 0], segments[:, 1] = np.arange(2 * n) * size, size
    streams = iter(
        _compressor().multi_compress_to_buffer(zstandard.BufferWithSegments(planes.data.cast("B"), segments.tobytes()))
    )
    return [_blosc_frame(both, [next(streams).tobytes(), next(streams).tobytes()], 2, True) for both in planes]


def _blosc_frame(planes: np.ndarray, packed: list[bytes], itemsize: int, split: bool) -> bytes:
    """The frame of byte planes ``[p, items]``, each as packed or, where that is not smaller, as it is."""
    parts: list[bytes | memoryview] = []
    for plane, stream in zip(planes, packed, strict=True):
        kept = stream if len(stream) < plane.size else plane.data
        parts += [len(kept).to_bytes(4, "little"), kept]
    size = _BLOSC.size + sum(map(len, parts))
    flags = _BLOSC_ZSTD | _BLOSC_SHUFFLE | (0 if split else _BLOSC_WHOLE)
    header = _BLOSC.pack(2, 1, flags, itemsize, planes.size, planes.size, size, _BLOSC.size)
    return b"".join([header, *parts])


def decode_blosc(frame: bytes | memoryview, out: np.ndarray, items: int) -> None:
    """Decode the first values of a Blosc frame of zstd, ours or any other, of ``items`` values.

    Parameters
    ----------
    frame
        The frame.
    out
        C-contiguous; at most ``items`` values.
    items
        Values of the frame.

    Raises
    ------
    ValueError
        When it is damaged or of another size.
    """
    frame = memoryview(frame)
    if out.itemsize == 2 and items <= _OWN_ITEMS and len(frame) >= _OWN.size:
        head, size, first = _OWN.unpack_from(frame)
        if (head, size, first) == (_own_head(items), len(frame), _BLOSC.size):
            _decode_own(frame, out.reshape(-1).view(np.uint16), items)
            return
    if len(frame) < _BLOSC.size:
        raise ValueError(f"a Blosc frame of {len(frame)} bytes")
    version, format_, flags, itemsize, nbytes, block, size, _ = _BLOSC.unpack_from(frame)
    # c-blosc believes the frame's own size and reads that far; within it, it checks every stream.
    if (
        (version, format_, flags & ~(_BLOSC_SHUFFLE | _BLOSC_MEMCPY | _BLOSC_WHOLE)) != (2, 1, _BLOSC_ZSTD)
        or (itemsize, nbytes, size) != (out.itemsize, items * out.itemsize, len(frame))
        or not 0 < block <= nbytes
    ):
        raise ValueError("a Blosc frame whose header does not fit its chunk")
    whole = out if out.size == items else _scratch("decoded", items, out.dtype)
    try:
        Blosc().decode(frame, whole)
    except RuntimeError as failure:
        raise ValueError(f"a damaged Blosc frame ({failure})") from None
    if whole is not out:
        out.reshape(-1)[:] = whole[: out.size]


_OWN = struct.Struct("<12s2I")  # how a frame begins up to its size, its size, where its first block is


@functools.lru_cache(1024)
def _own_head(items: int) -> bytes:
    return struct.pack("<4B2I", 2, 1, _BLOSC_ZSTD | _BLOSC_SHUFFLE, 2, 2 * items, 2 * items)


def _decode_own(frame: memoryview, out: np.ndarray, items: int) -> None:
    """Decode a frame of one block of two byte planes, as ``encode_blosc`` makes them.

    c-blosc sets up zstd anew for every stream, which takes longer than to decode a small one.
    """
    begin = _OWN.size + 4
    middle = begin + int.from_bytes(frame[begin - 4 : begin], "little")
    if middle + 4 > len(frame) or int.from_bytes(frame[middle : middle + 4], "little") != len(frame) - middle - 4:
        raise ValueError("a Blosc frame whose parts do not fit it")
    low, high = (
        np.frombuffer(stream, np.uint8) if len(stream) == items else _decompress(stream, items)
        for stream in (frame[begin:middle], frame[middle + 4 :])
    )
    # NumPy widens in pieces that stay in the nearest cache. Pieces of our own would cost threads more for taking the
    # interpreter from each other.
    np.multiply(high[: out.size], 256, out=out, dtype=np.uint16)
    np.bitwise_or(out, low[: out.size], out=out)


# ----------------------------------------------------------------------------------------------------------- codecs


class Codec(ABC):
    """A codec of whole chunks. Threads may share one; the heavy parts run without the GIL.

    Attributes
    ----------
    name
        One of ``CODECS``.
    lossless
        Whether the bits come back as they were.
    """

    name: str
    lossless: bool = True

    @abstractmethod
    def encode(self, rows: np.ndarray) -> bytes:
        """The bytes of a chunk.

        Parameters
        ----------
        rows
            ``[r, …]``, C-contiguous, the whole chunk: bfloat16 bits as uint16, or floats.
        """

    def encode_each(self, chunks: np.ndarray) -> list[bytes]:
        """The bytes of each of several chunks ``[n, r, …]``, C-contiguous; see ``encode``."""
        return [self.encode(rows) for rows in chunks]

    @abstractmethod
    def decode_into(self, encoded: bytes | memoryview, out: np.ndarray, rows: int) -> None:
        """Fill ``out`` with the first rows of a chunk.

        Parameters
        ----------
        encoded
            What ``encode`` gave.
        out
            ``[n, …]``, C-contiguous, of the chunk's dtype, ``n`` up to ``rows``.
        rows
            Rows of the whole chunk.

        Raises
        ------
        ValueError
            When the bytes are damaged, as far as they themselves can tell.
        """

    @abstractmethod
    def zarr_compressors(self) -> tuple[Any, ...]:
        """The codecs of Zarr that decode these chunks, for ``compressors`` of ``zarr.create_array``."""


class Uncompressed(Codec):
    """Chunks as they are."""

    name = "none"

    def encode(self, rows: np.ndarray) -> bytes:
        """See ``Codec``."""
        return rows.tobytes()

    def decode_into(self, encoded: bytes | memoryview, out: np.ndarray, rows: int) -> None:
        """See ``Codec``."""
        wanted = rows * math.prod(out.shape[1:]) * out.itemsize
        if len(encoded) != wanted:
            raise ValueError(f"a chunk of {len(encoded)} bytes, not {wanted}")
        out.reshape(-1)[:] = np.frombuffer(encoded, out.dtype, out.size)

    def zarr_compressors(self) -> tuple[Any, ...]:
        """See ``Codec``."""
        return ()


class Zstd(Codec):
    """Blosc frames that any Zarr reader decodes.

    Parameters
    ----------
    itemsize
        Bytes of a value.
    """

    name = "zstd"

    def __init__(self, itemsize: int):
        self.itemsize = itemsize

    def encode(self, rows: np.ndarray) -> bytes:
        """See ``Codec``."""
        return encode_blosc(rows)

    def encode_each(self, chunks: np.ndarray) -> list[bytes]:
        """See ``Codec``."""
        items = chunks[0].size
        if self.itemsize == 2 and _BLOSC_LEAST <= items <= _SMALL_ITEMS:
            return encode_blosc_each(chunks)
        return super().encode_each(chunks)

    def decode_into(self, encoded: bytes | memoryview, out: np.ndarray, rows: int) -> None:
        """See ``Codec``."""
        decode_blosc(encoded, out, rows * math.prod(out.shape[1:]))

    def zarr_compressors(self) -> tuple[Any, ...]:
        """See ``Codec``."""
        from zarr.codecs import BloscCodec

        # Only the type size matters for decoding; the rest is what others would encode with.
        return (BloscCodec(typesize=self.itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=512 * 1024),)


# ------------------------------------------------------------------------------- codecs of bfloat16 states, scaled


_SCALED = struct.Struct("<4s3IhHI")  # magic, rows, width, rows kept, base of channels, 0, bytes of the scales
_UNIT = 5  # bits of a bfloat16's magnitude that a scale leaves out, so that it is in quarters of an octave
_MAGNITUDE = np.uint16(0x7FFF)


class Scaled(Codec):
    """What the codecs of bfloat16 states share: a frame with a byte of scale for every channel and token.

    A scale counts quarters of an octave in the bits themselves: bfloat16's magnitude bits, as an integer, are the
    logarithm of the value but for a piecewise-linear error. Rows at the end that are NaN throughout (padding) are not
    kept.

    Parameters
    ----------
    width
        Channels of a row.
    """

    magic: bytes
    bases: range  # of which the base of the channels' scales, in units, is one
    token_base: int  # least scale of a token, in units
    word: str  # dtype of the values handed to Blosc

    def __init__(self, width: int):
        self.width = width

    @abstractmethod
    def _scales(self, rows_rd: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Base of the channels' scales, their bytes ``[d]``, the tokens' bytes ``[r]``, the words ``[r, d]``."""

    @abstractmethod
    def _restore(self, words_rd: np.ndarray, channels_d: np.ndarray, tokens_r: np.ndarray, out_rd: np.ndarray) -> None:
        """Values from words (which may be ``out_rd`` itself) and scales in units."""

    def encode(self, rows: np.ndarray) -> bytes:
        """See ``Codec``."""
        kept = _kept_rows(rows)
        header = [self.magic, len(rows), self.width, kept]
        if not kept:
            return _SCALED.pack(*header, 0, 0, 0)
        base, channels, tokens, words = self._scales(rows[:kept])
        scales = _compress(np.concatenate([channels, tokens]))
        return b"".join([_SCALED.pack(*header, base, 0, len(scales)), scales, encode_blosc(words)])

    def decode_into(self, encoded: bytes | memoryview, out: np.ndarray, rows: int) -> None:
        """See ``Codec``."""
        encoded = memoryview(encoded)
        if len(encoded) < _SCALED.size:
            raise ValueError(f"a chunk of {len(encoded)} bytes")
        magic, whole, width, kept, base, zero, size = _SCALED.unpack_from(encoded)
        if (
            (magic, whole, width, zero) != (self.magic, rows, self.width, 0)
            or kept > rows
            or (base not in self.bases if kept else (base, size, len(encoded)) != (0, 0, _SCALED.size))
        ):
            raise ValueError(f"a chunk whose header is not one of {self.name} of {rows} rows of {self.width}")
        out[kept:] = BFLOAT16_NAN
        if kept:
            scales = _decompress(encoded[_SCALED.size : _SCALED.size + size], width + kept).astype(np.int32)
            frame, n = encoded[_SCALED.size + size :], min(kept, len(out))
            if self.word == "<u2" and n == kept:
                words = out[:n]
            else:
                words = _scratch("decoded", kept * width, self.word).reshape(kept, width)
            decode_blosc(frame, words, words.size)
            self._restore(words[:n], scales[:width] + base, scales[width : width + n] + self.token_base, out[:n])

    def zarr_compressors(self) -> tuple[Any, ...]:
        """See ``Codec``."""
        # zarr finds these classes by their entry point, and they import this module.
        from store.zarr_codecs import ZARR_CODECS

        return (ZARR_CODECS[self.name](width=self.width),)


def _kept_rows(rows_rd: np.ndarray) -> int:
    """Rows without those at the end that are NaN throughout."""
    # One column first: it decides all but padding.
    real = np.flatnonzero(rows_rd[:, 0] != BFLOAT16_NAN)
    kept = int(real[-1]) + 1 if real.size else 0
    real = np.flatnonzero((rows_rd[kept:] != BFLOAT16_NAN).any(axis=1))
    return kept + (int(real[-1]) + 1 if real.size else 0)


def _as_bytes(units: np.ndarray, base: int) -> np.ndarray:
    """Scales as bytes over a base; one that does not fit (32 octaves) takes the nearest that does."""
    return np.clip(units - base, 0, 255).astype(np.uint8)


class Planes(Scaled):
    """Lossless: magnitudes less their channel's and their token's, so that the high bytes are few.

    The sign is rotated to the lowest bit. What then is the high byte counts octaves from the scale, the same for
    channels of any size; the low byte is noise and stays raw.
    """

    name, magic, word = "planes", b"ABP1", "<u2"
    bases, token_base = range(-255, (0x7FFF >> _UNIT) - 254), -128

    tried_values = 1 << 16  # of a chunk of up to so many, whether it is smaller without scales
    sampled_rows, sampled_channels = 64, 256  # of which medians are taken: all of them gain 0.2 % and cost as much

    def encode(self, rows: np.ndarray) -> bytes:
        """See ``Codec``."""
        encoded = super().encode(rows)
        if rows.size > self.tried_values:
            return encoded
        # Of a small chunk the scales themselves are a good part.
        return min(encoded, Scaled.encode(_Unscaled(self.width), rows), key=len)

    def _scales(self, rows_rd: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        r, d = rows_rd.shape
        base, channels, tokens = self._chosen(rows_rd)
        words = _scratch("words", rows_rd.size, self.word).reshape(r, d)
        by_channel = self._words(channels.astype(np.int32) + base)
        by_token = self._words(tokens.astype(np.int32) + self.token_base)
        for piece in _row_pieces(r, d):
            word = words[piece]
            sign = _scratch("signs", word.size, self.word).reshape(word.shape)
            np.left_shift(rows_rd[piece], 1, out=word)
            np.right_shift(rows_rd[piece], 15, out=sign)
            word |= sign
            word -= by_channel
            word -= by_token[piece, None]
        return base, channels, tokens, words

    def _restore(self, words_rd: np.ndarray, channels_d: np.ndarray, tokens_r: np.ndarray, out_rd: np.ndarray) -> None:
        by_channel, by_token = self._words(channels_d), self._words(tokens_r)
        for piece in _row_pieces(*out_rd.shape):
            word, out = words_rd[piece], out_rd[piece]
            sign = _scratch("signs", word.size, self.word).reshape(word.shape)
            word += by_channel
            word += by_token[piece, None]
            np.left_shift(word, 15, out=sign)
            np.right_shift(word, 1, out=out)
            out |= sign

    def _chosen(self, rows_rd: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Base of the channels' scales, their bytes ``[d]``, the tokens' bytes ``[r]``: medians."""
        r, d = rows_rd.shape
        sample = np.sort(rows_rd[:: -(-r // self.sampled_rows)] & _MAGNITUDE, axis=0)
        units = sample[len(sample) // 2].astype(np.int32) >> _UNIT
        base = int(units.max()) - 255
        channels = _as_bytes(units, base)
        step = -(-d // self.sampled_channels)
        sample = (rows_rd[:, ::step] & _MAGNITUDE).view(np.int16)
        sample -= ((channels[::step].astype(np.int32) + base) << _UNIT).astype(np.int16)
        sample.sort(axis=1)
        units = sample[:, sample.shape[1] // 2].astype(np.int32) >> _UNIT
        tokens = _as_bytes(units, self.token_base)
        return base, channels, tokens

    @staticmethod
    def _words(units: np.ndarray) -> np.ndarray:
        """Scales as what is subtracted from rotated bits, modulo 2^16."""
        return (units << (_UNIT + 1)).astype("<u2")


class _Unscaled(Planes):
    """The same without scales."""

    def _chosen(self, rows_rd: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        r, d = rows_rd.shape
        return 0, np.zeros(d, np.uint8), np.full(r, -self.token_base, np.uint8)


class Quantized(Scaled):
    """Lossy: values over their channel's and their token's largest magnitude, in a byte.

    NaN stays NaN, and infinities and what is as large as 2^127 become NaN.
    """

    lossless = False
    word = "|u1"
    bases = range(1, (0x7F00 >> _UNIT) - 254)
    token_base = (0x3F80 >> _UNIT) - 255  # after its channel's scale a token's is at most one

    huge = np.uint16(0x7F00)  # 2^127: up to it a scale can be rounded up and stay finite
    nan_code: int

    @abstractmethod
    def _codes(self, ratios: np.ndarray, out: np.ndarray) -> None:
        """Codes (uint8) of ratios (float32) in [-1, 1], which may be overwritten."""

    @abstractmethod
    def _ratios(self, codes: np.ndarray, out: np.ndarray) -> None:
        """Ratios (float32) of codes; of ``nan_code`` anything."""

    def _scales(self, rows_rd: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        r, d = rows_rd.shape
        most_d = np.zeros(d, np.uint16)
        for piece in _row_pieces(r, d):
            magnitude = rows_rd[piece] & _MAGNITUDE
            magnitude[magnitude >= self.huge] = 0
            np.maximum(most_d, magnitude.max(axis=0), out=most_d)
        units = -(-most_d.astype(np.int32) >> _UNIT)
        base = max(1, int(units.max()) - 255)  # never zero: values are divided by it
        channels = _as_bytes(units, base)
        by_channel = _scales_as_floats(channels.astype(np.int32) + base)
        tokens = np.empty(r, np.uint8)
        words = _scratch("words", rows_rd.size, self.word).reshape(r, d)
        for piece in _row_pieces(r, d):
            rows = rows_rd[piece]
            ratio = _widened(rows, "ratios")
            unreal = (rows & _MAGNITUDE) >= self.huge
            if some_unreal := unreal.any():
                ratio[unreal] = 0
            ratio /= by_channel
            most_r = np.maximum(ratio.max(axis=1), -ratio.min(axis=1))
            tokens[piece] = _as_bytes(-(-most_r.view(np.int32) >> (_UNIT + 16)), self.token_base)
            ratio /= _scales_as_floats(tokens[piece].astype(np.int32) + self.token_base)[:, None]
            self._codes(ratio, words[piece])
            if some_unreal:
                words[piece][unreal] = self.nan_code
        return base, channels, tokens, words

    def _restore(self, words_rd: np.ndarray, channels_d: np.ndarray, tokens_r: np.ndarray, out_rd: np.ndarray) -> None:
        by_channel, by_token = _scales_as_floats(channels_d), _scales_as_floats(tokens_r)
        for piece in _row_pieces(*out_rd.shape):
            codes, out = words_rd[piece], out_rd[piece]
            ratio = _scratch("ratios", codes.size, np.float32).reshape(codes.shape)
            self._ratios(codes, ratio)
            ratio *= by_token[piece, None]
            ratio *= by_channel
            word = ratio.view(np.uint32)
            word += np.uint32(0x8000)  # to the nearest bfloat16
            np.right_shift(word, 16, out=word)
            np.copyto(out, word, casting="unsafe")
            if (unreal := codes == self.nan_code).any():
                out[unreal] = BFLOAT16_NAN


class Int8(Quantized):
    """Ratios in 127ths."""

    name, magic, nan_code = "int8", b"ABI1", 0x80

    def _codes(self, ratios: np.ndarray, out: np.ndarray) -> None:
        ratios *= np.float32(127)
        np.rint(ratios, out=ratios)
        np.copyto(out.view(np.int8), ratios, casting="unsafe")

    def _ratios(self, codes: np.ndarray, out: np.ndarray) -> None:
        np.copyto(out, codes.view(np.int8))
        out *= np.float32(1 / 127)


class Fp8(Quantized):
    """Ratios in 448ths as float8 e4m3fn, rounded to nearest even."""

    name, magic, nan_code = "fp8", b"ABF1", 0x7F

    # float32's own exponent, less 120, is e4m3fn's, and its subnormals are e4m3fn's as well: rounding the bits at
    # the third of the mantissa rounds them all.
    _shrink = np.float32(448 * 2.0**-120)
    _grow = np.float32(2.0**120 / 448)

    def _codes(self, ratios: np.ndarray, out: np.ndarray) -> None:
        ratios *= self._shrink
        bits = ratios.view(np.uint32)
        signs = (bits >> np.uint32(24)) & np.uint32(0x80)
        bits &= np.uint32(0x7FFFFFFF)
        odd = (bits >> np.uint32(20)) & np.uint32(1)
        bits += odd
        bits += np.uint32(0x7FFFF)
        bits >>= np.uint32(20)
        bits |= signs
        np.copyto(out, bits, casting="unsafe")

    def _ratios(self, codes: np.ndarray, out: np.ndarray) -> None:
        bits = out.view(np.uint32)
        np.copyto(bits, codes.view(np.int8), casting="unsafe")  # widened with its sign, which goes to the top bit
        bits <<= np.uint32(20)
        bits &= np.uint32(0x87FFFFFF)
        out *= self._grow


def _widened(rows_rd: np.ndarray, purpose: str) -> np.ndarray:
    """bfloat16 bits as float32, in a buffer of this thread."""
    word = _scratch(purpose, rows_rd.size, np.uint32).reshape(rows_rd.shape)
    np.copyto(word, rows_rd)
    word <<= np.uint32(16)
    return word.view(np.float32)


def _scales_as_floats(units: np.ndarray) -> np.ndarray:
    """Scales in units as float32: they are the upper bits of one."""
    return (units << (_UNIT + 16)).astype(np.int32).view(np.float32)


SCALED = {kind.name: kind for kind in (Planes, Int8, Fp8)}
"""The codecs of bfloat16 states by name."""


def codec(name: str, dtype: np.dtype, width: int, bits: str) -> Codec:
    """The codec of an array.

    Parameters
    ----------
    name
        One of ``CODECS``.
    dtype
        Of the array on disk.
    width
        Its last extent.
    bits
        What its values are: ``bfloat16`` (kept as uint16) or the dtype's name.

    Raises
    ------
    Refusal
        When there is no such codec, or it is not for such values.
    """
    if name not in CODECS:
        raise Refusal(f"codec {name!r} is not known: choose one of {', '.join(CODECS)}")
    if name == "none":
        return Uncompressed()
    if name == "zstd":
        return Zstd(np.dtype(dtype).itemsize)
    if bits != "bfloat16":
        raise Refusal(f"codec {name!r} is for bfloat16 states and these values are {bits}: choose zstd or none")
    return SCALED[name](width)
