"""An xarray index of labels that need not be unique or sorted, so that queries over them read like sentences."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from xarray import Index, Variable
from xarray.core.indexing import IndexSelResult

SHOWN = 8
"""Labels that a refusal names."""


class LabelIndex(Index):
    """Finds all that bear a label, by coordinates over ``(sample,)`` and ``(sample, token)``, or over one dimension.

    ``sel`` keeps the samples that are found. Where a token's label is among what is asked, it gives one row a token
    found, along ``sample``: a sample in which a word stands twice gives two rows, one without it none.
    """

    def __init__(self, variables: Mapping[Hashable, Variable]):
        self.variables = dict(variables)

    @classmethod
    def from_variables(cls, variables: Mapping[Any, Variable], *, options: Mapping[str, Any]) -> "LabelIndex":
        """An index over coordinates of which some may have one more dimension than the others."""
        most = max((variable.dims for variable in variables.values()), key=len)
        if other := [name for name, variable in variables.items() if variable.dims not in (most, most[:1])]:
            raise ValueError(
                f"{other[0]} does not lie along {' or '.join(map(str, most))}: give it an index of its own"
            )
        return cls(variables)

    def create_variables(self, variables: Mapping[Any, Variable] | None = None) -> dict[Hashable, Variable]:
        """The coordinates."""
        return {name: variable.copy(deep=False) for name, variable in self.variables.items()}

    def sel(self, labels: dict[Any, Any], method: Any = None, tolerance: Any = None) -> IndexSelResult:
        """What bears one of the labels of every coordinate named.

        Raises
        ------
        KeyError
            When a label is borne by nothing.
        """
        if method is not None or tolerance is not None:
            raise ValueError(f"{', '.join(map(str, labels))} are labels: method and tolerance have no meaning for them")
        dims = max((self.variables[name].dims for name in labels), key=len)
        found = np.ones((1,) * len(dims), bool)
        for name, wanted in labels.items():
            bearing = self._bearing(name, wanted)
            found = found & bearing.reshape(bearing.shape + (1,) * (len(dims) - bearing.ndim))
        places = zip(dims, np.nonzero(found), strict=True)
        return IndexSelResult({dim: Variable(dims[0], place) for dim, place in places})

    def _bearing(self, name: Hashable, wanted: Any) -> np.ndarray:
        """Where a coordinate is one of the wanted labels, bool of its shape."""
        if isinstance(wanted, slice):
            raise ValueError(f"{name} is a label and has no order: name what is wanted, as a value or a list")
        values = self.variables[name].values
        found = np.zeros(values.shape, bool)
        for label in np.asarray(wanted, dtype=object).ravel().tolist():
            bearing = values == label
            if not bearing.any():
                there = sorted({str(value) for value in values.ravel() if value is not None and value == value})
                more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
                raise KeyError(f"nothing has {name} {label!r}; there are {', '.join(there[:SHOWN])}{more}")
            found |= bearing
        return found

    def isel(self, indexers: Mapping[Any, Any]) -> "LabelIndex | None":
        """The index of a part; None of a single place."""
        parts = {
            name: variable.isel({dim: index for dim, index in indexers.items() if dim in variable.dims})
            for name, variable in self.variables.items()
        }
        parts = {name: part for name, part in parts.items() if part.ndim}
        return type(self)(parts) if parts else None

    def equals(self, other: Index, **_: Any) -> bool:
        """Whether both bear the same labels in the same places."""
        return (
            isinstance(other, LabelIndex)
            and self.variables.keys() == other.variables.keys()
            and all(variable.identical(other.variables[name]) for name, variable in self.variables.items())
        )
