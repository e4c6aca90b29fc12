"""The whole bench: set up, measure part by part, print, keep."""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import analysing, capture, editing, extraction, gpu, machine, paper, report, storing, sweeping
from bench.config import BenchConfig
from bench.measure import Row, Turns
from bench.pocket import set_up
from store.errors import Refusal


def bench(config: BenchConfig) -> None:
    """Measure every row, print the table and append it to the history; see `BenchConfig`."""
    sizes = config.analysis_sizes if config.analysis else config.paper_sizes if config.paper else config.sizes
    repeats = sizes.repeats if config.repeats is None else config.repeats
    if repeats < 1 or config.threads < 1:
        raise Refusal(f"--repeats {repeats} and --threads {config.threads} must be 1 or more")
    torch.set_num_threads(config.threads)
    load, began = machine.Load(), datetime.now(UTC)
    with TemporaryDirectory(dir=config.scratch, prefix="bench-") as folder:
        if config.analysis:
            rows, weights = analysing.measure(config.analysis_sizes, repeats, Path(folder)), "no"
        elif config.paper:
            rows, weights = paper.measure(config.paper_sizes, repeats, config.threads, Path(folder)), "no"
        else:
            rows, weights = measure(config, Turns(repeats, config.sizes.least_seconds), Path(folder))
    others = load.others()
    loaded = f"loaded machine: others used {others} cores" if others is not None and others > machine.BUSY else ""
    described = machine.describe()
    record: dict[str, Any] = {
        "time": began.isoformat(timespec="seconds"),
        "slug": machine.slug(described),
        "machine": described,
        "commit": machine.commit(),
        "settings": {
            "quick": config.quick,
            "paper": config.paper,
            "analysis": config.analysis,
            "threads": config.threads,
            **asdict(sizes),
            "repeats": repeats,
        },
        "weights": weights,
        "others_cores": others,
        "note": "; ".join(filter(None, (config.note, "quick: no speeds" if config.quick else "", loaded))),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(record, ensure_ascii=False) if config.json else report.table(record, rows))
    if not config.no_history:
        print(f"kept in {report.keep(record, config.history)}", file=sys.stderr)


def measure(config: BenchConfig, turns: Turns, scratch: Path) -> tuple[list[Row], str]:
    """All rows, and which weights the pocket model had."""
    sizes = config.sizes

    def say(part: str) -> None:
        print(f"bench: {part} …", file=sys.stderr, flush=True)

    say("extraction")
    with set_up(config, scratch, sizes.extracted) as pocket:
        rows = extraction.measure(pocket, turns)
        rows += extraction.workers(pocket, min(3, turns.repeats))
        rows += extraction.memory(pocket)
    rows += gpu.measure(sizes.repeats)
    say("capture")
    with set_up(config, scratch, sizes.samples) as pocket:
        rows += capture.measure(pocket, turns)
    say("editing")
    with set_up(config, scratch, sizes.edited) as pocket:
        rows += editing.measure(pocket, turns, scratch)
    say("proxies")
    with set_up(config, scratch, sizes.swept) as swept:
        rows += sweeping.measure(swept.config, sizes, turns, scratch)
    say("store, pocket states")
    values = storing.read_back(pocket.config.store, scratch / "pocket-values")
    rows += storing.measure(values, "pocket states", sizes, sizes.epochs, turns, scratch)
    label = f"made-up states, {sizes.made_width:,} wide"
    say(f"store, {label}")
    values = storing.make_up(scratch / "made-values", sizes)
    rows += storing.measure(values, label, sizes, sizes.made_epochs, turns, scratch)
    rows += storing.memory(values, label, scratch)
    say("store, opening a large one")
    rows += storing.opening(sizes, turns, scratch)
    return rows, pocket.weights
