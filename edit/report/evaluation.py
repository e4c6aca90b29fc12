"""What an evaluation left on disk: scores, pictures with their boxes, verdicts of judges. Nothing is taken on trust."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from edit.judges.questions import QUESTIONS
from edit.methods import INSTRUCTION, MISLOCALIZED, REFERENCE, STANDALONE, SUCCESS
from edit.scores.table import COLUMNS
from extract.omniedit import BOX_COLUMNS
from store.errors import Refusal
from store.places import within

ABOUT, ITEMS, SCORES = "evaluation.json", "items.parquet", "scores.parquet"
TEXTS = ("sample", "method", "instruction", "task", "source", "edited")
OUTCOMES = {
    "success": "exactly the right object became what was asked, and nothing else changed",
    "leaked": "what was asked, and something else changed too",
    "mislocalized": "something else changed, and the right object did not",
    "otherwise": "the right object became something else than asked",
    "unchanged": "nothing changed",
    "not scored": "the scores have nothing of it",
}
"""Words for what became of a scene, and what they mean (``edit.scores.scene_judge``)."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; ``read`` makes it."""

    out: Path
    about: dict[str, Any]
    """``evaluation.json``."""
    items: pl.DataFrame
    """A row a scene and method: sample, method, instruction, task, objects, source, edited, x1, y1, x2, y2."""
    scores: pl.DataFrame
    """Long: sample, method, metric, value; what judges say is among the metrics."""
    labels: dict[tuple[str, str], dict[str, Any]]
    """By sample and method: what a picture was made by, with its box."""
    aside: dict[str, str]
    """Pictures that are not shown, and why."""
    verdicts: tuple[Path, ...]
    """Files of judges, who are named by them."""

    @property
    def judges(self) -> list[str]:
        """Their names."""
        return [path.stem for path in self.verdicts]

    @property
    def methods(self) -> list[str]:
        """In the order of the evaluation."""
        return self.items["method"].unique(maintain_order=True).to_list()

    @property
    def reference(self) -> str:
        """What others are held against, and whose outcomes scenes are chosen by."""
        return REFERENCE if REFERENCE in self.methods else self.methods[0]

    @property
    def scenes(self) -> pl.DataFrame:
        """A row a scene: sample, instruction, task, objects, source, x1, y1, x2, y2."""
        return self.items.unique("sample", keep="first", maintain_order=True).drop("method", "edited")

    def outcomes(self) -> pl.DataFrame:
        """Columns sample, method and outcome, a row an item."""
        named = [SUCCESS, MISLOCALIZED, "unchanged"]
        wide = self.scores.filter(pl.col("metric").is_in([*named, INSTRUCTION])).pivot(
            "metric", index=["sample", "method"], values="value"
        )
        wide = wide.with_columns(
            pl.lit(None, pl.Float64).alias(name) for name in (*named, INSTRUCTION) if name not in wide.columns
        )
        chosen = pl.when(pl.any_horizontal(pl.col(*named, INSTRUCTION).is_null())).then(pl.lit("not scored"))
        for name in named:
            chosen = chosen.when(pl.col(name) == 1).then(pl.lit(name))
        # The full grade is given where the subject became what was asked; then something else changed too.
        told = chosen.when(pl.col(INSTRUCTION) == 4).then(pl.lit("leaked")).otherwise(pl.lit("otherwise"))
        found = self.items.select("sample", "method").join(
            wide.select("sample", "method", told.alias("outcome")), on=["sample", "method"], how="left"
        )
        return found.with_columns(pl.col("outcome").fill_null("not scored"))

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the tables."""
        files = {name: self.out / name for name in (ITEMS, SCORES)} | {path.name: path for path in self.verdicts}
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def read(out: Path, verdicts: Sequence[Path] = ()) -> Evaluation:
    """What ``python -m edit evaluate`` left in ``out``, with verdicts of ``python -m edit judge`` among the scores.

    Raises
    ------
    Refusal
        A table is missing, damaged, or of another evaluation.
    """
    out = Path(out)
    items = _table(out / ITEMS, TEXTS, ("objects", *BOX_COLUMNS))
    if len(wrong := items.filter(pl.any_horizontal(pl.col("objects", *BOX_COLUMNS).cast(float).is_finite().not_()))):
        raise Refusal(f"{out / ITEMS}: a box or number of objects of sample {wrong['sample'][0]!r} is not finite")
    scores = _table(out / SCORES, COLUMNS[:3])
    if "value" not in scores.columns or not scores["value"].dtype.is_numeric():
        raise Refusal(f"{out / SCORES} has no column 'value' of numbers: run `python -m edit evaluate` again")
    scores = scores.with_columns(pl.col("value").cast(pl.Float64))
    if items.is_empty():
        raise Refusal(f"{out / ITEMS} is empty: `python -m edit evaluate` writes it")
    if twice := items.filter(pl.struct("sample", "method").is_duplicated()).rows():
        raise Refusal(f"{out / ITEMS} has sample {twice[0][0]!r} with method {twice[0][1]!r} twice: evaluate again")
    pairs = items.select("sample", "method")
    answers = pairs.select("sample", pl.lit(STANDALONE).alias("method")).unique()
    strange = scores.join(pl.concat([pairs, answers]), on=["sample", "method"], how="anti")
    if len(strange):
        sample, method = strange.select("sample", "method").row(0)
        raise Refusal(
            f"{out / SCORES} scores sample {sample!r} by method {method!r}, which {ITEMS} does not have: they are of "
            "different evaluations, run `python -m edit evaluate` again (what is edited is kept)"
        )
    names = [path.stem for path in verdicts]
    if len(set(names)) < len(names):
        raise Refusal(
            f"--verdicts: two files are called {max(names, key=names.count)}: judges are named by their files"
        )
    judged = [_verdicts(path, pairs) for path in verdicts]
    labels, aside = {}, {}
    for sample, method, edited in items.select("sample", "method", "edited").iter_rows():
        found = _label(out / within(out, edited))
        if isinstance(found, str):
            aside[edited] = found
        else:
            labels[sample, method] = found
    for source in items["source"].unique(maintain_order=True):
        if not (out / within(out, source)).is_file():
            aside[source] = "it is not there"
    scores = pl.concat([scores.select(COLUMNS), *judged])
    return Evaluation(out, _about(out / ABOUT), items, scores, labels, aside, tuple(verdicts))


def _table(path: Path, texts: Sequence[str], numbers: Sequence[str] = ()) -> pl.DataFrame:
    """A parquet table with columns of text and of numbers, none of them null; ``value`` of scores may be."""
    try:
        table = pl.read_parquet(path, hive_partitioning=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(
            f"{path} cannot be read ({why}): `python -m edit evaluate --out {path.parent}` writes it"
        ) from None
    for name in (*texts, *numbers):
        if name not in table.columns:
            raise Refusal(
                f"{path} has no column {name!r}: run `python -m edit evaluate` again (what is edited is kept)"
            )
        good = table[name].dtype == pl.String if name in texts else table[name].dtype.is_numeric()
        if not good or table[name].null_count():
            kind = "text" if name in texts else "numbers"
            raise Refusal(f"{path}: column {name!r} has to hold {kind}, without nulls")
    return table


def _verdicts(path: Path, pairs: pl.DataFrame) -> pl.DataFrame:
    """Grades of a judge as scores; what it could not judge is missing."""
    try:
        table = pl.read_parquet(path, hive_partitioning=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(f"--verdicts {path} is no parquet table: {why}") from None
    if lacking := [name for name in ("sample", "method", *QUESTIONS) if name not in table.columns]:
        raise Refusal(f"--verdicts {path} has no column {lacking[0]!r}: give the --out of `python -m edit judge`")
    if wrong := [name for name in QUESTIONS if not table[name].dtype.is_numeric()]:
        raise Refusal(f"--verdicts {path}: column {wrong[0]!r} is {table[wrong[0]].dtype}: give grades")
    known = table.join(pairs, on=["sample", "method"], how="semi")
    if known.is_empty():
        raise Refusal(f"--verdicts {path} judges no picture of this evaluation")
    if len(known) < len(table):
        raise Refusal(
            f"--verdicts {path} judges {len(table) - len(known)} pictures that this evaluation does not have: judge "
            f"its {ITEMS} again (answers are kept)"
        )
    return known.unpivot(
        QUESTIONS, index=["sample", "method"], variable_name="metric", value_name="value"
    ).select(
        "sample",
        "method",
        pl.format("{}, judge {}", "metric", pl.lit(path.stem)).alias("metric"),
        pl.col("value").cast(pl.Float64),
    )  # fmt: skip


def _label(picture: Path) -> dict[str, Any] | str:
    """What a picture was made by, or why it is set aside."""
    if not picture.is_file():
        return "it is not there"
    try:
        label = json.loads(picture.with_suffix(".json").read_text())
        box = label["box"]
        if box is not None:
            x1, y1, x2, y2 = map(float, box)
            if not all(map(math.isfinite, (x1, y1, x2, y2))):
                raise ValueError(f"its box is {box}")
    except OSError:
        return "it has no label"
    except (ValueError, KeyError, TypeError) as error:
        return f"its label is damaged ({type(error).__name__}: {error})"
    return label


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
        settings = about["settings"]
        if lacking := {"difficulty", "seed"} - set(settings):
            raise KeyError(*lacking)
    except (OSError, ValueError, KeyError, TypeError) as error:
        again = "run `python -m edit evaluate` again (what is edited is kept)"
        raise Refusal(f"{path} cannot be read ({type(error).__name__}): {again}") from None
    return about
