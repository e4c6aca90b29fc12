"""The loop of ``python -m extract``, everything kept and boxes off, over the bare forward of the same batches."""

import time
from collections import defaultdict

import numpy as np
import torch

from bench.measure import Row, Turns, time_row
from bench.pocket import Pocket

STAGES = {"read": "reading rows", "decode": "decoding pictures", "prepare": "inputs and token tables"}
STAGES |= {"forward": "the pass that keeps", "write": "writing the store"}


@torch.no_grad()
def measure(pocket: Pocket, turns: Turns) -> list[Row]:
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
        took = time.perf_counter() - began
        for stage in STAGES:
            spent[stage].append(clock.seconds[stage])
        return took

    def forward() -> None:
        for batch in batches:
            core(**batch.inputs, use_cache=False)

    bare, whole = "bare forward of the batches", "everything kept, written"
    seconds = turns.take({bare: forward, whole: loop})
    measured = {whole: seconds[whole]}
    # Where the loop is repeated within a turn, its stages are as well; the first call is not counted.
    for stage, times in spent.items():
        measured[f"… {STAGES[stage]}"] = np.reshape(times[1:], (turns.repeats, -1)).mean(1)
    return [time_row("extraction", name, times, bare, seconds[bare]) for name, times in measured.items()]
