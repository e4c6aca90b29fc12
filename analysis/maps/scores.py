"""Where the dominant tokens look at l*: the VLM's own attention rows as maps over the picture [ABP §5], scored.

The map of a sample is the mean of the rows alpha[l*][i, image tokens] of its dominant tokens i, brought to sum 1.
Pointing game: does the centre of the strongest token lie in the true box? Energy in the box: the share of the map
that lies in it, tokens counted by the share of their area that the box covers. Chance is what a uniform map scores.

Shape suffixes: ``s`` sample of a batch, ``n`` sample of all that were scored, ``l`` block, ``q`` query, ``t`` token of
the picture, ``m`` metric (pointing, energy).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from tqdm import tqdm

from analysis.maps.rollout import can_roll, rollout
from analysis.maps.rows import Rows, blocks_with_rows, keeps_text_rows, read_rows
from store.errors import Refusal
from store.reader import Store

METRICS = ("pointing", "energy")
MOST = 2048
"""Samples that are scored; of more, as many are drawn by the seed. A share of them is known to ±2.2 % at worst."""
CORNERS = ("x1", "y1", "x2", "y2")

STAR = "l*"
LAST = "last block"
OTHERS = "other blocks"
RANDOM = "random tokens"
ALL = "all tokens"
CONTRAST = "contrast"
ROLLOUT = "rollout"
ROLLOUT_STAR = "rollout to l*"
OBJECT = "any object"
MEANING = {
    STAR: "the dominant tokens' rows at l*",
    LAST: "the same tokens' rows at the last block with rows",
    OTHERS: "the same tokens' rows at every block but l*, mean score: what a random block gives",
    RANDOM: "as many other tokens of the instruction at l*, one draw a sample",
    ALL: "the mean row of all instruction tokens at l*",
    CONTRAST: "the dominant tokens' rows at l* over the mean row of all instruction tokens: without sinks",
    ROLLOUT: "the same tokens by attention rollout through all blocks",
    ROLLOUT_STAR: "the same tokens by attention rollout up to l*",
    OBJECT: "a peak on one of the picture's objects by lot: 1 / n_objects; what seeing objects alone gives",
}
"""What is scored."""


@dataclass(frozen=True)
class Maps:
    """Scores of every sample under every condition, and the maps at l*.

    Attributes
    ----------
    samples
        One row a scored sample: ``sample``, ``sample_id``, ``l_star``, ``words`` (texts of the dominant tokens with
        rows), ``area`` (true box over picture), ``image`` (samples of one picture are drawn together in bootstraps),
        the true box and the picture's size in pixels, ``n_objects`` where the store has it.
    scores
        Condition → (m, n) float64, NaN where unknown; at l* all are known.
    layers
        The blocks with rows, and ``layers_mln`` the scores of the dominant tokens' rows there.
    chance_mn
        Scores of a uniform map: shares of token centres, and of token area, in the box.
    map_nt, pixels_nt4
        The map at l*, float32, NaN where no token stands for a part of the picture; the tokens' boxes in pixels.
    left_out
        Why samples were left out → how many.
    skipped
        Tokens that were ranked above those and have no row (template tokens where only the instruction's are kept).
    drawn_of
        How many samples were to be scored before ``MOST`` were drawn.
    """

    samples: pl.DataFrame
    scores: Mapping[str, np.ndarray]
    layers: tuple[str, ...]
    layers_mln: np.ndarray
    chance_mn: np.ndarray
    map_nt: np.ndarray
    pixels_nt4: np.ndarray
    left_out: Mapping[str, int]
    skipped: int
    drawn_of: int
    tokens: int
    seed: int


def maps(
    opened: Store, votes: pl.DataFrame, top: pl.DataFrame, *, samples: np.ndarray, seed: int = 0, tokens: int = 3
) -> Maps:
    """Score the maps of some samples.

    Parameters
    ----------
    opened
        A store with attention rows at the picture.
    votes
        ``sample``, ``l_star`` (name of a layer, null without a vote).
    top
        One row a (``sample``, ``rank``): ``slot`` on the text's token axis, ``text``; rank 0 is the most attended. A
        token without a row is passed over and the next takes its place, so give all ranks.
    samples
        Rows of the samples table that the answer is about.
    seed
        Of the random tokens, and of the samples drawn where there are more than ``MOST``.
    tokens
        Dominant tokens a sample: the first of its ranking that have rows.

    Raises
    ------
    Refusal
        When no rows are kept, or nothing is left to score; the message counts why.
    """
    blocks = blocks_with_rows(opened)
    wanted = np.unique(np.asarray(samples, np.int64))
    drawn_of = len(wanted)
    if drawn_of > MOST:
        wanted = np.sort(np.random.default_rng([seed, 0]).choice(wanted, MOST, replace=False))
    chosen, left_out = _usable(opened, votes, top, wanted, blocks)
    ranked = top.filter(pl.col("sample").is_in(chosen["sample"].implode())).sort("sample", "rank")
    rolls = keeps_text_rows(opened) and can_roll(blocks)
    numbers, boxes_n4 = chosen["sample"].to_numpy(), chosen.select(CORNERS).to_numpy()
    star_n = np.array([blocks.index(layer) for layer in chosen["l_star"]], np.int64)
    parts, asked, found = [], [], [ranked.clear()]
    with tqdm(total=len(numbers), desc="maps", unit="sample", delay=2) as bar:
        for rows in read_rows(opened, numbers, text=rolls) if len(numbers) else ():
            at_s = np.searchsorted(numbers, rows.samples_s)
            own_sq, with_row = top_queries(rows, ranked, tokens)
            found.append(with_row)
            asked.append(own_sq.any(1))
            parts.append(_Batch(rows, own_sq, star_n[at_s], boxes_n4[at_s], seed, rolls).scored())
            bar.update(len(at_s))
    asked_n = np.concatenate(asked) if asked else np.zeros(0, bool)
    kept_n = asked_n & ~np.concatenate([np.isnan(part["scores"][STAR][0]) for part in parts] or [asked_n])
    left_out["no dominant token with a row"] = int((~asked_n).sum())
    left_out["no rows, no mass or no token boxes at l*"] = int((asked_n & ~kept_n).sum())
    left_out = {reason: count for reason, count in left_out.items() if count}
    if not kept_n.any():
        told = ", ".join(f"{reason} ({count})" for reason, count in left_out.items())
        raise Refusal(f"no sample of {opened.place} can be mapped: {told or 'none was asked for'}")
    joined, used = _joined(parts, kept_n), pl.concat(found)
    words = used.group_by("sample", maintain_order=True).agg(words=pl.col("text").str.strip_chars())
    table = chosen.filter(pl.Series(kept_n)).join(words, on="sample", how="left", maintain_order="left")
    if "n_objects" in table.columns:
        by_lot_n = (1 / pl.Series(table["n_objects"])).fill_null(np.nan).to_numpy()
        joined["scores"][OBJECT] = np.stack([by_lot_n, np.full(table.height, np.nan)])
    return Maps(
        samples=table,
        scores=joined["scores"],
        layers=blocks,
        layers_mln=joined["layers"],
        chance_mn=joined["chance"],
        map_nt=joined["map"],
        pixels_nt4=joined["pixels"],
        left_out=left_out,
        skipped=_passed_over(ranked, used),
        drawn_of=drawn_of,
        tokens=tokens,
        seed=seed,
    )


def _usable(
    opened: Store, votes: pl.DataFrame, top: pl.DataFrame, wanted: np.ndarray, blocks: tuple[str, ...]
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The samples that can be scored, ascending, and why others cannot."""
    table = opened.samples.with_columns(sample=pl.int_range(pl.len(), dtype=pl.Int64))
    numbers = (*CORNERS, "width", "height")
    numbers += ("n_objects",) * ("n_objects" in table.columns)
    table = table.with_columns(pl.lit(None).alias(name) for name in numbers if name not in table.columns)
    table = table.with_columns(pl.col(name).cast(pl.Float64) for name in numbers)[wanted.tolist()]
    image = pl.col("image_crc32c" if "image_crc32c" in table.columns else "sample_id").cast(pl.String)
    share = (pl.col("x2") - pl.col("x1")) * (pl.col("y2") - pl.col("y1")) / (pl.col("width") * pl.col("height"))
    table = table.select("sample", "sample_id", "valid", *numbers, image=image, area=share)
    voted = votes.select("sample", "l_star").unique("sample", keep="first")
    table = table.join(voted, on="sample", how="left", maintain_order="left")
    tests = {
        "not valid": pl.col("valid"),
        "no true box": pl.all_horizontal(pl.col(name).is_finite() for name in CORNERS),
        "no vote for a layer": pl.col("l_star").is_not_null(),
        "no rows at the layer voted for": pl.col("l_star").is_in(list(blocks)),
        "no dominant tokens": pl.col("sample").is_in(top["sample"].unique().implode()),
    }
    left_out = {}
    for reason, test in tests.items():
        before = table.height
        table = table.filter(test)
        left_out[reason] = before - table.height
    return table.drop("valid"), left_out


def top_queries(rows: Rows, ranked: pl.DataFrame, tokens: int) -> tuple[np.ndarray, pl.DataFrame]:
    """Which queries are dominant tokens (s, q), bool: of the ranked ones that have a row the first; and their rows."""
    mine = ranked.filter(pl.col("sample").is_in(rows.samples_s.tolist()))
    at_n = np.searchsorted(rows.samples_s, mine["sample"].to_numpy())
    match_nq = rows.slot_sq[at_n] == mine["slot"].to_numpy()[:, None]
    place = pl.int_range(pl.len()).over("sample")
    used = mine.with_columns(line=pl.int_range(pl.len())).filter(pl.Series(match_nq.any(1))).filter(place < tokens)
    own_sq = np.zeros(rows.slot_sq.shape, bool)
    np.logical_or.at(own_sq, at_n[used["line"]], match_nq[used["line"]])
    return own_sq, used.drop("line")


def _passed_over(ranked: pl.DataFrame, used: pl.DataFrame) -> int:
    """Tokens that are ranked above the last one used of their sample, and have no row."""
    last = used.group_by("sample").agg(last=pl.col("rank").max())
    above = ranked.join(last, on="sample").filter(pl.col("rank") <= pl.col("last"))
    return above.height - used.height


def other_queries(rows: Rows, own_sq: np.ndarray, seed: int) -> np.ndarray:
    """As many other tokens of the instruction as there are dominant ones (s, q), bool; all others if there are fewer.

    Drawn by the seed and the sample's number alone, so that batches do not matter.
    """
    drawn_sq = np.zeros_like(own_sq)
    for s, sample in enumerate(rows.samples_s.tolist()):
        others = np.flatnonzero(rows.instruction_sq[s] & ~own_sq[s])
        count = min(len(others), int(own_sq[s].sum()))
        drawn_sq[s, np.random.default_rng([seed, 1, sample]).choice(others, count, replace=False)] = True
    return drawn_sq


def mean_rows(image_slqt: np.ndarray, chosen_sq: np.ndarray) -> np.ndarray:
    """Mean of the chosen queries' rows (s, l, t); NaN where none is chosen."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share_sq = chosen_sq / chosen_sq.sum(1, keepdims=True).astype(np.float32)
    return np.einsum("slqt,sq->slt", image_slqt, share_sq.astype(np.float32), optimize=True)


class Boxes:
    """Image tokens of a batch against the samples' true boxes.

    Parameters
    ----------
    pixels_st4
        Token boxes, NaN where a token stands for no part of the picture: those are left out of maps.
    boxes_s4
        True boxes in the same pixels.
    """

    def __init__(self, pixels_st4: np.ndarray, boxes_s4: np.ndarray):
        cell_st4, box_s14 = pixels_st4.astype(np.float64), boxes_s4[:, None]
        self.there_st = ~np.isnan(cell_st4).any(2)
        low_st2, high_st2 = cell_st4[..., :2], cell_st4[..., 2:]
        centre_st2 = (low_st2 + high_st2) / 2
        self.hit_st = ((centre_st2 >= box_s14[..., :2]) & (centre_st2 <= box_s14[..., 2:])).all(2)
        shared_st2 = np.minimum(high_st2, box_s14[..., 2:]) - np.maximum(low_st2, box_s14[..., :2])
        cover_st = shared_st2.clip(0).prod(2) / (high_st2 - low_st2).prod(2)
        self.cover_st = np.where(self.there_st, cover_st, 0)

    def normalised(self, map_slt: np.ndarray) -> np.ndarray:
        """Maps that sum to 1 over the tokens of the picture, float64, 0 elsewhere; NaN where there is no mass."""
        kept_slt = np.where(self.there_st[:, None], map_slt, 0).astype(np.float64)
        total_sl1 = kept_slt.sum(2, keepdims=True)
        return kept_slt / np.where(total_sl1 > 0, total_sl1, np.nan)

    def scores(self, map_slt: np.ndarray) -> np.ndarray:
        """Pointing and energy (m, s, l) of maps (s, l, t); NaN where a map is unknown or has no mass.

        Where several tokens are strongest alike, pointing is the share of them that hits.
        """
        share_slt = self.normalised(map_slt)
        strongest_slt = (share_slt == share_slt.max(2, keepdims=True)) & self.there_st[:, None]
        pointing_sl = (strongest_slt & self.hit_st[:, None]).sum(2) / np.maximum(strongest_slt.sum(2), 1)
        energy_sl = np.einsum("slt,st->sl", share_slt, self.cover_st)
        return np.stack([np.where(np.isnan(energy_sl), np.nan, pointing_sl), energy_sl])

    def chance(self) -> np.ndarray:
        """The scores of a uniform map (m, s)."""
        count_s = np.maximum(self.there_st.sum(1), 1)
        return np.stack([self.hit_st.sum(1), self.cover_st.sum(1)]) / count_s


@dataclass(frozen=True)
class _Batch:
    """One batch and all that is scored of it."""

    rows: Rows
    own_sq: np.ndarray
    star_s: np.ndarray
    boxes_s4: np.ndarray
    seed: int
    rolls: bool

    def scored(self) -> dict:
        """Scores, maps and token boxes by name."""
        rows, boxes = self.rows, Boxes(self.rows.pixels_st4, self.boxes_s4)
        top_slt = mean_rows(rows.image_slqt, self.own_sq)
        layers_msl = boxes.scores(top_slt)
        every = np.arange(len(self.star_s))
        star_slqt = rows.image_slqt[every, self.star_s][:, None]
        star_s1t, all_s1t = top_slt[every, self.star_s][:, None], mean_rows(star_slqt, rows.instruction_sq)
        random_s1t = mean_rows(star_slqt, other_queries(rows, self.own_sq, self.seed))
        with np.errstate(invalid="ignore", divide="ignore"):
            contrast_s1t = np.where(all_s1t == 0, 0, star_s1t / all_s1t)
        found = {RANDOM: random_s1t, ALL: all_s1t, CONTRAST: contrast_s1t}
        if self.rolls:
            rolled_slt = mean_rows(rollout(rows.image_slqt, rows.text_slqx, rows.slot_sq), self.own_sq)
            found |= {ROLLOUT: rolled_slt[:, -1:], ROLLOUT_STAR: rolled_slt[every, self.star_s][:, None]}
        scores = {name: boxes.scores(map_s1t)[..., 0] for name, map_s1t in found.items()}
        star_ms = layers_msl[:, every, self.star_s]
        others_msl = layers_msl.copy()
        others_msl[:, every, self.star_s] = np.nan
        scores |= {STAR: star_ms, LAST: layers_msl[..., -1], OTHERS: _known_mean(others_msl)}
        map_st = np.where(boxes.there_st, boxes.normalised(star_s1t)[:, 0], np.nan).astype(np.float32)
        return {
            "scores": {name: scores[name] for name in MEANING if name in scores},
            "layers": layers_msl.swapaxes(1, 2),
            "chance": boxes.chance(),
            "map": map_st,
            "pixels": rows.pixels_st4,
        }


def _known_mean(values_msl: np.ndarray) -> np.ndarray:
    """Mean (m, s) over the known of the last axis; NaN where none is (a store with one block of rows)."""
    count_ms = (~np.isnan(values_msl)).sum(2)
    return np.where(count_ms > 0, np.nansum(values_msl, axis=2) / np.maximum(count_ms, 1), np.nan)


def _joined(parts: list[dict], kept_n: np.ndarray) -> dict:
    """The batches as one, of the samples that were kept; token axes padded with NaN."""
    most = max(part["map"].shape[1] for part in parts)

    def padded(array_st: np.ndarray) -> np.ndarray:
        past = [(0, 0), (0, most - array_st.shape[1]), *[(0, 0)] * (array_st.ndim - 2)]
        return np.pad(array_st, past, constant_values=np.nan)

    out = {name: np.concatenate([padded(part[name]) for part in parts])[kept_n] for name in ("map", "pixels")}
    out |= {name: np.concatenate([part[name] for part in parts], -1)[..., kept_n] for name in ("layers", "chance")}
    names = parts[0]["scores"]
    out["scores"] = {name: np.concatenate([part["scores"][name] for part in parts], -1)[:, kept_n] for name in names}
    return out
