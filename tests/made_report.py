"""Findings, figures and samples made up for tests of the report, and a small reader of its HTML."""

import io
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from PIL import Image

from analysis import style
from analysis.finding import Drawn, Finding

LAYERS = ["embed", *map(str, range(12)), "final"]
HOSTILE = '<b>bold</b><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2"> \' &amp; ${title} $style'
RIGHT_TO_LEFT = "أزل الكرة الحمراء \u202e desrever \u2066 😀👩‍👩‍👧‍👦"
WORDS = " ".join(f"word{n}" for n in range(10_000))
VOID = {"meta", "link", "img", "input", "br"}
PROVENANCE = {
    "store": {"path": "data/store.zarr", "content_hash": "9f8e" * 16, "layers": LAYERS},
    "proxies": [{"name": f"joint-seed{seed}", "seed": seed, "hash": "3b1f" * 16} for seed in range(3)],
    "made": "2026-01-02T03:04:05+00:00",
}


def draw(folder, name, size=(6, 3)):
    """A figure as the analysis saves them."""
    with style.styled():
        figure, axes = plt.subplots(figsize=size)
        axes.plot(range(14), np.linspace(0.2, 0.6, 14), marker="o")
        axes.set_title(f"{name}: block 6 leads")
        style.save(figure, folder, name, pl.DataFrame({"layer": LAYERS, "iou": np.linspace(0.2, 0.6, 14)}), {"n": 9})
        plt.close(figure)


def finding(name, rows=14, figures=(), text=""):
    """A finding with a table of ``rows`` and one more."""
    table = pl.DataFrame(
        {
            "layer": [LAYERS[row % 14] for row in range(rows)],
            "mean_iou": [None if row == 3 else (row * 7919 % 1000) / 1000 for row in range(rows)],
            "n": [1040 + row for row in range(rows)],
            "note": [text or "held-out images"] * rows,
        },
        schema={"layer": pl.String, "mean_iou": pl.Float64, "n": pl.Int64, "note": pl.String},
    )
    return Finding(
        name,
        f"Where is the {name} kept? {text}",
        f"Block 6 keeps it, by far. It leads by 0.039 [0.030, 0.049] (n = 1,040). {text}\n\nNo other one does.",
        tuple(Drawn(each, f"Mean IoU against layer. {text}") for each in figures),
        {"summary": table, "per seed": table.head(3)},
        (f"The pocket model was helped; see `docs/log.md`. {text}",),
    )


def jpeg(shade, size=48):
    """A small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 90, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


def samples(count=30):
    """Samples of the gallery: four tasks, layers 5 to 8, areas 1 to 30 %, errors from 0 up; hits but every fifth."""
    tasks = ["swap", "removal", "addition", "attribute_modification"]
    return pl.DataFrame(
        {
            "sample": [31 * place for place in range(count)],
            "sample_id": [f"scene_{place}" for place in range(count)],
            "instruction": [f"Remove the {['leftmost', 'second'][place % 2]} moon {place}." for place in range(count)],
            "task": [tasks[place % 4] for place in range(count)],
            "split": [["test", "train"][place % 3 == 0] for place in range(count)],
            "n_objects": [4 + place % 6 for place in range(count)],
            "area": [(place + 1) / 100 for place in range(count)],
            "l_star": [str(5 + place % 4) for place in range(count)],
            "hit": [place % 5 != 0 for place in range(count)],
            "energy": [0.5] * count,
            "iou": [1 - (place * 7 % count) / count for place in range(count)],
            "words": ["leftmost 0.31, moon 0.22"] * count,
            "picture": [jpeg(8 * place % 256) for place in range(count)],
            "overlay": [jpeg(8 * place % 256, 40) for place in range(count)],
        }
    )


def hostile_samples():
    """What data may bring: markup, another direction, endless texts, nothing at all."""
    rows = samples(5).to_dicts()
    rows[0] |= {"instruction": HOSTILE, "task": HOSTILE, "words": HOSTILE, "sample_id": HOSTILE, "split": HOSTILE}
    rows[1]["instruction"] = RIGHT_TO_LEFT
    rows[2]["instruction"] = WORDS
    rows[3]["instruction"] = "x" * 50_000
    rows[4] |= dict.fromkeys(
        ["instruction", "task", "split", "l_star", "hit", "words", "picture", "overlay", "n_objects"]
    )
    rows[4] |= {"area": float("nan"), "energy": None, "iou": float("nan")}
    return pl.DataFrame(rows)


class Element:
    """One element of a page: ``tag``, attributes by ``[]``, ``text`` of it and all within, ``all`` below it."""

    def __init__(self, tag, attributes, parent=None):
        self.tag, self.attributes, self.parent, self.children = tag, dict(attributes), parent, []

    def __getitem__(self, attribute):
        return self.attributes.get(attribute)

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag=None, **attributes):
        for child in self.children:
            if isinstance(child, Element):
                wanted = {key.rstrip("_"): value for key, value in attributes.items()}
                if tag in (None, child.tag) and all(child[key] == value for key, value in wanted.items()):
                    yield child
                yield from child.all(tag, **attributes)

    def one(self, tag=None, **attributes):
        (found,) = self.all(tag, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.at = self.root = Element("root", ())

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), "an attribute is there twice"
        element = Element(tag, attributes, self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> ends <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, text):
        self.at.children.append(text)


def read(path):
    """The page's elements; every element must be closed where it was opened."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.at is reader.root
    return reader.root
