"""States that condition an editor, in the order of the sequence, from a store."""

from collections.abc import Sequence

import polars as pl
import torch

from store.errors import Refusal
from store.reader import Store


class StoredStates:
    """States of stored samples at some layers.

    Raises
    ------
    Refusal
        The store lacks a layer, or the tokens of the picture or the prompt.
    """

    def __init__(self, opened: Store, layers: Sequence[str]):
        if missing := [layer for layer in layers if layer not in opened.layers]:
            raise Refusal(
                f"{opened.path} has no layer {missing[0]!r}, which the editor is conditioned on: it has "
                f"{', '.join(opened.layers)}; extract again with --layers {','.join(layers)} --tokens all"
            )
        samples = opened.samples
        if "image" not in opened.hidden or "text" not in opened.hidden:
            raise Refusal(
                f"{opened.path} does not hold the tokens of both picture and prompt, which an editor reads: extract "
                f"again with --tokens all --layers {','.join(layers)}"
            )
        self.opened, self.layers = opened, list(layers)
        self._n_image, self._n_text = samples["n_image"].to_numpy(), samples["n_text"].to_numpy()
        is_image = pl.col("kind") == "image"
        first = pl.col("position").filter(is_image).min()
        leads = (
            opened.tokens.group_by("sample")
            .agg((~is_image & (pl.col("position") < first)).sum().alias("lead"))
            .collect()
        )
        self._lead = dict(leads.iter_rows())

    def read(self, samples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(states [s, l, t, w], mask [s, t])``, bfloat16 where the store's are, zero where the mask is false."""
        states, mask = self.opened.read(samples, self.layers)
        order = torch.arange(states.shape[2]).repeat(len(samples), 1)
        for row, sample in enumerate(samples):
            n_image, lead = int(self._n_image[sample]), self._lead[sample]
            # Read as the picture's tokens, then the prompt's: those before the picture go to the front.
            order[row, :lead] = n_image + torch.arange(lead)
            order[row, lead : lead + n_image] = torch.arange(n_image)
        return states.gather(2, order[:, None, :, None].expand_as(states)), mask
