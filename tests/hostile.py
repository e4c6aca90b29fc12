"""A data set of rows that are damaged in every way we know, each with what must become of it, written down beforehand.

Truth is known before a picture is encoded, and a row's reason is this module's own word: nothing here asks the reader.
"""

import io
import string
import struct
import zlib
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms

UNDECODABLE, TRUNCATED, ABSURD = "image cannot be decoded", "image truncated", "absurd size"
SIZE, NO_ID, DUPLICATE = "width/height disagree with the image", "no id", "duplicate id"
EMPTY, LONG, SPECIAL = "empty prompt", "prompt too long", "prompt contains special tokens"
BOX, OUTSIDE, AREA, NO_BOX = (
    "box is not x1 < x2, y1 < y2",
    "box outside the image",
    "box area out of range",
    "no box",
)
SHARD, ROW = "shard cannot be read", "row cannot be read"

SCHEMA = pa.schema(
    {
        "omni_edit_id": pa.string(),
        "task": pa.string(),
        "src_img": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "edited_img": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "edited_prompt_list": pa.list_(pa.string()),
        "width": pa.int64(),
        "height": pa.int64(),
        "o_score": pa.float64(),
        "box": pa.list_(pa.float64()),
    }
)


@dataclass(frozen=True)
class Row:
    """A row of the data set and what must become of it.

    ``reason`` is null where it must be kept; then ``truth`` is the upright RGB picture ``[h, w, 3]``, from which a
    decoder may be off by ``tolerance`` (the mean over the picture, in 255ths), and ``instruction`` the exact text.
    """

    kind: str
    cells: dict
    reason: str | None = None
    truth: np.ndarray | None = None
    tolerance: float = 0.0
    shard: str = ""
    number: int | None = 0
    rows: int = 1

    @property
    def sample_id(self):
        return None if self.cells.get("omni_edit_id") is None else str(self.cells["omni_edit_id"])

    @property
    def instruction(self):
        prompts = self.cells["edited_prompt_list"]
        return (prompts if isinstance(prompts, str) else next(p for p in prompts if p and p.strip())).strip()


def encoded(picture, kind="PNG", **settings):
    """A picture as a file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def chunk(name, data):
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size, depth, colour, rows, before=b"", after=b""):
    """A PNG that Pillow does not write: any bit depth and chunks of one's own before and after the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


@dataclass
class Hostile:
    """Draws rows; every kind of damage is a method or an entry of a table, and every draw is from ``rng``."""

    rng: np.random.Generator
    drawn: int = 0
    frame = (72, 60)

    def smooth(self, width=None, height=None):
        """A picture that JPEG keeps well: ``[h, w, 3]`` uint8."""
        width, height = width or int(self.rng.integers(30, 150)), height or int(self.rng.integers(30, 150))
        noise = Image.fromarray(self.rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        return np.asarray(noise.resize((width, height), Image.BICUBIC))

    def words(self, count):
        letters = self.rng.choice(list(string.ascii_lowercase), (count, 6))
        return " ".join("".join(word) for word in letters)

    def row(self, kind, picture=None, reason=None, truth=None, tolerance=0.0, **changes):
        """A good row, but for ``changes``; ``picture`` is the file, ``truth`` what it shows."""
        if truth is None and picture is None:
            truth = self.smooth()
        if picture is None:
            picture = encoded(Image.fromarray(truth))
        height, width = (48, 64) if truth is None else truth.shape[:2]
        self.drawn += 1
        cells = {
            "omni_edit_id": f"{kind} {self.drawn}",
            "task": "swap",
            "src_img": {"bytes": picture, "path": None},
            "edited_img": {"bytes": b"never read", "path": None},
            "edited_prompt_list": [f"{self.words(3)} {self.drawn}", "not this one"],
            "width": None if truth is None else width,
            "height": None if truth is None else height,
            "o_score": 9.5,
            "box": [width * 0.2, height * 0.2, width * 0.7, height * 0.6],
        }
        return Row(kind, cells | changes, reason, truth, tolerance)

    # Pictures that can be used.

    def good_pictures(self):
        """Functions that draw a row each, its picture in one of the ways in which pictures are kept."""
        made = {
            "jpeg": self.jpeg,
            "progressive": lambda: self.jpeg(progressive=True),
            "icc": lambda: self.jpeg(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
            "broken exif": lambda: self.jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken"),
            "png": lambda: self.row("png"),
            "bmp": lambda: self.lossless("bmp", "BMP"),
            "webp": lambda: self.lossless("webp", "WEBP", lossless=True),
            "tiff": lambda: self.lossless("tiff", "TIFF", compression="tiff_lzw"),
            "pages": lambda: self.lossless("pages", "TIFF", save_all=True, append_images=self.others()),
            "gif": self.gif,
            "animated gif": lambda: self.gif(save_all=True, append_images=[p.quantize(9) for p in self.others()]),
            "animated webp": lambda: self.lossless(
                "animated webp", "WEBP", lossless=True, save_all=True, append_images=self.others()
            ),
            "animated png": lambda: self.lossless("animated png", "PNG", save_all=True, append_images=self.others()),
            "two in one jpeg": lambda: self.jpeg("MPO", save_all=True, append_images=self.others()),
            "bilevel": self.bilevel,
            "grey": self.grey,
            "grey and alpha": lambda: self.with_alpha("LA"),
            "colour and alpha": lambda: self.with_alpha("RGBA"),
            "palette": lambda: self.palette({}),
            "palette, one colour clear": lambda: self.palette({"transparency": 3}),
            "palette with alpha": lambda: self.palette({"transparency": self.rng.bytes(32)}),
            "cmyk": self.cmyk,
            "grey of 16 bits": lambda: self.grey16("PNG"),
            "tiff of 16 bits": lambda: self.grey16("TIFF"),
            "colour of 16 bits": self.colour16,
            "exif behind the pixels": self.late_exif,
            "as long as may be": self.long,
            "columns of what is stored": self.turned_columns,
        }
        for orientation in range(1, 9):
            for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
                made[f"{kind} turned {orientation}"] = lambda o=orientation, k=kind: self.turned(k, o)
        return made

    def others(self):
        """Frames that come after the one that counts."""
        return [Image.new("RGB", self.frame, colour) for colour in ("red", "blue")]

    def lossless(self, kind, form, **settings):
        truth = self.smooth(*self.frame)
        return self.row(kind, encoded(Image.fromarray(truth), form, **settings), truth=truth)

    def jpeg(self, form="JPEG", **settings):
        truth = self.smooth()
        picture = encoded(Image.fromarray(truth), form, quality=95, subsampling=0, **settings)
        return self.row(form, picture, truth=truth, tolerance=3)

    def gif(self, **settings):
        picture = Image.fromarray(self.smooth(*self.frame)).quantize(40)
        return self.row("gif", encoded(picture, "GIF", **settings), truth=np.asarray(picture.convert("RGB")))

    def bilevel(self):
        truth = self.smooth()[:, :, :1] > 127
        return self.row(
            "bilevel", encoded(Image.fromarray(truth[..., 0])), truth=np.repeat(truth, 3, 2) * np.uint8(255)
        )

    def grey(self):
        truth = np.repeat(self.smooth()[:, :, :1], 3, 2)
        return self.row("grey", encoded(Image.fromarray(truth[..., 0])), truth=truth)

    def with_alpha(self, mode):
        pixels = self.smooth()
        if mode == "LA":
            pixels = np.repeat(pixels[..., :1], 3, 2)
        alpha = self.smooth(*pixels.shape[1::-1])[..., :1]
        picture = Image.fromarray(np.concatenate([pixels, alpha], 2)).convert(mode)
        return self.row(mode, encoded(picture), truth=on_white(pixels, alpha), tolerance=1)

    def palette(self, settings):
        picture = Image.fromarray(self.smooth()).quantize(32)
        index, colours = np.asarray(picture), np.array(picture.getpalette(), dtype=np.uint8).reshape(-1, 3)
        alpha = np.full(256, 255)
        if isinstance(clear := settings.get("transparency"), int):
            alpha[clear] = 0
        elif clear:
            alpha[: len(clear)] = list(clear)
        truth = on_white(colours[index], alpha[index][..., None])
        return self.row("palette", encoded(picture, **settings), truth=truth, tolerance=1)

    def cmyk(self):
        """As Adobe writes it: inverted, and marked so."""
        inks = np.concatenate([self.smooth(*self.frame), self.smooth(*self.frame)[..., :1] // 2], 2)
        picture = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=95, subsampling=0)
        assert b"Adobe" in picture
        truth = (255.0 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
        return self.row("cmyk", picture, truth=truth.round().astype(np.uint8), tolerance=3)

    def grey16(self, form):
        values = self.smooth()[..., 0].astype(np.uint16) * 257
        values += self.rng.integers(-100, 100, values.shape).clip(-values.astype(int), 65535 - values).astype(np.uint16)
        truth = np.repeat((values / 257).round().astype(np.uint8)[..., None], 3, 2)
        return self.row("16 bits", encoded(Image.fromarray(values), form), truth=truth)

    def colour16(self):
        values = self.smooth().astype(np.uint16) * 257
        picture = png(values.shape[1::-1], 16, 2, [row.astype(">u2").tobytes() for row in values])
        return self.row("colour16", picture, truth=(values / 257).round().astype(np.uint8), tolerance=1)

    def turned(self, form, orientation):
        """The camera was held askew: ``truth`` is what a viewer shows."""
        truth = self.smooth()
        # EXIF says where the first row and the first column of what is stored belong.
        stored = {
            1: truth,
            2: truth[:, ::-1],
            3: truth[::-1, ::-1],
            4: truth[::-1],
            5: truth.swapaxes(0, 1),
            6: truth.swapaxes(0, 1)[::-1],
            7: truth[::-1, ::-1].swapaxes(0, 1),
            8: truth.swapaxes(0, 1)[:, ::-1],
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        settings = {"TIFF": {"tiffinfo": exif}, "JPEG": {"exif": exif, "quality": 95, "subsampling": 0}}
        settings |= {"WEBP": {"exif": exif, "lossless": True}, "PNG": {"exif": exif}}
        picture = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, **settings[form])
        return self.row(f"{form} turned {orientation}", picture, truth=truth, tolerance=3 * (form == "JPEG"))

    def late_exif(self):
        truth = self.smooth()
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = np.rot90(truth)
        rows = [row.tobytes() for row in stored]
        picture = png(stored.shape[1::-1], 8, 2, rows, after=chunk(b"eXIf", exif.tobytes()[6:]))
        return self.row("late exif", picture, truth=truth)

    def long(self):
        return self.row("long", truth=np.repeat(self.smooth(20_000, 100)[:, :, :1], 3, 2))

    def turned_columns(self):
        """The columns say how the picture is stored, not how it is shown."""
        row = self.turned("PNG", 6)
        cells = row.cells
        return replace(row, cells=cells | {"width": cells["height"], "height": cells["width"]})

    # Pictures that cannot.

    def bad_pictures(self):
        return {
            "cut in jpeg's header": lambda: self.cut("JPEG", UNDECODABLE),
            "cut in jpeg's pixels": lambda: self.cut("JPEG", TRUNCATED),
            "cut in progressive": lambda: self.cut("JPEG", TRUNCATED, progressive=True),
            "cut in png's header": lambda: self.cut("PNG", UNDECODABLE),
            "cut in png's pixels": lambda: self.cut("PNG", TRUNCATED),
            "cut in gif": lambda: self.half("GIF", TRUNCATED),
            "cut in webp": lambda: self.half("WEBP", UNDECODABLE),
            "cut in bmp": lambda: self.half("BMP", TRUNCATED),
            "cut in tiff": lambda: self.half("TIFF", TRUNCATED),
            "garbage": lambda: self.row("garbage", self.rng.bytes(int(self.rng.integers(1, 3000))), UNDECODABLE),
            "no bytes": lambda: self.row("no bytes", b"", UNDECODABLE),
            "null struct": lambda: self.row("null struct", b"", UNDECODABLE, src_img=None),
            "path alone": lambda: self.row("path", b"", UNDECODABLE, src_img={"bytes": None, "path": "/etc/passwd"}),
            "postscript": lambda: self.row("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n", UNDECODABLE),
            "html": lambda: self.row("html", b"<html><body>404 Not Found</body></html>", UNDECODABLE),
            "floats": lambda: self.mode_of_no_range(np.float32([0.5, np.nan])),
            "integers of 32 bits": lambda: self.mode_of_no_range(np.int32([1, 2**30])),
            "one pixel": lambda: self.absurd(1, 1),
            "13 wide": lambda: self.absurd(13, 500),
            "20,000 by 20": lambda: self.absurd(20_000, 20),
            "20,001 wide": lambda: self.absurd(20_001, 101),
            "bomb": lambda: self.row("bomb", self.bomb(), ABSURD),
            "bomb as bmp": lambda: self.row("bomb as bmp", self.bomb_as_bmp(), ABSURD),
            "lying width": lambda: self.row("lying width", reason=SIZE, width=7),
            "lying height": lambda: self.row("lying height", reason=SIZE, height=-1),
            "lying width alone": lambda: self.row("lying width alone", reason=SIZE, width=7, height=None),
        }

    def cut(self, form, reason, **settings):
        settings |= {"quality": 95} if form == "JPEG" else {}
        truth = self.smooth()
        whole = encoded(Image.fromarray(truth), form, **settings)
        if form == "JPEG":
            start = whole.index(b"\xff\xda")
            first, last = (0, start) if reason is UNDECODABLE else (start + 14, len(whole) - 2)
        else:
            start = whole.index(b"IDAT") + 4
            first, last = (0, start - 4) if reason is UNDECODABLE else (start, len(whole) - 17)
        return self.row("cut", whole[: int(self.rng.integers(first, last + 1))], reason, truth)

    def half(self, form, reason):
        truth = self.smooth()
        whole = encoded(Image.fromarray(truth), form)
        return self.row("half", whole[: len(whole) // 2], reason, truth)

    def mode_of_no_range(self, values):
        return self.row("no range", encoded(Image.fromarray(np.resize(values, (40, 50))), "TIFF"), UNDECODABLE)

    def absurd(self, width, height):
        return self.row("absurd", encoded(Image.new("L", (width, height))), ABSURD, width=width, height=height)

    def bomb(self):
        return png((60_000, 60_000), 1, 0, [])

    def bomb_as_bmp(self):
        whole = bytearray(encoded(Image.new("RGB", (40, 40)), "BMP"))
        whole[18:26] = struct.pack("<ii", 60_000, 60_000)
        return bytes(whole)

    # Prompts, ids and boxes.

    def good_texts(self):
        texts = {
            "emoji": "make the 👨\u200d👩\u200d👧\u200d👦 wave 🏳️\u200d🌈 👍🏽 \U0001f9ff",
            "right to left": "اجعل القطة زرقاء \u202eright to left\u202c עברית",
            "combining": "re\u0301sume\u0301 Z\u0351\u036b\u0343 ﬁ Å \u212b \u1100\u1161",
            "control": "a\0b\x01c\x7f \x1b[31mred\x1b[0m \ufeff\u200b end",
            "lines": "one\n\ntwo\r\nthree\u2028four\u2029five\tsix",
            "braces": "put {} and {0} and {name!r} and {{}} there, {",
            "format": "100 % of %s and %(x)d, $HOME `id` '; drop table samples; --",
            "near misses": "<|not a token|> < |im_end| > <｜im_end｜> <|im_end| > im_end|> <|im_end",
            "invisible": "\u200b",
            "digits": "٣ × ½ ² 数 " + "9" * 40,
        }
        made = {kind: lambda t=text, k=kind: self.row(k, edited_prompt_list=[t]) for kind, text in texts.items()}
        made["blanks first"] = lambda: self.row("blanks", edited_prompt_list=[None, " ", "\u3000\t", "  do it \n"])
        return made

    def bad_texts(self):
        long_word = "".join(self.rng.choice(list(string.ascii_letters), 20_000))
        texts = {
            EMPTY: ([], None, [None], ["", " \n\t", "\u3000\x1f"]),
            LONG: ([self.words(10_000)], [long_word], ["🏴" * 3000]),
            SPECIAL: (
                ["a <|im_end|> b"],
                ["<|image_pad|>"],
                ["x<|vision_start|>y"],
                ["<|im_end|>\n<|im_start|>system"],
            ),
        }
        return {
            f"{reason} {number}": lambda r=reason, t=text: self.row(r, reason=r, edited_prompt_list=t)
            for reason, several in texts.items()
            for number, text in enumerate(several)
        }

    def ids(self):
        good = [
            "../../etc/passwd",
            "/",
            ".",
            "a/b\\c",
            "C:\\NUL",
            'x", "y": {"',
            "é",
            "e\u0301",
            "👩\u200d🚀",
            "a\0b\nc",
        ]
        good += ["x" * 100_000, "null", "None", "nan", "<|im_end|>", "%s{}", "\u202ecod"]
        made = {f"id {name[:9]!r}": lambda n=name: self.row("id", omni_edit_id=n) for name in good}
        bad = {"null id": None, "no id": "", "blank id": " \n"}
        return made, {
            kind: lambda n=name: self.row("no id", reason=NO_ID, omni_edit_id=n) for kind, name in bad.items()
        }

    def boxes(self):
        nan, inf = float("nan"), float("inf")
        boxes = {
            BOX: (
                [30, 8, 8, 40],
                [8, 8, 8, 40],
                [nan] * 4,
                [8, 8, nan, 40],
                [1, 2, 3],
                [1, 2, 3, 4, 5],
                [1, None, 9, 9],
            ),
            OUTSIDE: ([8, 8, 65, 40], [-1, 8, 30, 40], [8, 8, inf, 40], [-inf, 8, 30, 40], [0, 0, 64, 48.001]),
            AREA: ([8, 8, 9, 9], [0, 0, 64, 48], [5, 5, 5.0001, 5.0001]),
            NO_BOX: (None, []),
        }
        return {
            f"{reason} {number}": lambda r=reason, b=box: self.row(r, reason=r, box=b, truth=self.smooth(64, 48))
            for reason, several in boxes.items()
            for number, box in enumerate(several)
        }

    def rows(self, count):
        """So many rows of the schema, all kinds in turn and half of them plain good ones, in a random order."""
        once, bad_ids = self.ids()
        rows = [make() for make in once.values()]
        kinds = (
            self.good_pictures() | self.bad_pictures() | self.good_texts() | self.bad_texts() | bad_ids | self.boxes()
        )
        rows += [make() for make in kinds.values()]
        plain = cycle([self.jpeg, lambda: self.row("plain")])
        again = cycle(self.rng.permutation(list(kinds)).tolist())
        while len(rows) < count - count // 20:
            rows.append(next(plain)() if self.rng.random() < 0.5 else kinds[next(again)]())
        self.rng.shuffle(rows)
        return self.with_duplicates(rows, count)

    def with_duplicates(self, rows, count):
        """Rows that come later and have the id of a row that is kept; or of a bad one, which is no reason."""
        kept = [row.sample_id for row in rows if row.reason is None]
        lost = [row.sample_id for row in rows if row.reason in (TRUNCATED, BOX)]
        while len(rows) < count - 1:
            rows.append(self.row("again", reason=DUPLICATE, omni_edit_id=str(self.rng.choice(kept))))
        return [*rows, self.row("after a bad one", omni_edit_id=lost[0])]


def on_white(pixels, alpha):
    """What shows where a picture of some transparency lies on white."""
    return (pixels * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).round().astype(np.uint8)


def table(rows, schema=SCHEMA):
    return pa.Table.from_pylist([row.cells for row in rows], schema=schema)


def write_shards(folder, rows, shards, name="train-{:05}.parquet", group_size=25):
    """The rows in so many shards, in order; the same rows with their places."""
    folder.mkdir(parents=True, exist_ok=True)
    placed = []
    for shard, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        part = [rows[number] for number in part]
        pq.write_table(table(part), folder / name.format(shard), row_group_size=group_size)
        placed += [replace(row, shard=name.format(shard), number=number) for number, row in enumerate(part)]
    return placed
