"""Training a proxy per layer side by side, over training them one after the other."""

import time
from pathlib import Path

import store
from bench.config import Sizes
from bench.measure import Row, Turns, time_row
from probes.config import ProbeConfig
from probes.data import KINDS, States, scenes
from probes.learn import train_stack
from probes.specs import Spec


def measure(path: Path, sizes: Sizes, turns: Turns) -> list[Row]:
    """Milliseconds of a training step of all layers' proxies, pocket preset, states held in memory."""
    opened = store.open(path)
    config = ProbeConfig(store=str(path), steps=sizes.steps + 1, depth=sizes.proxy_depth, l1_steps=0)
    held = scenes(opened, config.watch)
    specs = [Spec(f"layer-{name}", "layer", (name,), "all") for name in opened.layers]

    def step_time(of: list[Spec]):
        layers = [name for spec in of for name in spec.layers]
        states = States(opened, held.samples, layers, KINDS, float("inf"))

        def timed() -> float:
            """Seconds of a step, without the setting up, of which the first is a part."""
            done = []
            train_stack(of, states, held, config, seed=0, tick=lambda step: done.append(time.perf_counter()))
            return (done[-1] - done[0]) / sizes.steps

        return timed

    singles = [step_time([spec]) for spec in specs]
    one_by_one, stacked = f"{len(specs)} one by one", f"{len(specs)} stacked, a step"
    contenders = {one_by_one: lambda: sum(single() for single in singles), stacked: step_time(specs)}
    seconds = turns.take(contenders)
    return [time_row("proxies", stacked, seconds[stacked], one_by_one, seconds[one_by_one])]
