"""Attention rollout: attention followed through the layers, as a comparison for the rows of one layer.

Shape suffixes: ``s`` sample, ``l`` block, ``q`` query (a text token whose rows are kept), ``t`` token of the picture,
``x`` token of the text.
"""

import numpy as np

LIMITS = (
    "Rollout multiplies 0.5·A + 0.5·I up the blocks (Abnar & Zuidema 2020). The store keeps rows of text tokens only: "
    "image tokens, and template tokens without rows, count as themselves at every block, so what image tokens gather "
    "from each other is left out. In a decoder they stand before the instruction and cannot look at it."
)


def rollout(image_slqt: np.ndarray, text_slqx: np.ndarray, slot_sq: np.ndarray) -> np.ndarray:
    """Share of each image token in each query after every block (s, l, q, t), float32.

    The rows of R = Π (0.5·A + 0.5·I), Abnar & Zuidema (*Quantifying Attention Flow in Transformers*, 2020), at image
    columns. Tokens whose own rows are not kept (image tokens; template tokens where only the instruction's rows are
    kept) count as themselves. Attention at tokens that the store does not hold stays with those tokens, so rows may
    sum to less than the picture's share.

    Parameters
    ----------
    image_slqt, text_slqx
        Rows of consecutive blocks from the first, averaged over heads, 0 past a sample's own queries and tokens.
    slot_sq
        Slot of each query's token on the axis x, -1 past a sample's queries.
    """
    own_slqq = np.take_along_axis(text_slqx, np.maximum(slot_sq, 0)[:, None, None, :], axis=3)
    own_slqq[np.broadcast_to((slot_sq < 0)[:, None, None, :], own_slqq.shape)] = 0
    rolled_slqt = np.empty_like(image_slqt)
    rolled_sqt = np.zeros_like(image_slqt[:, 0])
    for layer in range(image_slqt.shape[1]):
        rolled_sqt = 0.5 * (image_slqt[:, layer] + own_slqq[:, layer] @ rolled_sqt) + 0.5 * rolled_sqt
        rolled_slqt[:, layer] = rolled_sqt
    return rolled_slqt


def can_roll(layers: tuple[str, ...]) -> bool:
    """Whether these blocks are consecutive from the first, as rollout needs them."""
    return layers == tuple(map(str, range(len(layers))))
