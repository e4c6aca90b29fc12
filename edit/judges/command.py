"""``python -m edit judge``: a table of edited pictures in, a table of verdicts out."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import polars as pl

from edit.judges.agreement import agreement, read_verdicts
from edit.judges.cache import AnswerCache
from edit.judges.config import JudgeConfig
from edit.judges.endpoint import EndpointJudge
from edit.judges.human_page import judge_by_hand
from edit.judges.judge import Item, judge_all, table_of
from edit.judges.questions import QUESTIONS
from extract.omniedit import BOX_COLUMNS
from probes.statistics import interval
from store.errors import Refusal
from store.places import as_refusal

NEEDED = ("sample", "method", "instruction", "source", "edited")


def judge(config: JudgeConfig) -> None:
    """Judge all pictures of a table and say how they did; see `JudgeConfig`.

    Raises
    ------
    Refusal
        The table, the model, or where results go cannot be used; the judge answered nothing.
    """
    items = read_items(config.items, config.show_box)
    if config.estimate and config.judge in ("local", "human"):
        raise Refusal("--estimate is for endpoints; a local model and a person cost time alone")
    others = {path: read_verdicts(path) for path in config.agreement}
    cache = AnswerCache(config.cache)
    if config.judge == "human":
        rows = table_of(items, judge_by_hand(items, config.human, cache), config.human.rater)
        spent = None
    else:
        rows, spent = _by_model(config, items, cache)
        if rows is None:
            return
    write_table(rows, config.out)
    print_summary(rows, config.out, spent)
    for path, theirs in others.items():
        print_agreement(agreement(read_verdicts(config.out), theirs), path)


def _by_model(config: JudgeConfig, items: list[Item], cache: AnswerCache) -> tuple[pl.DataFrame | None, float]:
    """Verdicts of a model and the money spent on them; null where only the estimate was asked for."""
    if config.judge == "local":
        from edit.judges.local import LocalJudge

        chosen = nullcontext(LocalJudge(config.model, cache, config.device, config.max_pixels, config.max_tokens))
    else:
        chosen = EndpointJudge(config.judge, config.model, config.endpoint, cache, config.max_tokens)
    with chosen as asked:
        if config.judge != "local":
            print(f"estimate  {asked.estimate(items)}", flush=True)
            if config.estimate:
                return None, 0.0
        rows = judge_all(asked, items)
        if config.judge != "local" and asked.uncounted:
            print(f"{asked.uncounted} answers did not say how many tokens they took: their cost is an estimate")
    return rows, asked.spent


def read_items(path: Path, show_box: bool) -> list[Item]:
    """The edited pictures that a parquet table names.

    Raises
    ------
    Refusal
        It is no such table, or names nothing.
    """
    try:
        table = pl.read_parquet(path, hive_partitioning=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise Refusal(f"--items {path} is no parquet table: {str(error).splitlines()[0]}") from error
    if lacking := [name for name in (*NEEDED, *(BOX_COLUMNS if show_box else ())) if name not in table.columns]:
        raise Refusal(f"--items {path} has no column {', '.join(lacking)}")
    for name in NEEDED:
        if table.schema[name] != pl.String or table[name].null_count():
            raise Refusal(f"--items {path}: column {name} has to hold text, without nulls")
    if table.is_empty():
        raise Refusal(f"--items {path} is empty")
    folder, items = path.parent, []
    for row in table.iter_rows(named=True):
        box = tuple(row[name] for name in BOX_COLUMNS) if show_box else None
        if box is not None and (None in box or not np.isfinite(box).all()):
            box = None
        source, edited = folder / row["source"], folder / row["edited"]
        items.append(Item(row["sample"], row["method"], row["instruction"], source, edited, box))
    return items


def write_table(rows: pl.DataFrame, path: Path) -> None:
    """A parquet file, whole or not there."""
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.write_parquet(unfinished)
        unfinished.replace(path)
    except OSError as failure:
        unfinished.unlink(missing_ok=True)
        raise as_refusal(failure, path) from failure


def print_summary(rows: pl.DataFrame, path: Path, spent: float | None) -> None:
    """Mean grades by method with their intervals over samples, what was set aside, and what a model cost."""
    print(f"\nverdicts  {path}")
    if spent is not None:
        print(f"  spent     {spent:.4f} in this run, {rows['money'].sum():.4f} for all answers")
    for (method,), group in rows.group_by("method", maintain_order=True):
        good = group.filter(pl.col("failed").is_null())
        print(f"  {method}: n = {len(good)}, {len(group) - len(good)} set aside")
        if good.is_empty():
            continue
        clusters = good["sample"].rank("dense").to_numpy()
        for name in QUESTIONS:
            mean, low, high = interval(good[name].cast(pl.Float64).to_numpy(), clusters)
            print(f"    {name:<8} {mean:.3f} [{low:.3f}, {high:.3f}]")
    reasons = rows["failed"].drop_nulls().value_counts(sort=True)
    for reason, count in reasons.iter_rows():
        print(f"  {count} × {reason}")


def print_agreement(found: pl.DataFrame, path: Path) -> None:
    """How far this judge agrees with the one of the table at ``path``."""
    n = 0 if found.is_empty() else found["n"][0]
    print(f"agreement with {path}: n = {n}" + (", Cohen's κ with quadratic weights" if n else ""))
    for row in found.iter_rows(named=True):
        said = "none: both give one grade alone" if np.isnan(row["kappa"]) else "{kappa:.3f} [{low:.3f}, {high:.3f}]"
        print(f"    {row['question']:<8} {said.format(**row)}; the same grade {row['same']:.1%}")
