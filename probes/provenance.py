"""What made a run and each of its probes: settings, store, samples, code, versions; and what is on disk already."""

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from probes import trained
from probes.learn import Job
from store.errors import Refusal
from store.places import write_file

if TYPE_CHECKING:
    from probes.study import Study

PROVENANCE = "sweep.json"


def begin(study: "Study", jobs: Sequence[Job]) -> None:
    """Write what the run is; refuse a folder whose probes were made otherwise, or that cannot be written.

    Raises
    ------
    Refusal
        When the folder's probes are of another store, other samples or other settings, or were trained without other
        tokens.
    """
    out, path = study.config.out, study.config.out / PROVENANCE
    now = json.loads(json.dumps({"settings": study.config.settings, "store": store_of(study)}))
    if path.exists():
        try:
            before = json.loads(path.read_text())
            before["settings"], before["store"]
        except (ValueError, KeyError, TypeError) as damage:
            raise Refusal(f"{path} is damaged ({damage}): give another --out, or remove it") from None
        for part in ("settings", "store"):
            for name, value in now[part].items():
                then = before[part].get(name)
                if then != value:
                    raise Refusal(
                        f"{out} holds probes of {part} {name} = {brief(then)}, and {brief(value)} is asked: "
                        "give another --out"
                    )
    for job in jobs:
        if finished(out, job) and job.spec.without:
            kept = trained.read_job(trained.folder_of(out, job))[1].get("without", {})
            if kept.get("hash") != study.left_out[job.spec.without]["hash"]:
                raise Refusal(
                    f"{trained.folder_of(out, job)} was trained without other tokens than derived/{job.spec.without} "
                    "marks now: give another --out"
                )
    told = now | {
        "command": ["python", "-m", "probes", *sys.argv[1:]],
        "preset": study.config.preset,
        "store_path": str(study.config.store),
        "identity": dict(study.store.identity),
        "controls": {name: str(source.store.place) for name, source in study.sources.items()},
        "probes": [job.name for job in jobs],
        "code": code(),
        "versions": versions(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / PROVENANCE, json.dumps(told, indent=1).encode())
    except OSError as failure:
        raise Refusal(f"--out {out} cannot be written ({failure.strerror}): give another folder") from None


def store_of(study: "Study") -> dict[str, Any]:
    """Which store and samples, JSON-able."""
    return {
        "identity_hash": study.store.plan.identity_hash,
        "samples": study.split.describe(study.targets[study.config.target].labels),
    }


def making(study: "Study", job: Job) -> dict[str, Any]:
    """Everything that made a probe, for its ``probe.json``."""
    config, source = study.config, study.sources[job.spec.source]
    left_out = {"without": study.left_out[job.spec.without]} if job.spec.without else {}
    return left_out | {
        "sizes": config.sizes(job.spec.kind),
        "width": source.store.plan.width,
        "target": study.targets[job.spec.target].describe(),
        "settings": config.settings | {"precision": config.precision},
        "store": store_of(study)
        | {
            "path": str(source.store.place),
            "identity": dict(source.store.identity),
            "identity_hash": source.store.plan.identity_hash,
        },
        "code": code(),
        "versions": versions(),
    }


@cache
def code() -> dict[str, str]:
    """The package's version, and a hash of the sources of ``probes`` as they run."""
    folder = Path(__file__).parent
    together = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        together.update(path.name.encode() + b"\0" + path.read_bytes())
    return {"version": version("analysis-by-proxy"), "sources": together.hexdigest()}


def versions() -> dict[str, str]:
    """Versions that decide bits."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def brief(value: Any) -> str:
    """A value for one line of text."""
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}…"


def finished(out: Path, job: Job) -> bool:
    """Whether this probe is on disk, as it is wanted now.

    Raises
    ------
    Refusal
        When a probe of its name reads or was taught something else.
    """
    folder = trained.folder_of(out, job)
    if not (folder / trained.MAKING).exists():
        return False
    if trained.read_job(folder)[0] != job:
        kept = asdict(trained.read_job(folder)[0].spec)
        differs = next(name for name, value in asdict(job.spec).items() if kept[name] != value)
        raise Refusal(
            f"{folder} has {differs} {kept[differs]}, and {getattr(job.spec, differs)} is asked: give another --out"
        )
    return True
