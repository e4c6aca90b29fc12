"""What a store says, and what the proxies trained on it found: questions, figures, each beside its numbers, a report.

::

    import analysis

    mass = analysis.mass("data/store.zarr")                      # A[sample, head, query, layer], lazy xarray
    mass.sel(split="test").mean(["sample", "head", "query"])
    tokens = analysis.mass("data/store.zarr", by="token")        # a[sample, head, query, layer, token]
    tokens.sel(kind="instruction", word="leftmost").mean("sample")

    python -m analysis report --store data/store.zarr            # everything, and one page with the answers

Ten more queries are in docs/queries.md.

The map
-------
``config``         settings of every command
``attention``      a proxy's attention as lazy xarray; which array of a store is read, and what stands beside it
``labels``         an index of labels, so that queries read like sentences
``blocks``         a function over blocks of samples, by threads or on a Dask cluster
``census``         one pass over the masses of any number of samples; the vote
``study``          what the questions to one store share; ``proxies`` finds the proxies themselves

``heads``          decisive heads, T
``layers``         the vote on l*, its intervals, κ
``concentration``  which tokens are read within l*
``tagging``        parts of speech
``reading``        the findings on attention, ``reading_figures`` their figures

``maps/``          where the dominant words look in the picture: pointing game, energy, rollout, gallery
``causes/``        masks on what a proxy attends to, and proxies that are trained without it
``states/``        what states say by themselves: norms, CKA, places, the logit lens
``curves``         figure 1: localization error against training steps, and final IoU per layer

``finding``        an answer with its numbers and figures, kept as files
``style``          the look that all figures share, direct labels, and how a figure is saved
``report``         every question in turn; ``page/`` makes one HTML page of the answers
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.attention import mass

_HOMES = {"mass": "attention"}

__all__ = ["mass"]


def __getattr__(name: str) -> Any:
    # On demand, so that the --help of every command stays instant.
    if name not in _HOMES:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"analysis.{_HOMES[name]}"), name)
