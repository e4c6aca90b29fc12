"""A proxy's attention in a store as lazy xarray: ``a[sample, head, query, layer, token]`` and the mass of layers.

Every token says of itself what the token table does, and ``.sel`` takes it: ``sel(kind="instruction",
word="leftmost")`` finds that word wherever it stands.
"""

import os
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import polars as pl
import xarray as xr
from xarray import Index, Variable
from xarray.core.indexing import IndexSelResult

import store
from store.errors import Refusal
from store.reader import Store
from store.tokens import PUNCTUATION

PREFIX = "attention-"
SAID = ("kind", "word", "text", "position", "row", "col")
"""What tokens say of themselves, as coordinates."""


class TokenIndex(Index):
    """Finds tokens by what they say of themselves, over ``(sample, token)``.

    ``sel`` gives one row a token found, along ``sample``: a sample in which the word stands twice gives two rows, one
    without it none.
    """

    def __init__(self, variables: Mapping[Hashable, Variable]):
        self.variables = dict(variables)

    @classmethod
    def from_variables(cls, variables: Mapping[Any, Variable], *, options: Mapping[str, Any]) -> "TokenIndex":
        """An index over coordinates that share their dimensions."""
        if len({variable.dims for variable in variables.values()}) != 1:
            raise ValueError("the coordinates of tokens must share their dimensions")
        return cls(variables)

    def create_variables(self, variables: Mapping[Any, Variable] | None = None) -> dict[Hashable, Variable]:
        """The coordinates."""
        return {name: variable.copy(deep=False) for name, variable in self.variables.items()}

    def sel(self, labels: dict[Any, Any], method: Any = None, tolerance: Any = None) -> IndexSelResult:
        """Tokens that are one of the labels, by every coordinate named.

        Raises
        ------
        KeyError
            When a label is that of no token.
        """
        if method is not None or tolerance is not None:
            raise ValueError("tokens are found by what they are: method and tolerance have no meaning here")
        dims = next(iter(self.variables.values())).dims
        found = np.ones([self.variables[next(iter(labels))].sizes[dim] for dim in dims], bool)
        for name, wanted in labels.items():
            wanted = np.atleast_1d(np.asarray(wanted, dtype=object)).tolist()
            values = self.variables[name].values
            hit = (
                pl.Series(values.ravel(), strict=False).is_in(wanted).fill_null(False).to_numpy().reshape(values.shape)
            )
            if not hit.any():
                some = pl.Series(values.ravel(), strict=False).drop_nulls().value_counts(sort=True)
                raise KeyError(
                    f"no token has {name} {wanted}; frequent are {', '.join(map(repr, some[:, 0].to_list()[:8]))}"
                )
            found &= hit
        return IndexSelResult(
            {dim: Variable(dims[0], places) for dim, places in zip(dims, np.nonzero(found), strict=True)}
        )

    def isel(self, indexers: Mapping[Any, Any]) -> "TokenIndex | None":
        """The index of a part."""
        parts = {
            name: variable.isel({dim: index for dim, index in indexers.items() if dim in variable.dims})
            for name, variable in self.variables.items()
        }
        return type(self)(parts) if all(part.ndim for part in parts.values()) else None

    def equals(self, other: Index, **_: Any) -> bool:
        """Whether both say the same of every token."""
        return (
            isinstance(other, TokenIndex)
            and self.variables.keys() == other.variables.keys()
            and all(variable.identical(other.variables[name]) for name, variable in self.variables.items())
        )
