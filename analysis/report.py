"""``python -m analysis report``: every question asked of a store, one after the other, and the page with the answers.

What cannot be asked (no probes, no pictures, no attention rows …) is left out with its reason, here and on the page.
"""

import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from analysis import curves, page, reading
from analysis.causes.findings import causes
from analysis.config import CurvesConfig, ReportConfig
from analysis.finding import Finding
from analysis.maps.findings import gallery_file, maps
from analysis.states.findings import states
from analysis.states.lens import Head
from analysis.study import Study
from store.errors import Refusal

LIBRARIES = ("torch", "transformers", "zarr", "xarray", "dask", "polars", "matplotlib", "textblob")


def report(config: ReportConfig) -> Path:
    """Ask everything, save each finding, write the page; prints each answer as it is found.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    Refusal
        When the store holds no attention of a proxy, or no samples of the splits.
    """
    study, began = Study(config), time.perf_counter()
    study.reported  # noqa: B018 - what nothing can be said without is refused at once
    asked: dict[str, Callable[[], Iterable[Finding]]] = {
        "curves": lambda: [curves.finding(CurvesConfig(config.probes, config.out))],
        "mass": lambda: [reading.mass(study)],
        "heads": lambda: [reading.decisive(study)],
        "layers": lambda: [reading.vote(study)],
        "words": lambda: [reading.words(study)],
        "maps": lambda: [maps(study, config)],
        "causes": lambda: [causes(study, config)],
        "states": lambda: states(replace(config, no_lens=True) if "lens" in left_out else config),
    }
    findings: list[Finding] = []
    left_out: dict[str, str] = {}
    seconds: dict[str, float] = {}

    def say(words: str) -> None:
        if not config.json:
            tqdm.write(words)

    if not config.no_lens and (lacking := without_lens(study, config)):
        left_out["lens"] = lacking
        say(f"lens is left out: {lacking}")
    with tqdm(total=len(asked), desc="report", unit="question") as bar:
        for name, ask in asked.items():
            bar.set_postfix_str(name)
            start = time.perf_counter()
            try:
                found = list(ask())
            except Refusal as refusal:
                left_out[name] = str(refusal)
                say(f"{name} is left out: {refusal}")
                found = []
            for finding in found:
                finding.save(config.out)
                say(f"\n{finding.question}\n{finding.answer}")
            findings += found
            seconds[name] = round(time.perf_counter() - start, 1)
            bar.update()
    shown = pl.read_parquet(gallery_file(config)) if "maps" not in left_out else None
    took = {"seconds": seconds | {"all": round(time.perf_counter() - began, 1)}}
    written = page.write(
        config.out,
        f"What {Path(str(study.opened.place)).name} knows of the edited object's place",
        findings,
        config.out,
        shown,
        provenance(study, config, left_out) | took,
    )
    if config.json:
        told = {"page": str(written), "findings": [one.told(config.out) for one in findings], "left_out": left_out}
        print(json.dumps(told, ensure_ascii=False))
    else:
        print(f"\n{len(findings)} questions in {time.perf_counter() - began:.0f} s: {written}")
    return written


def without_lens(study: Study, config: ReportConfig) -> str | None:
    """Why the logit lens cannot be asked, None if it can."""
    try:
        Head.of(study.opened.identity, config.checkpoint)
    except Refusal as refusal:
        return str(refusal)
    return None


def provenance(study: Study, config: ReportConfig, left_out: dict[str, str]) -> dict[str, Any]:
    """What the page was made of."""
    proxies = [*study.chosen.seeds, *study.chosen.permuted]
    told: dict[str, Any] = {
        "store": {
            "place": str(study.opened.place),
            "identity_hash": study.opened.plan.identity_hash,
            "samples": int(study.opened.valid.sum()),
            "identity": dict(study.opened.identity),
        },
        "proxies": [
            {"probe": one.probe, "labels": one.labels, "seed": one.seed, "sha256": one.proxy, "array": one.name}
            for one in proxies
        ],
        "settings": {key: _plain(value) for key, value in asdict(config).items()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }
    return told | ({"left_out": left_out} if left_out else {})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
