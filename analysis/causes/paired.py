"""What several treatments reach on the same images, against each other: differences, intervals, p.

Shape suffixes: ``k`` quantity, ``s`` seed, ``n`` image, ``r`` draw of a bootstrap.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from probes import statistics


def summary(values_ksn: np.ndarray) -> list[dict[str, Any]]:
    """Mean, 95 % interval over images (and seeds), p that it is 0, and n, of every quantity."""
    _, s, n = values_ksn.shape
    known_k = (~np.isnan(values_ksn)).any((1, 2))
    rows: list[dict[str, Any]] = [dict.fromkeys(("value", "low", "high", "p")) | {"n": 0, "seeds": s} for _ in known_k]
    if not known_k.any():
        return rows
    values_ksn = values_ksn[known_k]
    drawn_rks = statistics.mean_draws(values_ksn.reshape(-1, n)).reshape(-1, len(values_ksn), s)
    low_k, high_k = statistics.ends(statistics.over_seeds(drawn_rks))
    p_k = statistics.sign_flip(values_ksn.mean(1))
    if s > 1:
        p_k = np.maximum(p_k, statistics.seeds_p(drawn_rks))
    told = zip(statistics.means(values_ksn), low_k, high_k, p_k, (~np.isnan(values_ksn)).any(1).sum(1), strict=True)
    for place, (mean, low, high, p, count) in zip(np.flatnonzero(known_k), told, strict=True):
        ends = {"value": float(mean), "low": float(low), "high": float(high)}
        rows[place] |= ends | {"p": float(p), "n": int(count)}
    return rows


def differences(
    values: Mapping[str, np.ndarray], asked: Sequence[tuple[str, str]], metric: str
) -> list[dict[str, Any]]:
    """Rows of differences between treatments, each on the seeds and images that both know.

    Parameters
    ----------
    values
        Treatment → (s, n), NaN where nothing is known.
    asked
        Pairs (treatment, against).
    metric
        What the values are; a column of the rows.
    """
    differences_ksn = np.stack([values[a] - values[b] for a, b in asked])
    rows = []
    for (a, b), difference_sn, row in zip(asked, differences_ksn, summary(differences_ksn), strict=True):
        both_sn = ~np.isnan(difference_sn)
        plain = [float(values[one][both_sn].mean()) if both_sn.any() else None for one in (a, b)]
        difference = {"difference": row.pop("value"), "low": row.pop("low"), "high": row.pop("high")}
        head = {"treatment": a, "against": b, "metric": metric, "value": plain[0], "value_against": plain[1]}
        rows.append(head | difference | row)
    return rows


def corrected(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a table, with Holm's p over those of each metric."""
    table, parts = pl.DataFrame(rows, infer_schema_length=None), []
    for part in table.partition_by("metric", maintain_order=True):
        known = part["p"].is_not_null().to_numpy()
        adjusted = np.full(len(known), np.nan)
        adjusted[known] = statistics.holm(part["p"].drop_nulls().to_numpy())
        parts.append(part.with_columns(p_holm=pl.Series(adjusted, nan_to_null=True)))
    return pl.concat(parts)
