"""How far two judges agree: Cohen's κ with quadratic weights, on the pictures that both have graded.

Shape suffixes: ``n`` picture, ``c`` sample, ``r`` draw of the bootstrap.
"""

from pathlib import Path

import numpy as np
import polars as pl

from edit.judges.questions import BEST, QUESTIONS
from probes.statistics import ends, image_weights
from store.errors import Refusal

PICTURE = ("sample", "method")


def read_verdicts(path: Path) -> pl.DataFrame:
    """A table of verdicts as `python -m edit judge` writes it: the rows that have grades.

    Raises
    ------
    Refusal
        It is none, or judges a picture twice.
    """
    try:
        rows = pl.read_parquet(path, hive_partitioning=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise Refusal(f"--agreement {path} is no parquet table: {str(error).splitlines()[0]}") from error
    if lacking := [name for name in (*PICTURE, *QUESTIONS) if name not in rows.columns]:
        raise Refusal(f"--agreement {path} has no column {', '.join(lacking)}; give a table of `python -m edit judge`")
    graded = rows.drop_nulls(QUESTIONS)
    for name in QUESTIONS:
        if not graded.schema[name].is_integer() or not graded[name].is_between(0, BEST).all():
            raise Refusal(f"--agreement {path}: column {name} has to hold whole numbers from 0 to {BEST}")
    if graded.select(PICTURE).is_duplicated().any():
        raise Refusal(f"--agreement {path} has two verdicts on one picture; give a table of one judge")
    return graded


def agreement(ours: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
    """Agreement of two tables of `read_verdicts` by question: columns question, kappa, low, high, same, n.

    ``kappa`` is NaN where both give one and the same grade throughout; ``same`` is the share of equal grades. The 95 %
    interval is over samples.
    """
    both = ours.join(others, on=PICTURE, suffix="_other")
    schema = {"question": pl.String} | dict.fromkeys(("kappa", "low", "high", "same"), pl.Float64) | {"n": pl.Int64}
    found = []
    for name in QUESTIONS if len(both) else ():
        a_n, b_n = (both[column].cast(pl.Float64).to_numpy() for column in (name, f"{name}_other"))
        found.append((name, *kappa(a_n, b_n, both["sample"].to_numpy()), float((a_n == b_n).mean()), len(both)))
    return pl.DataFrame(found, schema, orient="row")


def kappa(a_n: np.ndarray, b_n: np.ndarray, samples_n: np.ndarray) -> tuple[float, float, float]:
    """Cohen's κ with quadratic weights, and its 95 % interval over samples: (κ, low, high).

    With these weights κ is 1 - E(a - b)² / (E a² + E b² - 2 E a E b): the squared distance of two grades, over what it
    were if each judge's were dealt out at random.
    """
    _, place_n = np.unique(samples_n, return_inverse=True)
    moments_n5 = np.stack([(a_n - b_n) ** 2, a_n**2 + b_n**2, a_n, b_n, np.ones_like(a_n)], 1)
    sums_c5 = np.zeros((place_n.max() + 1, 5))
    np.add.at(sums_c5, place_n, moments_n5)

    def of(weights_rc: np.ndarray) -> np.ndarray:
        apart_r, squares_r, a_r, b_r, count_r = (weights_rc.astype(np.float64) @ sums_c5).T
        chance_r = squares_r / count_r - 2 * a_r * b_r / count_r**2
        with np.errstate(invalid="ignore", divide="ignore"):
            # Rounding must not make a κ of what has none.
            return np.where(chance_r > 1e-6, 1 - apart_r / count_r / chance_r, np.nan)

    whole = of(np.ones((1, len(sums_c5))))[0]
    drawn_r1 = np.concatenate([of(weights_rc) for weights_rc in image_weights(len(sums_c5))])[:, None]
    if np.isnan(whole):
        return (float("nan"),) * 3
    low_1, high_1 = ends(drawn_r1)
    return float(whole), float(low_1[0]), float(high_1[0])
