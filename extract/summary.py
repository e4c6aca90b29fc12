"""What a run prints: what is going to be written, what was written, and where the time went."""

from collections.abc import Iterator

import polars as pl

import store
from extract.boxes import count_problems
from extract.config import ExtractConfig
from extract.pipeline import Clock
from extract.planning import reasons_of
from store.writer import ENCODING, SYNCING

STAGES = {"read": 1, "prepare": 0, "boxes": 1, "pass": 1, "move": 1, "hand over": 1, "encode": ENCODING, "write": 1}
STAGES |= {"sync": SYNCING, "commit": 1}
"""Stages of the pipeline, and how many threads (of ``prepare``: loaders) each has."""


def time_lines(clock: Clock, seconds: float, loaders: int) -> Iterator[str]:
    """Where the time went: first one thing after the other, then the stages that work beside each other."""
    whole = {stage: spent for stage, spent in clock.seconds.items() if stage not in {*STAGES, "wait for inputs"}}
    yield f"  time       {seconds:.0f} s: " + ", ".join(f"{stage} {spent:.0f} s" for stage, spent in whole.items())
    filling = whole.get("fill", 0)
    if not filling:
        return
    shares = {}
    for stage, of in STAGES.items():
        if spent := clock.seconds.get(stage):
            shares[stage] = spent / filling / (of or max(1, loaders))
            many = f" of {of or loaders}" if (of or loaders) > 1 else ""
            yield f"    {stage:<10} busy {spent:7.1f} s  {shares[stage]:4.0%}{many}"
    limiting = max(shares, key=shares.get, default="")
    yield f"    what limits it: {limiting}; the model waited {clock.seconds.get('wait for inputs', 0):.1f} s for inputs"


def print_plan(plan: store.Plan, set_aside: pl.DataFrame, estimate: dict[str, int], limit: int | None) -> None:
    """What is going to be written, before anything is."""
    raw = plan.bytes_raw()
    tokens = plan.samples.select(pl.col("n_image").sum(), pl.col("n_text").sum()).row(0)
    print(
        f"plan: {plan.n_samples} samples, {tokens[0]} image and {tokens[1]} prompt tokens, "
        f"layers {' '.join(plan.layers)}"
    )
    for name, size in estimate.items():
        print(f"  {name:<24} {raw[name] / 1e9:9.3f} GB raw, about {size / 1e9:9.3f} GB on disk")
    print(
        f"  {'total':<24} {sum(raw.values()) / 1e9:9.3f} GB raw, about {sum(estimate.values()) / 1e9:9.3f} GB on disk"
    )
    for reason, count in reasons_of(set_aside).items():
        print(f"  set aside: {count} × {reason}")
    if limit is not None and plan.n_samples < limit:
        print(f"  the data hold fewer usable samples than --limit {limit}")


def print_summary(config: ExtractConfig, clock: Clock, seconds: float, loaders: int, report: store.Report) -> None:
    """What is on disk, what was set aside and why, where the time went."""
    opened = store.open(config.store)
    on_disk = store.disk_usage(config.store)["total"]["disk"]
    valid = opened.samples.filter(pl.col("valid"))
    tokens = int(valid["n_image"].sum() + valid["n_text"].sum())
    raw = sum(sum(part.bytes_raw(opened.valid_in(part.part)).values()) for part in opened.parts)
    print(f"\nstore {config.store}")
    print(f"  samples    {len(valid)} of {report.planned} planned ({tokens} tokens, {len(opened.layers)} layers)")
    print(f"  size       {raw / 1e9:.3f} GB raw, {on_disk / 1e9:.3f} GB on disk")
    aside = reasons_of(opened.set_aside)
    print(
        f"  set aside  {sum(aside.values())}" + "".join(f"\n    {count} × {reason}" for reason, count in aside.items())
    )
    if "vlm_x1" in valid.columns:
        asked = opened.samples.filter(pl.col("vlm_answer").is_not_null() | pl.col("vlm_x1").is_not_null())
        said = asked.filter(pl.col("vlm_x1").is_not_null())
        print(f"  boxes      the model answered with a box for {len(said)} of {len(asked)} samples")
        for problem, count in count_problems(asked["vlm_problem"]).items():
            print(f"    {count} × {problem}")
    for check in [check for run in opened.runs for check in run.get("checks", ())][-1:]:
        print(f"  batches    {check['sample_id']} alone differs by {check['difference']:.2g} of its norm at most")
    for line in time_lines(clock, seconds, loaders):
        print(line)
    verdict = "verified" if report.ok else "NOT whole: " + "; ".join(report.problems[:5])
    print(f"  {verdict}, content {report.content_hash[:16]}")
