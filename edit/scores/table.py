"""The table of scores: each method's mean with its error and interval, and paired tests against one of them.

A long frame has one row per ``sample``, ``method`` and ``metric`` with its ``value``. A value that is null, NaN or not
there at all is missing; it is counted, never taken for a number, and pairs are of samples that both methods have.
"""

import math
from collections.abc import Collection, Iterator

import numpy as np
import polars as pl

from probes import statistics
from store.errors import Refusal

COLUMNS = ("sample", "method", "metric", "value")
SUMMARY = {
    "method": pl.String,
    "metric": pl.String,
    "mean": pl.Float64,
    "sem": pl.Float64,  # standard error of the mean, ddof 1; null with fewer than two values
    "low": pl.Float64,  # 95 %: bootstrap over samples, or Wilson's for a share; null with fewer than two values
    "high": pl.Float64,
    "n": pl.Int64,
    "missing": pl.Int64,  # of the samples that any method has in this metric
}
COMPARISONS = {
    "metric": pl.String,
    "reference": pl.String,
    "method": pl.String,
    "difference": pl.Float64,  # reference less method, of the pairs
    "low": pl.Float64,  # 95 %: bootstrap over pairs
    "high": pl.Float64,
    "p": pl.Float64,  # two-sided: sign flips, or McNemar's exact test for a share; null with fewer than two pairs
    "p_holm": pl.Float64,  # over all comparisons of the table
    "test": pl.String,
    "n": pl.Int64,  # pairs
    "unpaired": pl.Int64,  # samples of the metric that one of the two lacks
}
FLIPS, MCNEMAR = "sign flips", "McNemar, exact"


def summary(frame: pl.DataFrame, shares: Collection[str] = ()) -> pl.DataFrame:
    """Means of every method and metric, the columns of ``SUMMARY``, in the order that they first come in.

    Parameters
    ----------
    frame
        Long: ``sample`` (string or integer), ``method``, ``metric``, ``value``.
    shares
        Metrics whose values are 0 or 1.

    Raises
    ------
    Refusal
        A column is missing, a value is infinite, a sample comes twice, or a share is neither 0 nor 1.
    """
    rows = []
    for metric, methods, values_mn in _by_metric(frame, shares):
        for method, values_n in zip(methods, values_mn, strict=True):
            known_n = values_n[~np.isnan(values_n)]
            n = len(known_n)
            row = {"method": method, "metric": metric, "n": n, "missing": len(values_n) - n}
            if n:
                row["mean"] = float(known_n.mean())
            if n > 1:
                row["sem"] = float(known_n.std(ddof=1) / math.sqrt(n))
                row["low"], row["high"] = (
                    statistics.wilson(row["mean"], n) if metric in shares else statistics.interval(known_n)[1:]
                )
            rows.append(row)
    return pl.DataFrame(rows, schema=SUMMARY)


def comparisons(frame: pl.DataFrame, reference: str, shares: Collection[str] = ()) -> pl.DataFrame:
    """The reference against each other method in each metric, on the samples of both: the columns of ``COMPARISONS``.

    ``p`` is of ``probes.statistics.sign_flip``, never below 1e-4, or of McNemar's exact test. All comparisons are one
    family for Holm's correction.

    Raises
    ------
    Refusal
        As ``summary``, or no value is of the reference.
    """
    rows = []
    for metric, methods, values_mn in _by_metric(frame, shares):
        if reference not in methods:
            continue
        ours_n = values_mn[methods.index(reference)]
        for method, values_n in zip(methods, values_mn, strict=True):
            if method == reference:
                continue
            both_n = ~np.isnan(ours_n) & ~np.isnan(values_n)
            differences_n = (ours_n - values_n)[both_n]
            known = int((~np.isnan(ours_n) | ~np.isnan(values_n)).sum())
            row = {"metric": metric, "reference": reference, "method": method, "n": len(differences_n)}
            row |= {"unpaired": known - len(differences_n), "test": MCNEMAR if metric in shares else FLIPS}
            if len(differences_n) > 1:
                row["difference"], row["low"], row["high"] = statistics.interval(differences_n)
                exact = metric in shares
                row["p"] = mcnemar(differences_n) if exact else float(statistics.sign_flip(differences_n[None])[0])
            rows.append(row)
    if not rows and reference not in frame["method"].unique():
        raise Refusal(
            f"no value is of the reference {reference!r}: the methods are {', '.join(_order(frame, 'method'))}"
        )
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, statistics.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = float(p)
    return pl.DataFrame(rows, schema=COMPARISONS)


def mcnemar(differences_n: np.ndarray) -> float:
    """Two-sided exact p of paired 0/1 values, given their differences: would a coin side so with one of the two?"""
    won, lost = int((differences_n > 0).sum()), int((differences_n < 0).sum())
    ways = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * ways / 2 ** (won + lost))


def markdown(summarised: pl.DataFrame, compared: pl.DataFrame | None = None) -> str:
    """The tables of ``summary`` and ``comparisons`` as Markdown, with what is missing said below each.

    A row a method, a column a metric: mean ± 1 SEM, [95 % interval], n.
    """
    methods, metrics = _order(summarised, "method"), _order(summarised, "metric")
    cells = {(row["method"], row["metric"]): row for row in summarised.iter_rows(named=True)}
    lines = _grid(
        ["method", *metrics],
        [[method, *(_cell(cells.get((method, metric))) for metric in metrics)] for method in methods],
    )
    lines += ["", "Mean ± 1 SEM (ddof 1), [95 % interval], n samples."]
    gaps = summarised.filter(pl.col("missing") > 0).iter_rows(named=True)
    lines += [f"Missing: {row['method']} has no {row['metric']} for {row['missing']} samples." for row in gaps]
    if compared is not None and len(compared):
        rows = [
            [
                row["metric"],
                f"{row['reference']} − {row['method']}",
                _number(row["difference"], signed=True) + _between(row),
                _p(row["p"]),
                _p(row["p_holm"]),
                row["test"],
                str(row["n"]),
            ]
            for row in compared.iter_rows(named=True)
        ]
        lines += ["", *_grid(["metric", "pair", "difference [95 %]", "p", "p (Holm)", "test", "pairs"], rows)]
        lines += ["", f"Paired on the same samples; Holm over all {int(compared['p'].count())} tests."]
        gaps = compared.filter(pl.col("unpaired") > 0).iter_rows(named=True)
        lines += [
            f"Unpaired: {row['unpaired']} samples of {row['metric']} that {row['reference']} or {row['method']} lacks."
            for row in gaps
        ]
    return "\n".join(lines) + "\n"


def _by_metric(frame: pl.DataFrame, shares: Collection[str]) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Each metric with the methods that have it and their values (method, sample), NaN where missing."""
    if lacking := [name for name in COLUMNS if name not in frame.columns]:
        raise Refusal(f"the scores have no column {lacking[0]!r}: they need {', '.join(COLUMNS)}")
    if not (frame["value"].dtype.is_numeric() or frame["value"].dtype == pl.Boolean):
        raise Refusal(f"the values of the scores are {frame['value'].dtype}: give numbers")
    if any(frame[name].null_count() for name in COLUMNS[:3]):
        raise Refusal("a row of the scores lacks its sample, method or metric: only a value may be null")
    frame = frame.select("sample", pl.col("method", "metric").cast(pl.String), pl.col("value").cast(pl.Float64))
    if len(wrong := frame.filter(pl.col("value").is_infinite())):
        raise Refusal(f"the value of {_place(wrong)} is infinite: leave it out or give null")
    if len(twice := frame.filter(pl.struct("sample", "method", "metric").is_duplicated())):
        raise Refusal(f"{_place(twice)} comes more than once: give one value each")
    if unknown := sorted(set(shares) - set(frame["metric"])):
        raise Refusal(f"no value is of the share {unknown[0]!r}: the metrics are {', '.join(_order(frame, 'metric'))}")
    of_shares = frame.filter(pl.col("metric").is_in(list(shares)) & pl.col("value").is_not_nan())
    if len(wrong := of_shares.filter(~pl.col("value").is_in([0.0, 1.0]))):
        raise Refusal(f"the value {wrong['value'][0]} of {_place(wrong)} is neither 0 nor 1: it is no share")
    for metric in _order(frame, "metric"):
        part = frame.filter(pl.col("metric") == metric)
        samples = part["sample"].unique(maintain_order=True)
        methods = _order(part, "method")
        values_mn = np.full((len(methods), len(samples)), np.nan)
        row_of, column_of = ({name: i for i, name in enumerate(names)} for names in (methods, samples))
        for sample, method, _, value in part.iter_rows():
            values_mn[row_of[method], column_of[sample]] = np.nan if value is None else value
        yield metric, methods, values_mn


def _order(frame: pl.DataFrame, column: str) -> list[str]:
    return frame[column].unique(maintain_order=True).to_list()


def _place(rows: pl.DataFrame) -> str:
    sample, method, metric = rows.select("sample", "method", "metric").row(0)
    return f"sample {sample!r}, method {method!r}, metric {metric!r}"


def _grid(head: list[str], rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    told = ["| " + " | ".join(row) + " |" for row in escaped]
    return [told[0], "|" + "---|" * len(head), *told[1:]]


def _cell(row: dict | None) -> str:
    if row is None or row["mean"] is None:
        return "–"
    error = "" if row["sem"] is None else f" ± {_number(row['sem'])}"
    return f"{_number(row['mean'])}{error}{_between(row)}, n = {row['n']}"


def _between(row: dict) -> str:
    return "" if row["low"] is None else f" [{_number(row['low'])}, {_number(row['high'])}]"


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}{'.4f' if abs(value) >= 0.01 else '.3g'}}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
