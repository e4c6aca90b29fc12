"""Hidden states as torch tensors: chosen layers, samples and kinds of tokens, read eagerly or batch by batch.

Shapes: ``s``/``b`` samples, ``l`` layers, ``t`` tokens, ``w`` width.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from store.errors import Refusal
from store.reader import Store, check_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Batch:
    """States of some samples, padded to the longest of them."""

    states: torch.Tensor
    """``[b, l, t, w]``, bfloat16 or float32; zero where ``mask`` is False."""
    mask: torch.Tensor
    """bool ``[b, t]``: which tokens are real."""
    sample: torch.Tensor
    """int64 ``[b]``: rows of ``Store.samples``."""


class TokenChoice:
    """Which tokens of every sample are read: the image's, the text's, both, or the text's of one kind."""

    def __init__(self, store: Store, tokens: str):
        self.arrays = {"image": ["image"], "text": ["text"], "all": ["image", "text"]}.get(tokens, ["text"])
        if lacking := [name for name in self.arrays if name not in store.plan.kinds]:
            raise Refusal(f"{store.path} keeps no states of {lacking[0]} tokens: it was planned for {store.plan.kinds}")
        self.counts = {name: store.plan.counts(f"hidden/{name}")["token"] for name in self.arrays}
        self.slots: np.ndarray | None = None
        if tokens in ("image", "text", "all"):
            return
        found = store.tokens.filter(pl.col("kind") == tokens).select("sample", "slot").sort("sample", "slot").collect()
        if found.is_empty():
            kinds = store.tokens.select(pl.col("kind").unique()).collect()["kind"].to_list()
            raise Refusal(
                f"no token is of kind {tokens!r} in {store.path}: it has {', '.join(sorted({'all', 'text', *kinds}))}"
            )
        self.slots = found["slot"].to_numpy()
        self.counts["text"] = np.bincount(found["sample"].to_numpy(), minlength=store.plan.n_samples)
        self.starts = np.cumsum(self.counts["text"]) - self.counts["text"]

    def extents(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of every sample, int64 ``[s]``."""
        return sum(self.counts[name][samples] for name in self.arrays)

    def text_slots(self, samples: np.ndarray, extent: int) -> np.ndarray:
        """Slots of the chosen text tokens, int64 ``[s, extent]``, padded with 0."""
        columns = np.arange(extent)
        real = columns < self.counts["text"][samples][:, None]
        return np.where(real, self.slots[np.where(real, self.starts[samples][:, None] + columns, 0)], 0)


def read_states(
    store: Store, samples: np.ndarray, layers: Sequence[int], choice: TokenChoice
) -> tuple[np.ndarray, np.ndarray]:
    """States in the stored bits ``[s, l, t, w]``, zero-padded, and mask ``[s, t]``."""
    extents = choice.extents(samples)
    mask = np.arange(extents.max(initial=0)) < extents[:, None]

    def read(name: str, rows: int) -> np.ndarray:
        array = store.plan.arrays[f"hidden/{name}"]
        out = np.zeros((len(samples), len(layers), rows, store.plan.width), array.dtype)
        store.reader(array.name).read_into(out, samples, layers)
        return out

    if choice.slots is not None:
        slots = choice.text_slots(samples, mask.shape[1])
        text = read("text", int(slots.max(initial=0)) + 1)
        states = np.take_along_axis(text, slots[:, None, :, None], axis=2)
    elif len(choice.arrays) == 1:
        return read(choice.arrays[0], mask.shape[1]), mask
    else:
        image, text = (read(name, int(choice.counts[name][samples].max(initial=0))) for name in choice.arrays)
        n_image = choice.counts["image"][samples][:, None]
        columns = np.arange(mask.shape[1])
        # Text follows a sample's own image tokens, not the longest sample's.
        source = np.where(columns < n_image, columns, image.shape[2] + columns - n_image)
        source = np.where(mask, source, 0)
        states = np.take_along_axis(np.concatenate([image, text], axis=2), source[:, None, :, None], axis=2)
    states *= mask[:, None, :, None].astype(states.dtype)
    return states, mask


def _as_torch(states: np.ndarray, dtype: str | None) -> torch.Tensor:
    stored = "bfloat16" if states.dtype == np.uint16 else "float32"
    if (dtype or stored) not in DTYPES:
        raise Refusal(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    tensor = torch.from_numpy(states)
    tensor = tensor.view(torch.bfloat16) if stored == "bfloat16" else tensor
    return tensor.to(DTYPES[dtype or stored])


def _choose_samples(store: Store, split: str | None, samples: Sequence[int] | None) -> np.ndarray:
    if samples is None:
        chosen = np.flatnonzero(store.valid)
    else:
        chosen = np.asarray(samples, np.int64)
        outside = chosen[(chosen < 0) | (chosen >= store.plan.n_samples)]
        if outside.size:
            raise Refusal(f"sample {outside[0]} is not in {store.path}, which has {store.plan.n_samples}")
        missing = chosen[~store.valid[chosen]]
        if missing.size:
            why = store.samples["set_aside"][int(missing[0])] or "its block is not committed"
            raise Refusal(
                f"{missing.size} of the samples have no states, e.g. {missing[0]} ({why}): ask for `valid` ones"
            )
    if split is None:
        return chosen
    of_split = store.plan.samples["split"].to_numpy() == split
    if not of_split.any():
        raise Refusal(
            f"split {split!r} is not in {store.path}: it has {store.plan.samples['split'].unique().to_list()}"
        )
    return chosen[of_split[chosen]]


def read(
    store: Store, samples: Sequence[int], layers: str | Sequence[str], tokens: str, dtype: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``Store.read``."""
    chosen = _choose_samples(store, None, samples)
    states, mask = read_states(store, chosen, check_layers(store, layers), TokenChoice(store, tokens))
    return _as_torch(states, dtype), torch.from_numpy(mask)


def batches(
    store: Store,
    layers: str | Sequence[str],
    tokens: str,
    batch_size: int,
    shuffle: bool,
    seed: int,
    split: str | None,
    samples: Sequence[int] | None,
    epochs: int,
    drop_last: bool,
    dtype: str | None,
) -> Iterator[Batch]:
    """See ``Store.batches``. What was asked is checked now, not at the first batch."""
    indices, choice = check_layers(store, layers), TokenChoice(store, tokens)
    chosen = _choose_samples(store, split, samples)

    def order() -> Iterator[np.ndarray]:
        for epoch in range(epochs):
            this = np.random.default_rng([seed, epoch]).permutation(chosen) if shuffle else chosen
            whole = len(this) // batch_size * batch_size if drop_last else len(this)
            yield from (this[start : start + batch_size] for start in range(0, whole, batch_size))

    def load(ids: np.ndarray) -> Batch:
        states, mask = read_states(store, ids, indices, choice)
        return Batch(_as_torch(states, dtype), torch.from_numpy(mask), torch.from_numpy(ids))

    def run() -> Iterator[Batch]:
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
            loading = None
            for ids in order():
                following = ahead.submit(load, ids)
                if loading is not None:
                    yield loading.result()
                loading = following
            if loading is not None:
                yield loading.result()

    return run()
