"""Codecs: lossless ones give every bit back, lossy ones keep their bounds, Zarr's readers agree, damage is told."""

import concurrent.futures
import hashlib
import json
import struct
import subprocess
import sys
import threading
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs import Blosc

from store import bits
from store.codecs import CODECS, SCALED, codec, decode_blosc, encode_blosc
from store.errors import Refusal

NAN = bits.BFLOAT16_NAN
LOSSLESS = ("none", "zstd", "planes")
LOSSY = ("int8", "fp8")
DTYPES = {"bfloat16": "uint16", "float32": "float32", "float16": "float16"}


def states(rows=64, width=96, real=None, seed=0):
    """Hidden states as they are: channels and tokens of different size, six massive channels, padding at the end."""
    rng = np.random.default_rng(seed)
    channels = rng.lognormal(0, 0.6, width)
    channels[rng.choice(width, min(6, width), replace=False)] *= 200
    values = rng.standard_normal((rows, width)) * channels * rng.lognormal(0, 0.2, (rows, 1))
    words = bits.from_float32(values.astype(np.float32))
    words[rows if real is None else real :] = NAN
    return words


def of(name, rows):
    return codec(name, rows.dtype, rows.shape[-1], "bfloat16" if rows.dtype == np.uint16 else rows.dtype.name)


def decoded(name, rows, n=None, encoded=None):
    chunk_codec = of(name, rows)
    out = np.full((len(rows) if n is None else n, *rows.shape[1:]), 77, rows.dtype)
    chunk_codec.decode_into(chunk_codec.encode(rows) if encoded is None else encoded, out, len(rows))
    return out


def entropy_bound(words):
    """16 bits over the order-0 entropy of the values: what no coder without context beats."""
    share = np.bincount(words.reshape(-1), minlength=65536) / words.size
    share = share[share > 0]
    return 16 / -(share * np.log2(share)).sum()


# Chunks of any shape: any bits at all, few values (so that something repeats), constants.
any_bits = st.sampled_from(["uint16", "float32", "float16"]).flatmap(
    lambda dtype: hnp.arrays(
        f"u{np.dtype(dtype).itemsize}",
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.one_of(
            st.integers(0, 2 ** (8 * np.dtype(dtype).itemsize) - 1), st.sampled_from([0, 0x3F80, 0x7FC0, 0x7F7F])
        ),
        fill=st.sampled_from([0, NAN]),
    ).map(lambda words: words.view(dtype))
)


@settings(max_examples=120, deadline=None)
@given(rows=any_bits, cut=st.floats(0, 1))
def test_lossless_codecs_give_every_bit_back_whole_or_the_first_rows(rows, cut):
    n = round(cut * len(rows))
    for name in LOSSLESS if rows.dtype == np.uint16 else ("none", "zstd"):
        assert decoded(name, rows).tobytes() == rows.tobytes()
        assert decoded(name, rows, n).tobytes() == rows[:n].tobytes()


@settings(max_examples=120, deadline=None)
@given(rows=any_bits)
def test_stock_blosc_decodes_our_frames_whatever_is_in_them(rows):
    assert Blosc().decode(encode_blosc(rows)) == rows.tobytes()


@pytest.mark.parametrize("dtype", ["uint16", "float32", "float16", "float64", "uint8"])
@pytest.mark.parametrize("items", [1, 2, 63, 127, 128, 129, 255, 256, 4095, 65536, 65537, 200_001])
@pytest.mark.parametrize("kind", ["constant", "noise", "halves"])
def test_stock_blosc_decodes_our_frames_at_every_size(dtype, items, kind):
    rng = np.random.default_rng(items)
    values = np.frombuffer(rng.bytes(items * np.dtype(dtype).itemsize), dtype).copy()
    if kind != "noise":
        values[slice(None) if kind == "constant" else slice(items // 2)] = 1
    frame = encode_blosc(values)
    assert Blosc().decode(frame) == values.tobytes()
    again = np.empty_like(values)
    decode_blosc(memoryview(frame), again, again.size)
    assert again.tobytes() == values.tobytes()


def test_blosc_frames_of_others_are_read_too():
    rows = states(300, 500)
    for settings_ in ({"shuffle": 1}, {"shuffle": 0}, {"shuffle": 1, "blocksize": 4096}, {"clevel": 0}):
        frame = Blosc(**({"cname": "zstd", "clevel": 1} | settings_)).encode(rows)
        assert (decoded("zstd", rows, encoded=frame) == rows).all()


@pytest.mark.parametrize("name", ["zstd", "planes", *LOSSY])
def test_padding_costs_next_to_nothing(name):
    full = states(230, 256)
    padded = np.concatenate([full, np.full((26, 256), NAN, np.uint16)])
    assert len(of(name, padded).encode(padded)) < 1.01 * len(of(name, full).encode(full))
    nothing = np.full_like(full, NAN)
    assert len(of(name, nothing).encode(nothing)) < 100
    assert (decoded(name, nothing) == NAN).all()


def test_planes_beats_the_entropy_bound_and_zstd_beats_plain_blosc():
    rows = states(256, 1024)
    size = {name: len(of(name, rows).encode(rows)) for name in CODECS}
    blosc = len(Blosc(cname="zstd", clevel=1, shuffle=1, blocksize=512 * 1024).encode(rows))
    assert size["none"] == rows.nbytes
    assert rows.nbytes / size["planes"] > entropy_bound(rows)
    assert size["zstd"] < blosc
    assert rows.nbytes / size["int8"] > 2
    assert rows.nbytes / size["fp8"] > 2.3


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.01), ("fp8", 0.03)])
def test_lossy_codecs_keep_their_relative_error_in_every_channel(name, bound):
    rows = states(230, 512)
    value, got = bits.to_float32(rows).astype(float), bits.to_float32(decoded(name, rows))
    error = np.sqrt(((got - value) ** 2).mean(axis=0) / (value**2).mean(axis=0))
    assert np.sqrt(((got - value) ** 2).sum() / (value**2).sum()) < bound
    assert error.mean() < bound
    assert error.max() < 2 * bound


@settings(max_examples=80, deadline=None)
@given(
    rows=hnp.arrays(
        np.uint16,
        st.tuples(st.integers(1, 20), st.integers(1, 30)),
        elements=st.one_of(st.integers(0, 65535), st.integers(0x3C00, 0x4300)),
        fill=st.sampled_from([0, NAN]),
    )
)
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_codecs_take_any_bits_nan_stays_nan_and_errors_are_bounded(name, rows):
    with np.errstate(invalid="ignore"):  # signalling NaN
        value, got = bits.to_float32(rows).astype(float), bits.to_float32(decoded(name, rows)).astype(float)
    kept = np.abs(value) < 2.0**127
    assert np.isnan(got[~kept]).all()
    assert np.isfinite(got[kept]).all()
    # A channel's scale is its largest value, at least 2^-32 of the largest channel's, rounded up by at most 1.25; a
    # token's is the largest share of them, at least 2^-32, rounded up likewise.
    most_d = np.max(np.where(kept, np.abs(value), 0), axis=0, initial=0)
    share_r = np.max(np.where(kept, np.abs(value), 0) / np.maximum(most_d, 1e-45), axis=1, initial=0)
    scale_d = 1.25 * np.maximum(most_d, most_d.max() * 2.0**-31)
    step = scale_d * (1.25 * np.maximum(share_r, 2.0**-31))[:, None]
    allowed = step / 127 if name == "int8" else np.maximum(np.abs(value) / 15, step / 448 / 2**9)
    rounding = np.abs(value) * 2.0**-7 + 1e-38  # bfloat16 itself, and its subnormals
    assert (np.abs(got - value)[kept] <= (allowed + rounding)[kept]).all()


def test_zero_rows_channels_and_single_values_survive_the_lossy_codecs():
    rows = states(40, 64)
    rows[3], rows[:, 5] = 0, 0
    for name in LOSSY:
        got = bits.to_float32(decoded(name, rows))
        assert (got[3] == 0).all()
        assert (got[:, 5] == 0).all()
        assert (bits.to_float32(decoded(name, np.full((1, 1), 0x3F80, np.uint16))) == 1).all()


def test_fp8_rounds_as_e4m3fn_does():
    ratios = np.concatenate([np.linspace(-1, 1, 20_001), 2.0 ** np.arange(-25, 1)]).astype(np.float32)
    codes = np.empty(ratios.shape, np.uint8)
    fp8 = SCALED["fp8"](1)
    expected = (ratios * np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    fp8._codes(ratios.copy(), codes)
    assert (codes == expected.view(np.uint8)).all()
    back = np.empty(256, np.float32)
    fp8._ratios(np.arange(256, dtype=np.uint8), back)
    real = np.arange(256) % 128 != 127
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_allclose(back[real] * 448, every[real], rtol=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_equal_states_give_equal_bytes_in_any_thread(name):
    chunks = [states(48, 128, real=40, seed=seed) for seed in range(24)]
    chunk_codec = of(name, chunks[0])
    expected = [chunk_codec.encode(chunk) for chunk in chunks]
    apart = threading.Barrier(4)

    def work(j):
        apart.wait()
        for i in np.random.default_rng(j).permutation(len(chunks)):
            out = np.empty_like(chunks[i][: 30 + j])
            chunk_codec.decode_into(expected[i], out, 48)
            assert chunk_codec.encode(chunks[i]) == expected[i]
            if chunk_codec.lossless:
                assert (out == chunks[i][: 30 + j]).all()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_the_scales_of_a_frame_are_the_same_on_every_machine():
    # Integers and single IEEE operations only; what zstd makes of them may change with its version, so it is undone.
    noise = np.arange(2000, dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(7)
    rows = (noise % 0x580 + 0x3D00 + (noise >> np.uint64(11)) % 2 * 0x8000).astype("<u2").reshape(50, 40)
    digests = {}
    for name, kind in SCALED.items():
        base, channels, tokens, words = kind(40)._scales(rows)
        parts = [base.to_bytes(2, "little", signed=True), channels.tobytes(), tokens.tobytes(), words.tobytes()]
        digests[name] = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    assert digests == {
        "planes": "cff9a1bc24a2e7f6",
        "int8": "879c18062ccedff7",
        "fp8": "571f37326cfd18fc",
    }


DAMAGE = """
import sys, random
import numpy as np
from store.codecs import CODECS, codec
from tests.test_store_codecs import states, of
rows = states(40, 24, real=33)
draw = random.Random(int(sys.argv[1]))
told = tried = 0
for name in CODECS[1:]:
    chunk_codec = of(name, rows)
    whole = chunk_codec.encode(rows)
    out = np.empty_like(rows)
    cases = [whole[:n] for n in range(0, len(whole), 7)] + [whole + b"x"]
    for _ in range(3000):
        torn = bytearray(whole)
        # Headers most: their lengths and offsets are what could lead a decoder astray.
        for _ in range(draw.choice([1, 1, 3])):
            torn[draw.randrange(draw.choice([48, len(torn)]))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        cases.append(bytes(torn))
    for j, torn in enumerate(cases):
        tried += 1
        try:
            chunk_codec.decode_into(torn, out[: draw.choice([33, 40, 12])], 40)
            assert j >= len(cases) - 3000, (name, "a torn chunk was taken", len(torn))
        except ValueError:
            told += 1
print(tried, told)
"""


def test_damaged_chunks_raise_value_error_or_decode_but_never_crash():
    # In a process of its own: a crash would be of C code.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DAMAGE, "1"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tried, told = map(int, done.stdout.split())
    assert told > tried / 10


@pytest.mark.parametrize("name", CODECS)
def test_a_chunk_of_another_size_is_refused(name):
    rows = states(16, 24)
    encoded = of(name, rows).encode(rows)
    for other in (states(17, 24), states(15, 24), states(16, 25)):
        with pytest.raises(ValueError, match=r"chunk|frame|bytes"):
            of(name, other).decode_into(encoded, np.empty_like(other), len(other))


def test_unknown_codecs_and_unfit_values_are_refused_with_the_mend():
    with pytest.raises(Refusal, match=r"'gzip' is not known: choose one of none, zstd, planes"):
        codec("gzip", np.dtype("uint16"), 8, "bfloat16")
    for name in ("planes", *LOSSY):
        with pytest.raises(Refusal, match=f"'{name}' is for bfloat16 states and these values are float32: choose zstd"):
            codec(name, np.dtype("float32"), 8, "float32")
    assert [codec(name, np.dtype("uint16"), 8, "bfloat16").lossless for name in CODECS] == [True] * 3 + [False] * 2


# ------------------------------------------------------------------------------------------------------ Zarr's readers


def array_of_our_frames(folder, name, chunks, sharded):
    """A Zarr array whose metadata are zarr-python's and whose chunks are the bytes of our encoder."""
    _, r, d = chunks.shape
    chunk_codec = of(name, chunks[0])
    zarr.create_array(
        folder,
        shape=chunks.shape,
        dtype=chunks.dtype,
        chunks=(1, r, d),
        shards=chunks.shape if sharded else None,
        compressors=chunk_codec.zarr_compressors() or None,
        filters=None,
        fill_value=NAN if chunks.dtype == np.uint16 else np.nan,
    )
    encoded = [chunk_codec.encode(chunk) for chunk in chunks]
    if sharded:
        (folder / "c/0/0").mkdir(parents=True)
        ends = np.cumsum([len(chunk) for chunk in encoded])
        index = b"".join(
            struct.pack("<2Q", end - len(chunk), len(chunk)) for end, chunk in zip(ends, encoded, strict=True)
        )
        crc = google_crc32c.value(index).to_bytes(4, "little")
        (folder / "c/0/0/0").write_bytes(b"".join(encoded) + index + crc)
    else:
        for i, chunk in enumerate(encoded):
            (folder / f"c/{i}/0").mkdir(parents=True)
            (folder / f"c/{i}/0/0").write_bytes(chunk)


def read_by_zarr(folder):
    return zarr.open_array(folder, mode="r")[:]


def read_by_zarrs(folder):
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return zarr.open_array(folder, mode="r")[:]


def read_by_tensorstore(folder):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return tensorstore.open(spec, read=True).result().read().result()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("bits_", DTYPES)
@pytest.mark.parametrize("reader", [read_by_zarr, read_by_zarrs, read_by_tensorstore])
@pytest.mark.parametrize("width", [1, 96])
def test_stock_readers_of_zarr_decode_zstd_and_none(tmp_path, reader, bits_, sharded, width):
    chunks = np.stack([states(32, width, real=real, seed=real) for real in (32, 20, 0)])
    if bits_ != "bfloat16":
        chunks = bits.to_float32(chunks).astype(bits_)
    for name in ("zstd", "none"):
        array_of_our_frames(tmp_path / name, name, chunks, sharded)
        assert reader(tmp_path / name).tobytes() == chunks.tobytes()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", SCALED)
def test_zarr_finds_our_codecs_by_their_entry_points_and_reads_and_writes_with_them(tmp_path, name, sharded):
    chunks = np.stack([states(32, 96, real=real, seed=real) for real in (32, 20, 0)])
    array_of_our_frames(tmp_path / "ours", name, chunks, sharded)
    expected = np.stack([decoded(name, chunk) for chunk in chunks])
    script = "import sys, zarr; print(zarr.open_array(sys.argv[1], mode='r')[:].astype('<u2').tobytes().hex())"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "ours"], capture_output=True, text=True)
    assert done.stdout.strip() == expected.astype("<u2").tobytes().hex(), done.stderr[-2000:]
    stored = json.loads((tmp_path / "ours/zarr.json").read_text())["codecs"]
    stored = stored[0]["configuration"]["codecs"] if sharded else stored
    assert stored[-1] == {"name": f"analysis_by_proxy.{name}", "configuration": {"width": 96}}
    array = zarr.open_array(tmp_path / "ours", mode="r+")
    array[:] = chunks[::-1]
    assert (array[:] == expected[::-1]).all()


def test_zarr_says_which_codec_it_lacks_and_ours_say_what_they_are_for(tmp_path):
    array_of_our_frames(tmp_path / "a", "planes", states(8, 16)[None], False)
    metadata = (tmp_path / "a/zarr.json").read_text()
    (tmp_path / "a/zarr.json").write_text(metadata.replace("analysis_by_proxy.planes", "analysis_by_proxy.later"))
    with pytest.raises(Exception, match=r"analysis_by_proxy\.later"):
        zarr.open_array(tmp_path / "a", mode="r")
    compressors = codec("planes", np.dtype("uint16"), 16, "bfloat16").zarr_compressors()
    for shape, dtype in (((4, 8), "uint16"), ((4, 16), "float32")):
        with pytest.raises(ValueError, match="of width 16 is for uint16"):
            zarr.create_array(tmp_path / "b", shape=shape, dtype=dtype, chunks=shape, compressors=compressors)
