"""The loop of ``python -m extract``, everything kept and boxes off, over the bare forward of the same batches."""

import time
from collections import defaultdict

import numpy as np
import torch

from bench.measure import Row, take_turns, time_row
from bench.pocket import Pocket

STAGES = {"read": "reading rows", "decode": "decoding pictures", "prepare": "inputs and token tables"}
STAGES |= {"forward": "the pass that keeps", "write": "writing the store"}


@torch.no_grad()
def measure(pocket: Pocket, repeats: int) -> list[Row]:
    """The loop, then where its time goes; leaves the filled store at ``pocket.config.store``."""
    core, conditioner, clock = pocket.extractor.model.model, pocket.extractor.conditioner, pocket.extractor.clock
    batches, spent = [], defaultdict(list)
    make = conditioner.batch

    def remember(pairs):
        batches.append(make(pairs))
        return batches[-1]

    # The batches are the loop's own, so they are taken from it.
    conditioner.batch = remember
    pocket.new_store()
    pocket.fill_store()
    del conditioner.batch

    def loop() -> float:
        pocket.new_store()
        clock.seconds.clear()
        began = time.perf_counter()
        pocket.fill_store()
        whole = time.perf_counter() - began
        for stage in STAGES:
            spent[stage].append(clock.seconds[stage])
        return whole

    def forward() -> None:
        for batch in batches:
            core(**batch.inputs, use_cache=False)

    bare = "bare forward of the batches"
    seconds = take_turns({bare: forward, "everything kept, written": loop}, repeats)
    measured = {"everything kept, written": seconds["everything kept, written"]}
    # The loop is too long to be repeated within a turn: one entry a turn, after the one that is not counted.
    measured |= {f"… {STAGES[stage]}": np.array(times[-repeats:]) for stage, times in spent.items()}
    return [time_row("extraction", name, times, bare, seconds[bare]) for name, times in measured.items()]
