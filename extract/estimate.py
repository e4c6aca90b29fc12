"""What an extraction would write and how long it would take, before anything is: ``--dry-run``, ``--budget``."""

import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import polars as pl
import torch

import store
from extract.config import ExtractConfig
from extract.loading import Loaders, planned_of, prepare, rows_at
from extract.model import model_for
from extract.pipeline import Clock, Extractor, batches_of
from extract.planning import Planner, read_plan, wanted_layers
from extract.rows import Place, Shards
from extract.summary import print_plan
from store.errors import Refusal

PROBED = 2  # batches that are timed, after one that is not
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}


def foresee(planner: Planner, loaders: Loaders) -> int:
    """Print what ``--dry-run`` or ``--budget`` asks for; nothing is written but the pocket preset's own data."""
    config = planner.config
    budget = None if config.budget is None else parse_size(config.budget)
    planner.draw_own_scenes()
    samples, set_aside = read_plan(config, loaders)
    plan = planner.plan_of(samples)
    print_plan(plan, set_aside, plan.bytes_estimate(), config.limit)
    if budget is not None:
        for line in proposal_lines(planner, samples, budget):
            print(line)
        return 0
    print(f"  {'files':<24} {files(plan):9,}")
    stages = probe(planner, loaders, plan)
    rate = 1 / max(stages.values())
    limiting = max(stages, key=stages.get)
    print(f"  timed over {PROBED} batches, seconds a sample: " + ", ".join(f"{k} {v:.4f}" for k, v in stages.items()))
    print(
        f"  {'time':<24} about {clock_time(plan.n_samples / rate)} for one worker on this machine, writing aside: "
        f"{rate:,.1f} samples/s, limited by: {limiting}"
    )
    return 0


def parse_size(text: str) -> int:
    """Bytes of ``500GB`` or ``2TB`` (powers of ten, as disks are sold)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGTP]B)\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise Refusal(f"--budget {text!r}: give a size such as 500GB or 2TB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def files(plan: store.Plan) -> int:
    """Files of a store of this plan, the few of its record aside."""
    shards = sum(
        -(-len(plan.block(b)) // array.shard[0]) for array in plan.arrays.values() for b in range(plan.n_blocks)
    )
    return shards + 2 * plan.n_blocks  # and the tables of tokens and results


def clock_time(seconds: float) -> str:
    """Seconds as people say them."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


@torch.no_grad()
def probe(planner: Planner, loaders: Loaders, plan: store.Plan) -> dict[str, float]:
    """Seconds a sample of each stage that works beside the others, over the first batches of the plan."""
    config = planner.config
    model = model_for(config, planner.folder, planner.device)
    extractor = Extractor(config, model, planner.conditioner, planner.grounder, plan, Clock())
    shards, planned = Shards(config.data), planned_of(plan.samples)
    batches = [batch for b in range(plan.n_blocks) for batch in batches_of(plan, b, config.batch_size)][: PROBED + 1]
    spent = {"prepare": 0.0, **({"boxes": 0.0} if extractor.asks_boxes else {}), "pass": 0.0}
    done = 0
    for number, batch in enumerate(batches):
        rows = rows_at(shards, [Place(*plan.samples.select("file", "row").row(sample)) for sample in batch])
        work = loaders.submit(prepare, [planned[sample] for sample in batch], rows, extractor.purposes)
        found, seconds = loaders.result(work)
        ready = [one for one in found if not isinstance(one, str)]
        began = time.perf_counter()
        features = extractor.look(ready) if extractor.asks_boxes and ready else None
        if features is not None:
            extractor.ask(ready, features)
        asked = time.perf_counter()
        if ready:
            captured, _ = extractor.run([one["edit"] for one in ready], features)
            captured.hidden.sum().item()  # a GPU has come so far only when it is asked
        ended = time.perf_counter()
        if number or len(batches) == 1:  # the first one warms up
            done += len(batch)
            spent["prepare"] += seconds / max(1, loaders.processes)
            spent["pass"] += ended - asked
            if extractor.asks_boxes:
                spent["boxes"] += asked - began
    if extractor.asks_boxes:  # one after the other, on one device
        spent["boxes and pass"] = spent.pop("boxes") + spent.pop("pass")
    return {stage: seconds / done for stage, seconds in spent.items()}


@dataclass(frozen=True)
class Proposal:
    """A way to keep less."""

    config: ExtractConfig
    bytes: int
    """Of all planned samples."""
    samples: int
    """How many of them fit the budget."""
    leaves_out: str


def proposal_lines(planner: Planner, samples: pl.DataFrame, budget: int) -> Iterator[str]:
    """The proposals as lines to print, those that keep all samples first."""
    found = proposals(planner, samples, budget)
    whole = [one for one in found if one.samples == samples.height]
    yield f"\nto fit {planner.config.budget}, estimated at {samples.height} samples:"
    shown = whole[:6] + sorted((one for one in found if one not in whole), key=lambda one: -one.samples)[:4]
    if not shown:
        yield "  nothing fits: even one sample of the least is larger"
    for number, one in enumerate(shown, 1):
        yield f"  {number}. {options(planner.config, one)}"
        yield f"     {one.bytes * one.samples / samples.height / 1e9:,.1f} GB; leaves out: {one.leaves_out}"


def options(asked: ExtractConfig, one: Proposal) -> str:
    """The options that ask for a proposal where ``asked`` was given."""
    names = ("tokens", "layers", "codec", "text_codec", "attention")
    changed = [name for name in names if getattr(one.config, name) != getattr(asked, name)]
    told = [f"--{name.replace('_', '-')} {getattr(one.config, name)}" for name in changed]
    return " ".join([*told, f"--limit {one.samples}"])


def proposals(planner: Planner, samples: pl.DataFrame, budget: int) -> list[Proposal]:
    """Ways to keep less than what is asked that fit ``budget`` bytes, those that leave out least first.

    Compression first, for it leaves out nothing; then attention rows, layers, the picture's tokens, exactness; samples
    last, of each way as many as fit.
    """
    asked = planner.config
    layers = wanted_layers(asked, planner.model_config.text_config.num_hidden_layers)
    blocks = [name for name in layers if name.isdecimal()]
    ends = [name for name in layers if not name.isdecimal()]
    halves = [(asked.layers, "")]
    for step in (2, 4):
        kept = [name for name in layers if name in ends or name in blocks[::-step] or name == blocks[-1]]
        if len(kept) < len(layers):
            halves.append(
                (",".join(kept), f"{len(layers) - len(kept)} of {len(layers)} layers (every {step}. is kept)")
            )
    kinds = [(asked.tokens, "")] + ([("text", "states of the picture's tokens")] if asked.tokens == "all" else [])
    attentions = [(asked.attention, "")]
    if asked.attention == "heads":
        attentions.append(("mean", "single heads' attention"))
    if asked.attention != "none":
        attentions.append(("none", "attention rows"))
    codecs = [((asked.codec, asked.text_codec), "")]
    if asked.dtype == "bfloat16":
        codecs += [(("planes", "planes"), "nothing, but takes longer to read"), (("int8", "int8"), "0.8 % exactness")]
    found = []
    for (layers, *why), (tokens, *why_t), (attention, *why_a), (codec, *why_c) in itertools.product(
        halves, kinds, attentions, codecs
    ):
        config = replace(asked, layers=layers, tokens=tokens, attention=attention, codec=codec[0], text_codec=codec[1])
        whys = [one for one in (*why_t, *why, *why_a, *why_c) if one]
        size = sum(replace(planner, config=config).plan_of(samples).bytes_estimate().values())
        fit = min(samples.height, int(samples.height * budget / size))
        if fit:
            less = [] if fit == samples.height else [f"{samples.height - fit} of {samples.height} samples"]
            found.append(Proposal(config, size, fit, "; ".join(whys + less) or "nothing"))
    # What keeps most bytes of what was asked for, before compression, leaves out least.
    return sorted(found, key=lambda one: (one.samples < samples.height, -kept_share(planner, one, samples)))


def kept_share(planner: Planner, one: Proposal, samples: pl.DataFrame) -> float:
    """How much of the asked values a proposal keeps; inexact ones count half."""
    raw = sum(replace(planner, config=one.config).plan_of(samples).bytes_raw().values())
    return raw / (2 if one.config.codec == "int8" else 1) * one.samples / samples.height
