"""bfloat16 without a bfloat16 dtype: the sixteen bits as uint16, viewed, decoded and checked with NumPy alone.

zarr-python has no bfloat16 and xarray's reductions raise on ``ml_dtypes.bfloat16``; uint16 opens everywhere
and ``torch.from_numpy(bits).view(torch.bfloat16)`` costs nothing.
"""

import numpy as np

BFLOAT16_NAN = 0x7FC0
"""The quiet NaN of bfloat16: the fill value, so that what is missing is NaN for stock readers too."""

_WORDS = {
    "uint16": (np.uint16, np.int16, 0x7F80),
    "float16": (np.uint16, np.int16, 0x7C00),
    "float32": (np.uint32, np.int32, 0x7F800000),
}
"""Unsigned and signed words of a stored dtype, and its infinity."""

_MAGNITUDE = np.uint16(0x7FFF)


def to_float32(values: np.ndarray) -> np.ndarray:
    """Stored values (bfloat16 bits as uint16, or any float) as float32, same shape."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def from_float32(values: np.ndarray) -> np.ndarray:
    """float32 values as bfloat16 bits (uint16), rounded to nearest even; NaN stays NaN."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), BFLOAT16_NAN, rounded).astype(np.uint16)


def is_finite(values: np.ndarray) -> bool:
    """Whether no value (bfloat16 bits as uint16, float16 or float32) is infinite or NaN."""
    if not values.size:
        return True
    unsigned, signed, infinity = _WORDS[values.dtype.name]
    # As integers, positive values rise towards infinity and NaN, and so do negative ones above the sign bit: two
    # maxima need no memory of their own, which a mask does.
    sign = np.iinfo(signed).max + 1
    return bool(values.view(signed).max() < infinity and values.view(unsigned).max() < infinity + sign)


def has_zero_row(values: np.ndarray) -> bool:
    """Whether some vector along the last axis is zero throughout: a state that was never computed."""
    if values.size == 0:
        return False
    # One element first: a state whose first value is not zero is not a zero row, so most data is read once.
    suspect = values[..., 0]
    suspect = (suspect & _MAGNITUDE) == 0 if values.dtype == np.uint16 else suspect == 0
    if not suspect.any():
        return False
    rows = values[suspect]
    nonzero = (rows & _MAGNITUDE) != 0 if values.dtype == np.uint16 else rows != 0
    return not nonzero.any(axis=-1).all()
