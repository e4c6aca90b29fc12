"""``python -m analysis report``: every question asked of a store, one after the other, and the page with the answers.

What cannot be asked (no probes, no pictures, no attention rows …) is left out with its reason, here and on the page.
"""

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from analysis import (
    causes,
    concentration,
    curves,
    gallery,
    maps,
    maps_figure,
    maps_tables,
    page,
    pictures,
    reading,
    states,
)
from analysis.config import CausesConfig, CurvesConfig, MapsConfig, ReportConfig, Trained
from analysis.finding import Finding
from analysis.study import Study
from probes.boxes import iou
from probes.trained import PREDICTIONS, TrainedProbe
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
        "maps": lambda: [mapped(study, config)],
        "causes": lambda: [caused(study, config)],
        "states": lambda: states.states(config),
    }
    findings: list[Finding] = []
    left_out: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with tqdm(total=len(asked), desc="report", unit="question") as bar:
        for name, ask in asked.items():
            bar.set_postfix_str(name)
            start = time.perf_counter()
            try:
                found = list(ask())
            except Refusal as refusal:
                left_out[name] = str(refusal)
                tqdm.write(f"{name} is left out: {refusal}")
                found = []
            for finding in found:
                finding.save(config.out)
                tqdm.write(f"\n{finding.question}\n{finding.answer}")
            findings += found
            seconds[name] = round(time.perf_counter() - start, 1)
            bar.update()
    shown = study_gallery(config) if "maps" not in left_out else None
    took = {"seconds": seconds | {"all": round(time.perf_counter() - began, 1)}}
    written = page.write(
        config.out,
        f"What {Path(str(study.opened.place)).name} knows of the edited object's place",
        findings,
        config.out,
        shown,
        provenance(study, config, left_out) | took,
    )
    print(f"\n{len(findings)} questions in {time.perf_counter() - began:.0f} s: {written}")
    return written


def mapped(study: Study, config: MapsConfig) -> Finding:
    """Where the dominant words look at l*: scores, figure 4, and the gallery's pictures beside them."""
    main, opened = study.chosen.main, study.opened
    # Where the template's tokens have rows, too, they may be the dominant ones.
    whole = opened.identity.get("queries") == "prompt"
    ranked = study.ranked_tokens(everyone=False) if whole else study.top(len(study.words))
    found = maps.maps(opened, study.voted, ranked, samples=study.reported, seed=config.seed, tokens=config.top)
    finding = maps_tables.finding(found, opened.samples)
    sought, told = pictures.find_pictures(opened, config.data)
    if sought is None:
        tqdm.write(told)
    making = {"store": str(opened.place), "attention": main.name, "proxy": main.proxy, "seed": config.seed}
    _, drawn = maps_figure.draw(
        found, finding.tables, sought, config.out, making, examples=config.examples, seed=config.seed
    )
    boxes = predicted(study, config)
    shown = gallery.gallery(
        opened,
        found,
        sought,
        count=config.gallery,
        seed=config.seed,
        votes=study.voted.drop("part")
        if boxes is None
        else study.voted.drop("part").join(boxes, on="sample", how="left"),
        boxes=None if boxes is None else boxes.drop("iou"),
    )
    config.out.mkdir(parents=True, exist_ok=True)
    shown.write_parquet(gallery_file(config))
    caveats = finding.caveats if sought is not None else (*finding.caveats, told)
    first = concentration.top(study.shares_nt, study.reported, study.tokens, 1)
    rowless = float((first["kind"] != "instruction").mean())
    if not whole and rowless:
        caveats += (
            f"In {rowless:.1%} of pictures the proxy's most read token of all is one of the template, whose rows this "
            "store does not keep; `python -m extract --queries prompt` keeps them. The maps are of the words.",
        )
    return Finding(finding.name, finding.question, finding.answer, (drawn,), finding.tables, caveats)


def gallery_file(config: MapsConfig) -> Path:
    """Where the gallery's samples and pictures are kept."""
    return Path(config.out) / "maps-gallery.parquet"


def study_gallery(config: MapsConfig) -> pl.DataFrame:
    """The samples that ``mapped`` has kept for the page."""
    return pl.read_parquet(gallery_file(config))


def predicted(study: Study, config: Trained) -> pl.DataFrame | None:
    """The main proxy's own boxes of held-out samples in pixels, and their ``iou``; None where its run is not found."""
    opened, main = study.opened, study.chosen.main
    try:
        folder = causes.proxy_of(opened.derived[main.name].attrs, config.probes).folder
    except Refusal:
        return None
    told = pl.read_parquet(folder / PREDICTIONS)
    if not {"x1", "true_x1"} <= set(told.columns):  # it was taught something other than a box
        return None
    corners = ("x1", "y1", "x2", "y2")
    boxes, true = (
        told.select(prefix + name for name in corners).to_torch(dtype=pl.Float32) for prefix in ("", "true_")
    )
    sizes = opened.samples[told["sample"].to_list()].select("width", "height")
    scaled = told.select(
        "sample",
        *((pl.col(name) * sizes["width" if name[0] == "x" else "height"]).alias(name) for name in corners),
    )
    return scaled.with_columns(iou=pl.Series(iou(boxes, true).numpy()))


def caused(study: Study, config: CausesConfig) -> Finding:
    """Whether the proxy needs what it attends to: masks, and proxies that were trained again without it."""
    proxies = proxies_of(study, config)
    votes = study.voted_by([one for one in study.chosen.seeds if one.seed in {probe.seed for probe in proxies}])
    top = study.ranked_tokens(everyone=config.retrain)
    return causes.finding(study.opened, proxies, votes, top, config)


def proxies_of(study: Study, config: Trained) -> list[TrainedProbe]:
    """The proxies of all seeds whose attention the store holds; of other seeds than the main one, those that are found.

    Raises
    ------
    Refusal
        When the main one is not found.
    """
    derived = study.opened.derived
    found = []
    for one in study.chosen.seeds:
        try:
            found.append(causes.proxy_of(derived[one.name].attrs, config.probes))
        except Refusal:
            if one == study.chosen.main:
                raise
    return found


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


def tell(findings: Sequence[Finding], out: Path) -> None:
    """Save findings and print their answers."""
    for finding in findings:
        print(f"{finding.question}\n{finding.answer}\n")
        for caveat in finding.caveats:
            print(f"  note: {caveat}")
        for path in finding.save(out):
            print(path)
        for drawn in finding.figures:
            print(out / f"{drawn.name}.png")
