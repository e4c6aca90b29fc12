"""Tables of predictions: one row a probe, seed, data set and sample."""

from typing import Any

import numpy as np
import polars as pl

from probes.learn import Job
from probes.panel import HELD_OUT


def frame(
    job: Job,
    samples: pl.DataFrame,
    places: np.ndarray,
    answers: dict[str, Any],
    *,
    part: str = "test",
    watched: np.ndarray | tuple = (),
    data: str = HELD_OUT,
) -> pl.DataFrame:
    """Answers of one probe as a table.

    Parameters
    ----------
    samples
        The samples of the data's store; ``places`` are rows of it, int64 (n,).
    answers
        Columns of ``Target.answers``, n each.
    part
        ``test``, or ``next``: train samples behind those of its share.
    watched
        Rows on which curves are followed.
    data
        ``held-out``, or the name of other data.
    """
    about = samples[places]
    columns = {
        "probe": [job.spec.name] * len(places),
        "seed": [job.seed] * len(places),
        "data": [data] * len(places),
        "part": [part] * len(places),
        "sample": places.astype(np.int64),
        "sample_id": about["sample_id"],
        "watched": np.isin(places, watched),
    }
    if "x1" in answers:
        columns |= {side: about[side].cast(pl.Float64) for side in ("width", "height")}
    return pl.DataFrame(columns | answers)
