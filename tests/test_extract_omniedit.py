"""Every row of a data set becomes a sample or is set aside with its place and a reason; nothing else happens."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from extract.omniedit import STRATA, BadSample, Checks, Place, Sample, SetAside, decode, read, sample_of
from store.errors import Refusal

# Pillow says on the way what it finds odd in EXIF.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

NOISE = Image.effect_noise((64, 48), 60)


def encoded(picture=None, kind="PNG", **given):
    buffer = io.BytesIO()
    (picture or NOISE.convert("RGB")).save(buffer, kind, **given)
    return buffer.getvalue()


JPEG = encoded(kind="JPEG", quality=90)


def row(number, **changes):
    good = {
        "omni_edit_id": f"id{number}",
        "task": "swap",
        "src_img": {"bytes": JPEG, "path": None},
        "edited_img": {"bytes": b"never read", "path": None},
        "edited_prompt_list": [f"first {number}", f"last {number}"],
        "width": 64,
        "height": 48,
        "o_score": 9.5,
        "sc_reasoning": "fine",
        "box": [8, 8, 32, 40],
    }
    return good | changes


def image(data):
    return {"src_img": {"bytes": data, "path": None}}


def write(path, rows, **given):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **given)
    return path


def split(items):
    items = list(items)
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, SetAside)]


def ids(items):
    return [item.sample_id for item in items]


def test_a_good_row_comes_out_whole(tmp_path):
    path = write(tmp_path / "a.parquet", [row(0)])
    (sample,), aside = split(read(tmp_path))
    assert aside == []
    assert (sample.sample_id, sample.task, sample.instruction) == ("id0", "swap", "first 0")
    assert (sample.width, sample.height, sample.box) == (64, 48, (8, 8, 32, 40))
    assert sample.extra == {"o_score": 9.5, "sc_reasoning": "fine"}
    assert sample.place == ("a.parquet", 0)
    assert (sample.image.mode, sample.image.size) == ("RGB", (64, 48))
    assert sample.edited is None
    assert ids(read(path)) == ["id0"]


# Two entries of EXIF's first folder: turned to the right, and a text that is not where it is said to be.
ENTRIES = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\x0e\x01\x02\0\xff\0\0\0\xff\xff\xff\x7f" + bytes(4)

BAD = {
    "image truncated": image(JPEG[: len(JPEG) // 2]),
    "image cannot be decoded (no bytes)": image(None),
    "image cannot be decoded (UnidentifiedImageError)": image(b"not a picture"),
    "image cannot be decoded (UnidentifiedImageError) ": image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "empty prompt": {"edited_prompt_list": []},
    "empty prompt (blank)": {"edited_prompt_list": ["  ", "\n"]},
    "empty prompt (null)": {"edited_prompt_list": None},
    "absurd size (long)": image(encoded(Image.new("L", (20_020, 101)))),
    "absurd size (thin)": image(encoded(Image.new("L", (4000, 16)))),
    "absurd size (small)": image(encoded(Image.new("L", (13, 40)))),
    "width/height disagree with the image": {"width": 65},
    "width/height disagree with the image (one is given)": {"width": 65, "height": None},
    "image cannot be decoded (floats)": image(encoded(Image.new("F", (64, 48)), "TIFF")),
    "box outside the image": {"box": [8, 8, 65, 40]},
    "box is not x1 < x2, y1 < y2": {"box": [32, 8, 8, 40]},
    "box is not x1 < x2, y1 < y2 (three)": {"box": [1, 2, 3]},
    "box area out of range": {"box": [8, 8, 9, 9]},
    "box area out of range (all)": {"box": [0, 0, 64, 48]},
    "no id": {"omni_edit_id": None},
    "no id (blank)": {"omni_edit_id": " "},
    "duplicate id": {"omni_edit_id": "id0"},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_set_aside_with_its_place_and_reason(tmp_path, reason):
    write(tmp_path / "a.parquet", [row(0), row(1, **BAD[reason]), row(2)])
    good, (aside,) = split(read(tmp_path))
    assert ids(good) == ["id0", "id2"]
    assert aside.reason == reason.split(" (")[0]
    assert aside.place == ("a.parquet", 1)
    assert aside.rows == 1


def test_a_decompression_bomb_is_not_unpacked(tmp_path):
    bomb = bytearray(encoded(Image.new("1", (64, 48))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's width and height
    import zlib

    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    write(tmp_path / "a.parquet", [row(0), row(1, **image(bytes(bomb)), width=60_000, height=60_000)])
    _, (aside,) = split(read(tmp_path))
    assert aside.reason == "absurd size"


FILES = {
    "JPEG": {"quality": 90},
    "progressive JPEG": {"quality": 90, "progressive": True},
    "PNG": {},
    "GIF": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {},
    "packed TIFF": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize("kind", FILES)
def test_a_picture_cut_anywhere_is_whole_or_none(kind):
    whole = encoded(Image.effect_noise((24, 20), 60).convert("RGB"), kind.split()[-1], **FILES[kind])
    expected, shown = decode(whole), Counter()
    for end in range(len(whole)):
        try:
            assert decode(whole[:end]) == expected, end
        except BadSample as bad:
            assert reason_of(judged, whole[:end]) == bad.reason, end
            shown[bad.reason] += 1
        else:
            assert reason_of(judged, whole[:end]) is None, end
    assert set(shown) <= {"image truncated", "image cannot be decoded"}
    assert shown.total() > 0.9 * len(whole)


def judged(file):
    """The sample of a row with this picture (raises `BadSample`)."""
    free = {"width": None, "height": None, "box": None}
    return sample_of(row(0, **image(file), **free), Place("a.parquet", 0), Checks())


def reason_of(look, file):
    try:
        assert look(file) is not None
    except BadSample as bad:
        return bad.reason
    return None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_that_were_changed_give_a_picture_or_a_reason_and_never_an_error(data):
    kind = data.draw(st.sampled_from(sorted(FILES)))
    changed = bytearray(encoded(NOISE.convert("RGB"), kind.split()[-1], **FILES[kind]))
    for _ in range(data.draw(st.integers(1, 20))):
        # Most of what can go wrong does so in headers, which stand at the start (at the end of a TIFF).
        place = data.draw(st.one_of(st.integers(0, 200), st.integers(-200, -1), st.integers(0, len(changed) - 1)))
        changed[place % len(changed)] = data.draw(st.integers(0, 255))
    shown, checked = (reason_of(look, bytes(changed)) for look in (decode, lambda file: judged(file).image))
    assert shown == checked  # planning looks less closely, and sees as much


def test_the_size_that_planning_sees_is_that_of_the_picture_whatever_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = ("JPEG", "PNG", "WEBP", "TIFF")
    files = [encoded(kind=kind, **({"tiffinfo": exif} if kind == "TIFF" else {"exif": exif})) for kind in kinds]
    # EXIF that can be read but not written again, of which Pillow's own turning makes a picture that is not turned.
    files.append(encoded(kind="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + ENTRIES))
    write(tmp_path / "a.parquet", [row(n, **image(file), width=None, height=None) for n, file in enumerate(files)])
    for checked in (True, False):
        good, aside = split(read(tmp_path, check_pixels=checked))
        assert aside == []
        assert [(s.width, s.height) for s in good] == [s.image.size for s in good] == [(48, 64)] * len(files)


def test_planning_decodes_a_picture_once_and_a_later_look_at_headers_never(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", [row(0, **image(encoded(kind="PNG")))])
    loads = []
    real = PngImageFile.load_prepare
    monkeypatch.setattr(PngImageFile, "load_prepare", lambda self: loads.append(self) or real(self))
    assert len(list(read(tmp_path))) == len(loads) == 1
    assert len(list(read(tmp_path, check_pixels=False))) == len(loads) == 1


def test_without_pixel_checks_a_truncated_picture_is_found_on_access(tmp_path):
    write(tmp_path / "a.parquet", [row(0, **BAD["image truncated"])])
    (sample,), _ = split(read(tmp_path, check_pixels=False))
    with pytest.raises(ValueError, match="image truncated"):
        _ = sample.image


def test_no_box_is_not_a_bad_box(tmp_path):
    rows = [row(0, box=None), row(1, box=[]), row(2)]
    write(tmp_path / "a.parquet", rows)
    good, aside = split(read(tmp_path))
    assert [sample.box for sample in good] == [None, None, (8, 8, 32, 40)]
    assert aside == []


def test_the_area_bounds_are_settings(tmp_path):
    write(tmp_path / "a.parquet", [row(0, box=[8, 8, 9, 9]), row(1)])
    assert ids(split(read(tmp_path, min_area=0.0))[0]) == ["id0", "id1"]
    assert ids(split(read(tmp_path, max_area=0.01))[0]) == []


def test_prompts_are_chosen_as_asked_and_drawn_from_seed_and_id_alone(tmp_path):
    write(tmp_path / "a.parquet", [row(number) for number in range(30)])
    texts = {
        choice: [s.instruction.split()[0] for s in read(tmp_path, prompt=choice)]
        for choice in ("first", "last", "random")
    }
    assert set(texts["first"]) == {"first"}
    assert set(texts["last"]) == {"last"}
    assert set(texts["random"]) == {"first", "last"}
    shuffled = {s.sample_id: s.instruction.split()[0] for s in read(tmp_path, prompt="random", shuffle=True)}
    assert [shuffled[f"id{n}"] for n in range(30)] == texts["random"]
    assert [s.instruction.split()[0] for s in read(tmp_path, prompt="random", seed=1)] != texts["random"]


def test_what_objects_are_listed_is_said_by_number_kind_and_colour_and_unknown_where_none_are(tmp_path):
    ball = {"kind": "ball", "colour": "red", "box": [8, 8, 32, 40]}
    crate = {"kind": "crate", "colour": None, "box": None}
    listed = [[crate, ball], [crate], [None, ball], [], None]
    write(tmp_path / "a.parquet", [row(n, objects=objects) for n, objects in enumerate(listed)])
    good, _ = split(read(tmp_path))
    assert [tuple(sample.extra[name] for name in STRATA) for sample in good] == [
        (2, "ball", "red"), (1, None, None), (1, "ball", "red"), (None, None, None), (None, None, None)
    ]  # fmt: skip
    assert not any("objects" in sample.extra for sample in good)


def test_a_paraphrase_is_another_wording_of_the_first_around_the_others(tmp_path):
    wordings = [["a", "b", " ", "a ", "c"], ["a", "a"], ["a", "b"]]
    write(tmp_path / "a.parquet", [row(n, edited_prompt_list=given) for n, given in enumerate(wordings)])
    told = {n: {s.sample_id: s.instruction for s in split(read(tmp_path, prompt=n))[0]} for n in range(5)}
    assert told[0] == {"id0": "a", "id1": "a", "id2": "a"}
    assert [told[n] for n in (1, 2, 3, 4)] == [{"id0": text, "id2": "b"} for text in "bcbc"]
    (aside,) = split(read(tmp_path, prompt=1))[1]
    assert (aside.sample_id, aside.reason) == ("id1", "no other wording of the prompt")


def test_the_limit_counts_good_samples(tmp_path):
    write(tmp_path / "a.parquet", [row(0, edited_prompt_list=[]), row(1), row(2), row(3)])
    good, aside = split(read(tmp_path, 2))
    assert (ids(good), len(aside)) == (["id1", "id2"], 1)
    assert list(read(tmp_path, 0)) == []


def test_shuffling_permutes_all_rows_and_is_a_function_of_the_seed(tmp_path):
    for shard in range(3):
        rows = [row(10 * shard + number) for number in range(10)]
        write(tmp_path / f"{shard}.parquet", rows, row_group_size=4)
    in_order = [(s.sample_id, s.place) for s in read(tmp_path)]
    one, again, other = ([(s.sample_id, s.place) for s in read(tmp_path, shuffle=True, seed=n)] for n in (1, 1, 2))
    assert [name for name, _ in in_order] == [f"id{n}" for n in range(30)]
    assert one == again != other
    assert sorted(one) == sorted(other) == sorted(in_order)


def test_other_shards_go_on_when_one_is_damaged_or_lacks_a_column(tmp_path):
    write(tmp_path / "a.parquet", [row(0)])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    lacking = [row(1), row(2)]
    for bad in lacking:
        del bad["src_img"]
    write(tmp_path / "c.parquet", lacking)
    good, aside = split(read(tmp_path))
    assert ids(good) == ["id0"]
    assert [(item.sample_id, item.place.row, item.reason) for item in aside] == [
        (None, None, "shard cannot be read"),
        ("id1", 0, "missing column 'src_img'"),
        ("id2", 1, "missing column 'src_img'"),
    ]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_damaged_page_sets_the_rest_of_its_row_group_aside(tmp_path, shuffle):
    path = write(tmp_path / "a.parquet", [row(n) for n in range(8)], row_group_size=4, use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    (picture,) = (column for column in columns if column.path_in_schema == "src_img.bytes")
    damaged = bytearray(path.read_bytes())
    damaged[picture.data_page_offset : picture.data_page_offset + 30] = b"\xff" * 30
    path.write_bytes(damaged)
    good, aside = split(read(tmp_path, shuffle=shuffle))
    assert sorted(ids(good)) == ["id4", "id5", "id6", "id7"]
    assert sorted(item.place.row for item in aside) == [0, 1, 2, 3]
    assert {(item.reason, item.rows) for item in aside} == {("shard cannot be read", 1)}


def test_edited_pictures_are_read_only_when_asked_for(tmp_path):
    write(tmp_path / "a.parquet", [row(0, edited_img={"bytes": JPEG, "path": None}), row(1)])
    good, aside = split(read(tmp_path, edited=True))
    assert good[0].edited.size == (64, 48)
    assert ids(aside) == ["id1"]  # its edited picture is no picture
    assert ids(read(tmp_path)) == ["id0", "id1"]


def test_shards_of_the_split_are_preferred(tmp_path):
    write(tmp_path / "data" / "train-0.parquet", [row(0)])
    write(tmp_path / "data" / "dev-0.parquet", [row(1)])
    assert ids(read(tmp_path)) == ["id0"]
    assert ids(read(tmp_path, split="dev")) == ["id1"]


def test_what_is_no_data_set_is_refused_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    write(tmp_path / "lacking" / "a.parquet", [{"omni_edit_id": "a"}])
    for place, says in (
        ("nowhere", "no data at"),
        ("empty", "no parquet shard"),
        ("corrupt", "no usable parquet shard.*1 of 1 are damaged"),
        ("lacking", "no usable parquet shard"),
    ):
        with pytest.raises(Refusal, match=says) as refusal:
            read(tmp_path / place)
        assert "\n" not in str(refusal.value)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(kind="JPEG", exif=exif)


def deep_grey():
    return Image.fromarray(np.full((48, 64), 40_000, np.uint16))


def transparent():
    picture = Image.new("RGBA", (64, 48), (255, 0, 0, 255))
    picture.putpixel((0, 0), (9, 9, 9, 0))
    return picture


@pytest.mark.parametrize(
    ("data", "size", "corner"),
    [
        (encoded(Image.new("L", (64, 48), 7)), (64, 48), (7, 7, 7)),
        (encoded(Image.new("1", (64, 48), 1)), (64, 48), (255, 255, 255)),
        (encoded(deep_grey()), (64, 48), (156, 156, 156)),
        (encoded(transparent()), (64, 48), (255, 255, 255)),
        (encoded(transparent().convert("LA")), (64, 48), (255, 255, 255)),
        (encoded(Image.new("RGB", (64, 48), (10, 200, 30)).quantize(4)), (64, 48), (10, 200, 30)),
        (encoded(Image.new("CMYK", (64, 48), (0, 255, 255, 0)), "JPEG"), (64, 48), (254, 0, 0)),
        (turned(6), (48, 64), None),
        (turned(3), (64, 48), None),
    ],
    ids=["grey", "bilevel", "16-bit", "rgba", "la", "palette", "cmyk", "exif turned", "exif upside down"],
)
def test_pictures_of_every_mode_become_upright_rgb(tmp_path, data, size, corner):
    write(tmp_path / "a.parquet", [row(0, **image(data), box=None)])
    (sample,), _ = split(read(tmp_path))
    assert (sample.image.mode, sample.image.size, (sample.width, sample.height)) == ("RGB", size, size)
    if corner:
        assert np.abs(np.array(sample.image.getpixel((0, 0))) - corner).max() <= 1
