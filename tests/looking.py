"""Small real stores whose instruction tokens look at the true box in one block, for tests of the analysis."""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

import store

BLOCKS = ("0", "1", "2")
LOOKING = "1"
WIDTH, HEIGHT = 400, 300


@dataclass
class Looking:
    """What such a store is made of; ``write`` makes it. Cells of a grid tile pictures of 400 × 300 pixels.

    The second and third instruction token look at the box's cell at block 1; all else is noise.
    """

    n: int = 12
    blocks: tuple[str, ...] = BLOCKS
    heads: int | None = None
    queries: str = "instruction"
    text_rows: bool = True
    seed: int = 0
    boxless: tuple[int, ...] = ()
    aside: tuple[int, ...] = ()
    unseen: dict[int, int] = field(default_factory=dict)
    """Sample → number of its image tokens that stand for no part of the picture."""

    def table(self) -> pl.DataFrame:
        """The samples."""
        rng = np.random.default_rng([self.seed, 0])
        rows, cols = rng.integers(2, 5, self.n), rng.integers(2, 6, self.n)
        told = rng.integers(4, 8, self.n)
        at = rng.integers(0, rows * cols)
        box = self.cells(rows, cols, at) + np.array([2, 3, -4, 5.0])
        box = np.where(np.isin(range(self.n), self.boxless)[:, None], None, box)
        columns = {
            "sample_id": [f"look{i}" for i in range(self.n)],
            "instruction": [" ".join(f"w{k}" for k in range(count)) for count in told],
            "task": [("swap", "removal")[i % 2] for i in range(self.n)],
            "width": [WIDTH] * self.n,
            "height": [HEIGHT] * self.n,
            "n_image": rows * cols,
            "n_text": told + 3,
            "n_query": told + 3 * (self.queries == "prompt"),
            "split": ["test"] * self.n,
            "rows": rows,
            "cols": cols,
            "at": at,
        }
        columns |= {name: box[:, k].tolist() for k, name in enumerate(("x1", "y1", "x2", "y2"))}
        return pl.DataFrame(columns, schema_overrides=dict.fromkeys(("x1", "y1", "x2", "y2"), pl.Float64))

    @staticmethod
    def cells(rows, cols, at) -> np.ndarray:
        """Pixel boxes of cells."""
        row, col = np.divmod(at, cols)
        wide, high = WIDTH / cols, HEIGHT / rows
        return np.stack([col * wide, row * high, (col + 1) * wide, (row + 1) * high], -1)

    @property
    def plan(self) -> store.Plan:
        """Its plan."""
        return store.Plan(
            layers=("final",),
            width=4,
            samples=self.table(),
            identity={"seed": self.seed, "queries": self.queries},
            kinds=("text",),
            attention=("text_to_image", "text_to_text")[: 1 + self.text_rows],
            attention_layers=self.blocks,
            attention_heads=self.heads,
            samples_per_block=4,
        )

    def write(self, folder) -> store.Store:
        """The store in ``folder``, opened."""
        store.create(folder, self.plan)
        self.fill(folder)
        return store.open(folder)

    def fill(self, folder, part=0, blocks=None) -> None:
        """Fill a part of the store, or some blocks of it."""
        with store.Writer(folder, part=part) as writer:
            for b in writer.blocks() if blocks is None else blocks:
                with writer.block(b) as block:
                    for s in block.samples:
                        if s in self.aside:
                            block.set_aside(s, "it does not open")
                            continue
                        given = self.sample(writer.plan.samples.row(s, named=True), s, writer.plan)
                        block.add(s, **given)

    def sample(self, row, s, plan) -> dict:
        """Arguments of ``Block.add``."""
        rng = np.random.default_rng([self.seed, 1, s, plan.part])
        n_image, n_text, n_query = (row[name] for name in ("n_image", "n_text", "n_query"))
        heads = () if self.heads is None else (self.heads,)
        # The first two text tokens and the last are of the template.
        first = 2 if self.queries == "prompt" else 0
        given = {"text": np.ones((1, n_text, 4), np.uint16)} if plan.layers else {}
        for kind in plan.attention:
            keys = n_image if kind.endswith("image") else n_text
            values = rng.random((len(plan.attention_layers), *heads, n_query, keys)) / (n_image + n_text)
            if kind.endswith("image") and LOOKING in plan.attention_layers:
                values[plan.attention_layers.index(LOOKING), ..., first + 1 : first + 3, row["at"]] += 0.5
            given[kind] = values.astype(np.float16)
        if plan.part:
            return given
        cell = self.cells(row["rows"], row["cols"], np.arange(n_image))
        cell[: self.unseen.get(s, 0)] = np.nan
        pixels = {name: cell[:, k].tolist() + [None] * n_text for k, name in enumerate(("px1", "py1", "px2", "py2"))}
        pixels = {name: [None if v is None or np.isnan(v) else v for v in values] for name, values in pixels.items()}
        told = n_text - 3
        given["tokens"] = pl.DataFrame(
            {
                "position": [2 + k for k in range(n_image)] + [0, 1] + [2 + n_image + k for k in range(told + 1)],
                "kind": ["image"] * n_image + ["template"] * 2 + ["instruction"] * told + ["template"],
                "text": ["<image>"] * n_image + ["<user>", "<vision>"] + [f" w{k}" for k in range(told)] + ["<end>"],
                "word": [None] * (n_image + 2) + list(range(told)) + [None],
                **pixels,
            },
            schema_overrides=dict.fromkeys(pixels, pl.Float32),
        )
        return given


def votes_for(opened, layer=LOOKING) -> pl.DataFrame:
    """Every sample votes for one layer."""
    n = opened.samples.height
    return pl.DataFrame({"sample": range(n), "l_star": [layer] * n}, {"sample": pl.Int64, "l_star": pl.String})


def top_words(opened, words=(1, 2, 0)) -> pl.DataFrame:
    """The same instruction tokens for every sample, by rank; the slot counts two template tokens before them."""
    rows = [
        (sample, rank, 2 + word, f" w{word}", word)
        for sample in range(opened.samples.height)
        for rank, word in enumerate(words)
    ]
    return pl.DataFrame(rows, schema=["sample", "rank", "slot", "text", "word"], orient="row")
