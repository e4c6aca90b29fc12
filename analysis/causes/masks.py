"""Keys that are closed to a proxy: which tokens at which layers, and what it still says of the box.

A closed key gets a score of −inf, so that its attention goes elsewhere. Beside every mask that attention chooses stand
masks of as much, put elsewhere at random.

Shape suffixes: ``s`` proxy (seed), ``n`` sample that is asked about, ``b`` sample of a batch, ``l`` VLM layer,
``t`` token that the proxy reads.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from probes import boxes, targets
from probes.data import Source
from probes.stacked import View
from probes.trained import TrainedProbe
from store.errors import Refusal

NOTHING = "nothing"
LAYER, TOKEN, WORD, CROSSED, KEPT = "layer", "token", "word", "token at layer", "all but layer"
CONTROLS = {
    LAYER: "another layer",
    TOKEN: "another token",
    WORD: "other tokens",
    CROSSED: "another token at layer",
    KEPT: "all but another layer",
}
"""What is masked where the attention is → the same elsewhere, at random."""
BATCH_BYTES = 2**27
"""States that are masked at once, in float32."""
MOST_AT_ONCE = 64
"""Samples that are masked at once: more leave the caches of a CPU."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the tokens are that a proxy reads of some samples, in the order of ``Store.read``."""

    samples_n: np.ndarray
    """Rows of ``Store.samples``, int64."""
    slot_nt: np.ndarray
    """Index on the token axis of hidden/text; −1 for tokens of the picture and past a sample's last."""
    word_nt: np.ndarray
    """Index of the instruction's word; −1 for all other tokens."""
    instruction_nt: np.ndarray
    """Whether it is of the instruction, bool."""

    @classmethod
    def of(cls, opened: Any, tokens: str, samples: np.ndarray) -> "Prompt":
        """The tokens of kind ``tokens`` of rows ``samples`` of an open store."""
        source = Source(opened, opened)
        places_nt, counts_n = (part[samples] for part in source.slots(tokens))
        inside_nt = np.arange(places_nt.shape[1]) < counts_n[:, None]
        slot_nt = np.where(inside_nt, places_nt - source.n_image[samples, None], -1).clip(-1)
        shape = (len(samples), max(1, int(source.n_text.max())))
        word, instruction = np.full(shape, -1, np.int64), np.zeros(shape, bool)
        rows = pl.LazyFrame({"sample": samples}).with_row_index("n")
        said = opened.tokens.filter(pl.col("kind") == "instruction").select("sample", "slot", "word")
        said = said.join(rows, on="sample").collect()
        at = said["n"].to_numpy(), said["slot"].to_numpy()
        word[at], instruction[at] = said["word"].fill_null(-1).to_numpy(), True
        text_nt, slots = slot_nt >= 0, np.where(slot_nt >= 0, slot_nt, 0)
        word_nt = np.where(text_nt, np.take_along_axis(word, slots, 1), -1)
        return cls(samples, slot_nt, word_nt, text_nt & np.take_along_axis(instruction, slots, 1))

    def at_slots(self, slot_n: np.ndarray) -> np.ndarray:
        """Which token has the slot that each sample names, bool (n, t); none where it names −1."""
        return (self.slot_nt == slot_n[:, None]) & (slot_n >= 0)[:, None]

    def top(self, top: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """The token of first rank, and all tokens of the instruction's word of first rank, bool (n, t) each.

        ``top`` has a row for ``sample``, ``rank`` and ``slot``; where it has none of a sample, none is True.
        """
        token_nt = self.at_slots(self._firsts(top))
        words = pl.DataFrame(
            {
                "sample": np.repeat(self.samples_n, self.slot_nt.shape[1]),
                "slot": self.slot_nt.ravel(),
                "known": (self.instruction_nt & (self.word_nt >= 0)).ravel(),
            }
        ).filter("known")
        spoken = top.with_columns(pl.col("slot").cast(pl.Int64)).join(words, on=["sample", "slot"], how="semi")
        first_nt = self.at_slots(self._firsts(spoken))
        word_n = np.where(first_nt.any(1), self.word_nt[np.arange(len(first_nt)), first_nt.argmax(1)], -2)
        return token_nt, self.word_nt == word_n[:, None]

    def _firsts(self, top: pl.DataFrame) -> np.ndarray:
        """The slot of the lowest rank of each sample, −1 where there is none."""
        first = top.sort("sample", "rank").unique("sample", keep="first")
        slots = dict(first.select("sample", "slot").iter_rows())
        return np.array([slots.get(int(sample), -1) for sample in self.samples_n], np.int64)

    def others(self, chosen_nt: np.ndarray, seed: int, draw: int) -> np.ndarray:
        """As many other tokens of the instruction as are chosen, drawn at random, bool (n, t).

        None of a sample that has fewer others, or none chosen.
        """
        out_nt = np.zeros_like(chosen_nt)
        for n, sample in enumerate(self.samples_n.tolist()):
            free, count = np.flatnonzero(self.instruction_nt[n] & ~chosen_nt[n]), int(chosen_nt[n].sum())
            if 0 < count <= len(free):
                out_nt[n, np.random.default_rng([seed, draw, sample]).choice(free, count, replace=False)] = True
        return out_nt


@dataclass(frozen=True, eq=False)
class Mask:
    """Keys that are closed: those of chosen tokens at chosen layers. A sample without a chosen key is not asked."""

    name: str
    layers_nl: np.ndarray
    tokens_nt: np.ndarray


def of_seed(frame: pl.DataFrame, probe: TrainedProbe, what: str) -> pl.DataFrame:
    """The rows of a table that are of this proxy: of its ``seed``, where the table tells seeds apart.

    Raises
    ------
    Refusal
        When it has none.
    """
    own = frame.filter(pl.col("seed") == probe.seed) if "seed" in frame.columns else frame
    if own.is_empty():
        raise Refusal(f"there are no {what} of {probe.folder.name}: compute them from its own attention first")
    return own


def voted(votes: pl.DataFrame, probe: TrainedProbe, samples_n: np.ndarray) -> np.ndarray:
    """Which of the proxy's layers is l*, bool (n, l); none where there is no vote."""
    told = dict(of_seed(votes, probe, "votes").select("sample", "l_star").iter_rows())
    names = [told.get(int(sample)) for sample in samples_n]
    return np.array([[name == layer for layer in probe.spec.layers] for name in names], bool)


def masks_of(
    probe: TrainedProbe, prompt: Prompt, votes: pl.DataFrame, top: pl.DataFrame, draws: Sequence[int], seed: int
) -> Iterator[Mask]:
    """All masks of one proxy; those of a control once per draw, by the same name."""
    star_nl = voted(votes, probe, prompt.samples_n)
    read_nt = np.ones(prompt.slot_nt.shape, bool)
    everywhere_nl = np.ones_like(star_nl)
    token_nt, word_nt = prompt.top(of_seed(top, probe, "top tokens"))
    yield Mask(NOTHING, ~everywhere_nl, read_nt)
    for place, layer in enumerate(probe.spec.layers):
        one_nl = np.zeros_like(star_nl)
        one_nl[:, place] = True
        yield Mask(f"layer {layer}", one_nl, read_nt)
    known_n = star_nl.any(1)
    yield Mask(KEPT, ~star_nl & known_n[:, None], read_nt)
    yield Mask(TOKEN, everywhere_nl, token_nt)
    yield Mask(WORD, everywhere_nl, word_nt)
    yield Mask(CROSSED, star_nl, token_nt)
    for draw in draws:
        other_nl = another_layer(star_nl, prompt.samples_n, seed, draw)
        yield Mask(CONTROLS[KEPT], ~other_nl & other_nl.any(1)[:, None], read_nt)
        other_nt = prompt.others(token_nt, seed, draw)
        yield Mask(CONTROLS[TOKEN], everywhere_nl, other_nt)
        yield Mask(CONTROLS[CROSSED], star_nl, other_nt)
        yield Mask(CONTROLS[WORD], everywhere_nl, prompt.others(word_nt, seed, draw))


def another_layer(star_nl: np.ndarray, samples_n: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """One layer beside l*, drawn at random, bool (n, l); none where there is no other, or no vote."""
    out_nl = np.zeros_like(star_nl)
    for n, sample in enumerate(samples_n.tolist()):
        free = np.flatnonzero(~star_nl[n])
        if star_nl[n].any() and free.size:
            out_nl[n, np.random.default_rng([seed, draw, sample]).choice(free)] = True
    return out_nl


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """A thread a core, each for a mask of its own: one pass alone is too small for several. A GPU takes one."""
    before, count = torch.get_num_threads(), len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
    torch.set_num_threads(1 if device.type == "cpu" else before)
    with ThreadPoolExecutor(count, thread_name_prefix="masks") as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(before)


def overlaps(
    opened: Any, proxies: Sequence[TrainedProbe], wanted: Sequence[Sequence[Mask]], samples_n: np.ndarray
) -> list[np.ndarray]:
    """IoU with the true box under every mask of every proxy: a list of float32 (mask, n).

    NaN where a mask closes nothing that the proxy reads (but that of nothing), or leaves nothing open.
    """
    spec, true_n4 = proxies[0].spec, torch.from_numpy(targets.unit_boxes(opened.samples)[0][samples_n])
    found = [np.full((len(of_probe), len(samples_n)), np.nan, np.float32) for of_probe in wanted]
    longest = wanted[0][0].tokens_nt.shape[1]
    sample_bytes = 4 * len(spec.layers) * longest * opened.plan.width
    at_once = max(1, min(MOST_AT_ONCE, BATCH_BYTES // max(1, sample_bytes)))
    device = next(proxies[0].model.parameters()).device
    tasks = [(p, k) for p, of_probe in enumerate(wanted) for k in range(len(of_probe))]
    batches = opened.batches(spec.layers, spec.tokens, at_once, samples=samples_n)
    start = 0
    with tqdm(total=len(samples_n), unit="sample", desc=f"{len(tasks)} masks") as bar, workers(device) as pool:
        for batch in batches:
            rows = slice(start, start + len(batch.sample))
            view, mask_bt = proxies[0].view(batch.states, batch.mask), batch.mask
            true_b4 = true_n4[rows]

            def answer(task: tuple[int, int]) -> np.ndarray:
                p, k = task
                return overlap(proxies[p], view, mask_bt, wanted[p][k], rows, true_b4)  # noqa: B023

            for (p, k), values in zip(tasks, pool.map(answer, tasks), strict=True):
                found[p][k, rows] = values
            start = rows.stop
            bar.update(len(batch.sample))
    return found


def overlap(probe: TrainedProbe, view: View, mask_bt: Tensor, mask: Mask, rows: slice, true_b4: Tensor) -> np.ndarray:
    """IoU of one batch under one mask, float32 (b,), NaN where the mask does not apply."""
    tokens_bt = torch.from_numpy(mask.tokens_nt[rows, : mask_bt.shape[1]]) & mask_bt
    closed_blt = torch.from_numpy(mask.layers_nl[rows])[:, :, None] & tokens_bt[:, None]
    open_blt = mask_bt[:, None] & ~closed_blt
    asked_b = open_blt.flatten(1).any(1)
    if mask.name != NOTHING:
        asked_b &= closed_blt.flatten(1).any(1)
    # A sample that is not asked is answered with all its keys, for the others' sake, and its answer dropped.
    open_blt = torch.where(asked_b[:, None, None], open_blt, mask_bt[:, None])
    said_b4 = probe.answer(replace(view, closed_glbt=probe.closed(open_blt, open_blt.shape)))
    return torch.where(asked_b, boxes.iou(said_b4, true_b4), torch.nan).numpy()
