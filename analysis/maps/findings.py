"""Where the dominant words of a study look: the finding, its figure, and the pictures that the report shows."""

from pathlib import Path

import polars as pl
from tqdm import tqdm

from analysis import concentration
from analysis.config import MapsConfig, Trained
from analysis.finding import Finding
from analysis.maps import figure, gallery, pictures, scores, tables
from analysis.proxies import proxy_of
from analysis.study import Study
from probes.boxes import iou
from probes.trained import PREDICTIONS
from store.errors import Refusal


def maps(study: Study, config: MapsConfig) -> Finding:
    """Where the dominant words look at l*: scores, figure 4, and the gallery's pictures beside them."""
    main, opened = study.chosen.main, study.opened
    # Where the template's tokens have rows, too, they may be the dominant ones.
    whole = opened.identity.get("queries") == "prompt"
    ranked = study.ranked_tokens(everyone=False) if whole else study.top(len(study.words))
    found = scores.maps(opened, study.voted, ranked, samples=study.reported, seed=config.seed, tokens=config.top)
    finding = tables.finding(found, opened.samples)
    sought, told = pictures.find_pictures(opened, config.data)
    if sought is None:
        tqdm.write(told)
    making = {"store": str(opened.place), "attention": main.name, "proxy": main.proxy, "seed": config.seed}
    _, drawn = figure.draw(
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
    shown.with_columns(pl.col("words").list.join(" · ")).write_parquet(gallery_file(config))
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


def predicted(study: Study, config: Trained) -> pl.DataFrame | None:
    """The main proxy's own boxes of held-out samples in pixels, and their ``iou``; None where its run is not found."""
    opened, main = study.opened, study.chosen.main
    try:
        folder = proxy_of(opened.derived[main.name].attrs, config.probes).folder
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
