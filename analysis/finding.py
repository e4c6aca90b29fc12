"""What one question to a store came to: an answer in words, the numbers behind it, and figures; kept as files."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from store.errors import Refusal
from store.places import write_file

SUFFIX = ".finding.json"


@dataclass(frozen=True)
class Drawn:
    """A figure that ``style.save`` wrote."""

    name: str
    """Name of its files, without suffix."""
    caption: str
    """What it shows, so that it can be read without the code: axes, n, what bands and marks are."""


@dataclass(frozen=True)
class Finding:
    """One question and what the store says."""

    name: str
    """One word; names of its files begin with it."""
    question: str
    """As a researcher would ask it."""
    answer: str
    """In words; every number with its n, its 95 % interval and its floor."""
    figures: tuple[Drawn, ...] = ()
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    """The numbers, tidy, by name; the first is what the report shows of them."""
    caveats: tuple[str, ...] = ()
    """What to hold against the answer."""

    def save(self, out: Path) -> list[Path]:
        """Write ``NAME.finding.json`` and ``NAME-TABLE.parquet`` into ``out``; the paths, the finding last."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for table, rows in self.tables.items():
            written.append(out / f"{self.name}-{table}.parquet")
            buffer = io.BytesIO()
            rows.write_parquet(buffer)
            write_file(written[-1], buffer.getvalue())  # whole or not at all
        told = {
            "question": self.question,
            "answer": self.answer,
            "figures": [asdict(one) for one in self.figures],
            "tables": list(self.tables),
            "caveats": list(self.caveats),
        }
        written.append(out / f"{self.name}{SUFFIX}")
        write_file(written[-1], json.dumps(told, indent=1, ensure_ascii=False).encode())
        return written

    def told(self, out: Path) -> dict[str, Any]:
        """JSON-able: the answer, and where ``save`` and ``style.save`` put the rest."""
        out = Path(out)
        return {
            "name": self.name,
            "question": self.question,
            "answer": self.answer,
            "caveats": list(self.caveats),
            "tables": {table: str(out / f"{self.name}-{table}.parquet") for table in self.tables},
            "figures": [str(out / f"{drawn.name}.png") for drawn in self.figures],
        }

    @classmethod
    def load(cls, out: Path, name: str) -> "Finding":
        """The finding of this name that ``save`` wrote.

        Raises
        ------
        Refusal
            When it is not there, or damaged.
        """
        path = Path(out) / f"{name}{SUFFIX}"
        try:
            told = json.loads(path.read_text())
            tables = {table: pl.read_parquet(path.parent / f"{name}-{table}.parquet") for table in told["tables"]}
            figures = tuple(Drawn(**one) for one in told["figures"])
            return cls(name, told["question"], told["answer"], figures, tables, tuple(told["caveats"]))
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as failure:
            raise Refusal(
                f"{path} cannot be read ({type(failure).__name__}): `python -m analysis {name} --store STORE` makes it"
            ) from None
