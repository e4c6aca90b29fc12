"""An xarray index of labels that need not be unique or sorted, so that queries over them read like sentences."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from xarray import Index, Variable
from xarray.core.indexing import IndexSelResult

SHOWN = 8
"""Labels that a refusal names."""


class LabelIndex(Index):
    """Finds all that bear a label, by coordinates that share their dimensions.

    Over one dimension, ``sel`` keeps what is found. Over ``(sample, token)`` it gives one row a token found, along
    ``sample``: a sample in which a word stands twice gives two rows, one without it none.
    """

    def __init__(self, variables: Mapping[Hashable, Variable]):
        self.variables = dict(variables)

    @classmethod
    def from_variables(cls, variables: Mapping[Any, Variable], *, options: Mapping[str, Any]) -> "LabelIndex":
        """An index over coordinates that share their dimensions."""
        if len({variable.dims for variable in variables.values()}) != 1:
            raise ValueError(
                f"{', '.join(map(str, variables))} lie along different dimensions: give each its own index"
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
        dims = next(iter(self.variables.values())).dims
        found = np.logical_and.reduce([self._bearing(name, wanted) for name, wanted in labels.items()])
        places = zip(dims, np.nonzero(found), strict=True)
        return IndexSelResult({dim: Variable(dims[0], place) for dim, place in places})

    def _bearing(self, name: Hashable, wanted: Any) -> np.ndarray:
        """Where a coordinate is one of the wanted labels, bool of its shape."""
        if isinstance(wanted, slice):
            raise ValueError(f"{name} is a label and has no order: name what is wanted, as a value or a list")
        values = self.variables[name].values
        asked = np.asarray(wanted, dtype=object).ravel().tolist()
        found = np.zeros(values.shape, bool)
        for label in asked:
            bearing = values == label
            if not bearing.any():
                there = sorted({str(value) for value in values.ravel() if value is not None})
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
        return type(self)(parts) if all(part.ndim for part in parts.values()) else None

    def equals(self, other: Index, **_: Any) -> bool:
        """Whether both bear the same labels in the same places."""
        return (
            isinstance(other, LabelIndex)
            and self.variables.keys() == other.variables.keys()
            and all(variable.identical(other.variables[name]) for name, variable in self.variables.items())
        )
