"""Proxies that are trained again without what attention chose, and without as much that it did not (science §8).

Masked at test time, a proxy misses what it learned to lean on. Trained without it, it may find the place elsewhere:
then the information was not only there.

Shape suffixes: ``s`` seed, ``n`` sample, ``t`` slot on the token axis of hidden/text, ``k`` quantity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import store
from analysis.causes.masks import Prompt, of_seed, voted
from analysis.causes.paired import corrected, differences
from probes import boxes
from probes.config import TrainConfig
from probes.learn import Job
from probes.specs import Spec, one
from probes.sweep import run
from probes.targets import BOX
from probes.trained import MAKING, PREDICTIONS, TrainedProbe, read_job
from store.errors import Refusal

TOP, RANDOM = "top-tokens", "random-tokens"
"""Derived arrays (sample, token) that mark what proxies are trained without."""
VOTED, OTHER = "without the modal layer", "without another layer"
TOKENS, OTHERS = "without the top token", "without a random token"
FULL = "full"
AGAINST = {VOTED: OTHER, TOKENS: OTHERS}
"""What was chosen by attention → its control."""


def write_masks(opened: Any, probe: TrainedProbe, votes: pl.DataFrame, top: pl.DataFrame, seed: int = 0) -> None:
    """Mark the top token of every sample, and one other token of the instruction, in two derived arrays of the store.

    A sample without a top token, or without another of the instruction, has neither: NaN, so that probes that are
    trained without either see the same samples. What is there already, chosen alike, is left.

    Parameters
    ----------
    opened
        The store.
    probe
        The proxy whose top tokens they are.
    votes, top
        As of ``causes.masking``, of all samples.
    seed
        Of the random tokens.

    Raises
    ------
    Refusal
        When arrays of these names mark other tokens.
    """
    marked = of_seed(top, probe, "top tokens")
    samples_n = np.sort(marked["sample"].unique().to_numpy())
    prompt = Prompt.of(opened, probe.spec.tokens, samples_n)
    token_nt, _ = prompt.top(marked)
    other_nt = prompt.others(token_nt, seed, 0)
    known_n = voted(votes, probe, samples_n).any(1) & token_nt.any(1) & other_nt.any(1)
    longest = int(opened.plan.samples["n_text"].max())
    common = {"proxy": probe.hash, "probe": probe.folder.name, "dims": "1 at the token that is marked, else 0"}
    chosen = {
        TOP: (token_nt, "the token of most attention at the layer that the proxy's heads vote for"),
        RANDOM: (other_nt, f"another token of the instruction than {TOP} marks, drawn with seed {seed}"),
    }
    for name, (chosen_nt, how) in chosen.items():
        values_st = np.full((opened.plan.n_samples, longest), np.nan, np.float32)
        values_st[samples_n[known_n]] = 0
        rows, places = np.nonzero(chosen_nt & known_n[:, None])
        slots = prompt.slot_nt[rows, places]
        values_st[samples_n[rows[slots >= 0]], slots[slots >= 0]] = 1
        _write(opened, name, values_st, common | {"chosen": how})


def _write(opened: Any, name: str, values_st: np.ndarray, attributes: dict[str, Any]) -> None:
    there = store.open(opened.place).derived.get(name)
    if there is None:
        with store.derive(opened.place, name, ("sample", "token"), values_st.shape, attributes=attributes) as out:
            out.write(values_st)
    elif there.shape != values_st.shape or not np.array_equal(there.values, values_st, equal_nan=True):
        raise Refusal(
            f"derived/{name} in {opened.place} marks other tokens: first `python -m store drop {opened.place} "
            f"derived/{name}`, and train without them into another folder"
        )


def modal(votes: pl.DataFrame, probe: TrainedProbe) -> str:
    """The layer that most samples vote for; of several, the first that the proxy reads.

    Raises
    ------
    Refusal
        When no sample has a vote.
    """
    counts = dict(of_seed(votes, probe, "votes")["l_star"].drop_nulls().value_counts().iter_rows())
    if not counts:
        raise Refusal(f"no sample has a layer that the heads of {probe.folder.name} vote for")
    return max(probe.spec.layers, key=lambda layer: counts.get(layer, 0))


def others_of(probe: TrainedProbe, layer: str, count: int, seed: int) -> list[str]:
    """Some of the proxy's other layers, drawn with the seed, always the same."""
    free = [name for name in probe.spec.layers if name != layer]
    drawn = np.random.default_rng([seed, len(free)]).permutation(len(free))[:count]
    return [free[place] for place in sorted(drawn)]


def plan(probe: TrainedProbe, layer: str, others: Sequence[str], path: str, out: Path, seeds: Sequence[int]) -> tuple:
    """What is trained: the settings of the proxy itself, and a spec without each layer and each kind of token.

    Returns
    -------
    tuple
        A ``TrainConfig``, and a list of specs.
    """
    known = {field.name for field in fields(TrainConfig)}
    settings = {name: value for name, value in probe.making["settings"].items() if name in known}
    common = settings | {"probe": probe.spec.kind, "tokens": probe.spec.tokens}
    whole = TrainConfig(path, out, seeds=tuple(seeds), layers=probe.spec.layers, **common)
    wanted = [tuple(name for name in probe.spec.layers if name != gone) for gone in (layer, *others)]
    configs = [TrainConfig(path, out, layers=layers, **common) for layers in wanted if layers]
    configs += [TrainConfig(path, out, layers=probe.spec.layers, without=name, **common) for name in (TOP, RANDOM)]
    return whole, [one(config, probe.spec.layers) for config in configs]


def retrain(
    opened: Any,
    probe: TrainedProbe,
    votes: pl.DataFrame,
    top: pl.DataFrame,
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    others: int = 1,
    seed: int = 0,
) -> None:
    """Write the masks and train what is not trained yet; a run that was stopped goes on from there.

    Parameters
    ----------
    probe
        The proxy whose attention chose; its settings are those of all that is trained.
    others
        Random other layers, each left out once.
    """
    write_masks(opened, probe, votes, top, seed)
    layer = modal(votes, probe)
    path = str(opened.path)
    config, specs = plan(probe, layer, others_of(probe, layer, others, seed), path, out, seeds)
    # Opened again, it has the masks.
    run(config, store.open(path), {}, [Job(spec, number) for spec in specs for number in seeds])


def retrained(folder: Path, proxies: Sequence[TrainedProbe], votes: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """What proxies that were trained again reach, against the full ones of the same seeds on the same images.

    Parameters
    ----------
    folder
        Where ``retrain`` trained them.
    proxies
        The full ones, seeds of one; the first one's votes say which layer is the modal one.

    Returns
    -------
    dict of DataFrame
        ``retrained``: a row for each of ``VOTED``, ``OTHER`` (the mean over the random layers), ``TOKENS``, ``OTHERS``
        that was trained, against the full proxy, and for each but the controls against its control: mean IoU of both,
        difference, 95 % interval, p, Holm's p, n, seeds.

    Raises
    ------
    Refusal
        When the folder holds none of them, or shares no seed with the proxies.
    """
    layer = modal(votes, proxies[0])
    found = sorted(path.parent for path in (Path(folder) / "proxies").glob(f"*/{MAKING}"))
    parts: dict[str, list[tuple[int, Path, str]]] = {}
    for place in found:
        job, _ = read_job(place)
        role, gone = role_of(job.spec, proxies[0].spec, layer)
        if role:
            parts.setdefault(role, []).append((job.seed, place, gone))
    shared = {probe.seed for probe in proxies}.intersection(*({s for s, _, _ in own} for own in parts.values()))
    if not parts or not shared:
        raise Refusal(
            f"{folder} holds no proxy that was trained again without a layer or token of {proxies[0].folder.name} with "
            f"its seeds: `python -m analysis causes --retrain` trains them there"
        )
    whole = {probe.seed: overlaps_of(probe.folder) for probe in proxies if probe.seed in shared}
    seeds = sorted(shared)
    samples = sorted(set.intersection(*(set(own) for own in whole.values())))
    values = {FULL: np.array([[whole[seed].get(n, np.nan) for n in samples] for seed in seeds])}
    gone_of = {}
    for role, own in parts.items():
        per_layer: dict[str, dict[int, dict[int, float]]] = {}
        for seed, place, gone in own:
            per_layer.setdefault(gone, {})[seed] = overlaps_of(place)
        stacked = [
            [[told[seed].get(n, np.nan) for n in samples] for seed in seeds]
            for told in per_layer.values()
            if shared <= told.keys()
        ]
        values[role] = np.array(stacked).mean(0)
        gone_of[role] = ", ".join(per_layer)
    return {"retrained": compared(values, gone_of)}


def role_of(spec: Spec, full: Spec, layer: str) -> tuple[str | None, str]:
    """What a probe was trained without, and its name; None if it is no other of these."""
    same = (spec.tokens, spec.kind, spec.target, spec.labels) == (full.tokens, full.kind, full.target, full.labels)
    gone = [name for name in full.layers if name not in spec.layers]
    if not same or not set(spec.layers) <= set(full.layers):
        return None, ""
    if spec.without in (TOP, RANDOM) and not gone:
        return (TOKENS if spec.without == TOP else OTHERS), spec.without
    if spec.without is None and len(gone) == 1:
        return (VOTED if gone[0] == layer else OTHER), gone[0]
    return None, ""


def overlaps_of(folder: Path) -> dict[int, float]:
    """IoU of every test sample of a probe's own predictions, by its row in the store."""
    rows = pl.read_parquet(folder / PREDICTIONS).filter(part="test")
    pair = [rows.select(f"{prefix}{side}" for side in BOX).to_torch() for prefix in ("", "true_")]
    return dict(zip(rows["sample"].to_list(), boxes.iou(*pair).tolist(), strict=True))


def compared(values: Mapping[str, np.ndarray], gone_of: Mapping[str, str]) -> pl.DataFrame:
    """Every retrained proxy (s, n) against the full one, and what attention chose against its control."""
    asked = [(role, FULL) for role in (VOTED, OTHER, TOKENS, OTHERS) if role in values]
    asked += [(role, other) for role, other in AGAINST.items() if role in values and other in values]
    table = corrected(differences(values, asked, "iou"))
    return table.with_columns(left_out=pl.col("treatment").replace(gone_of))
