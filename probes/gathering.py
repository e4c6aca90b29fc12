"""The tables of a run: predictions of all probes and floors joined, scored, and written beside them.

All that is read lies in the run's folder, so the tables can be made again without the store.
"""

import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from probes import tables, trained
from probes.floors import constant
from probes.learn import Job
from probes.panel import HELD_OUT, joined
from probes.predictions import frame
from probes.specs import Spec
from store.errors import Refusal
from store.places import write_file
from store.plan import depth

if TYPE_CHECKING:
    from probes.study import Study

FLOORS = "floors.parquet"
DATA = "data"
"""Folder with what is known of the samples of each data set, and the predictions for those that were asked later."""
ORDER = ("floor", "layer", "prompt", "other", "control", "matched", "efficiency", "codelength")


def write(path: Path, table: pl.DataFrame) -> int:
    """A table as parquet, whole or not at all; its size in bytes."""
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    return write_file(path, buffer.getvalue())


def plain(samples: pl.DataFrame) -> pl.DataFrame:
    """The columns of a sample table that can be strata: no lists, no structs."""
    return samples.select(name for name, kind in samples.schema.items() if not kind.is_nested())


def begin(study: "Study") -> None:
    """Keep what the tables need of the store: its samples, and the answers of the floors without training."""
    write(study.config.out / DATA / f"{HELD_OUT}-samples.parquet", plain(study.store.samples))
    test, found = study.split.test, []
    for target in study.targets.values():
        for name, answers in constant(target, study.split.train, test):
            own = name if target.name == "box" else f"{name}-{target.name}"
            one = frame(floor_of(own, target.name), study.store.samples, test, answers, watched=study.split.watch)
            found.append(one.with_columns(target=pl.lit(target.name)))
    path = study.config.out / FLOORS
    if path.exists():
        # Probes of the same folder, and so of the same samples, may have been asked for something else before.
        before = pl.read_parquet(path)
        found.append(before.filter(~pl.col("target").is_in(list(study.targets))))
    write(path, joined(found))


def floor_of(name: str, target: str) -> Job:
    """A floor without training as a probe that was not trained."""
    return Job(Spec(name, "floor", (), "none", "constant", target), 0)


def jobs_of(out: Path) -> list[Job]:
    """The probes whose training is finished, in the order of tables.

    Raises
    ------
    Refusal
        When there is none.
    """
    found = [trained.read_job(folder)[0] for folder in (out / "proxies").glob("*") if folder.is_dir()]
    if not found:
        raise Refusal(f"{out} holds no trained probe: run `python -m probes sweep --out {out}` first")

    def place(job: Job) -> tuple:
        spec = job.spec
        return (
            ORDER.index(spec.role),
            spec.labels,
            spec.source,
            spec.share,
            [depth(name) for name in spec.layers],
            spec.name,
            job.seed,
        )

    return sorted(found, key=place)


def about(jobs: list[Job], floors: pl.DataFrame) -> pl.DataFrame:
    """A row a probe."""
    pairs = floors.select("probe", "target").unique(maintain_order=True).rows()
    constants = [floor_of(name, target).spec for name, target in pairs]
    specs = dict.fromkeys([*constants, *(job.spec for job in jobs)])
    rows = [{"probe": spec.name, "layer": spec.layer} | asdict(spec) | {"layers": list(spec.layers)} for spec in specs]
    return pl.DataFrame(rows, infer_schema_length=None).drop("name").cast({"keys": pl.Int64, "without": pl.String})


def shifts(out: Path) -> Iterator[str]:
    """Names of the other data that the probes were asked about."""
    for path in sorted((out / DATA).glob("*-samples.parquet")):
        if (name := path.name.removesuffix("-samples.parquet")) != HELD_OUT:
            yield name


def gather(out: Path) -> dict[Path, int]:
    """Write ``about``, ``predictions``, ``results`` and ``comparisons`` (parquet) of a run; their sizes in bytes."""
    jobs = jobs_of(out)
    floors = pl.read_parquet(out / FLOORS)
    folders = [trained.folder_of(out, job) for job in jobs]
    asked = [floors.drop("target")]
    asked += [pl.read_parquet(folder / trained.PREDICTIONS) for folder in folders]
    # Beside a name's own table those of its control stores, NAME+CONTROL.
    asked += [
        pl.read_parquet(path)
        for name in shifts(out)
        for path in sorted((out / DATA).glob(f"{name}*.parquet"))
        if path.stem.split("+")[0] == name
    ]
    made: dict[str, Any] = {"about": about(jobs, floors), "predictions": joined(asked)}
    curves = pl.concat([pl.read_parquet(folder / trained.CURVE) for folder in folders])
    samples = {name: pl.read_parquet(out / DATA / f"{name}-samples.parquet") for name in (HELD_OUT, *shifts(out))}
    made["results"], made["comparisons"] = tables.gather(made["predictions"], curves, made["about"], samples)
    paths = {name: out / f"{name}.parquet" for name in made}
    for path in paths.values():
        # Old tables beside new ones would look whole.
        path.unlink(missing_ok=True)
    return {paths[name]: write(paths[name], table) for name, table in made.items()}
