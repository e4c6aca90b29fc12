"""The bench: every row beside its named baseline, turns that are fair, and a history that is data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
ROWS = {"capture": 3, "extraction": 6, "store: pocket states": 6, "store: made up, 64 wide": 6, "proxies": 1}


@pytest.fixture(scope="module")
def bench():
    """The package, which is not installed: it is run from the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        import bench.run

        yield bench


def test_a_quick_run_prints_every_row_and_keeps_it_as_data(bench, tmp_path, capsys):
    bench.run.bench(bench.config.BenchConfig(quick=True, history=tmp_path / "history", note="a test"))
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "history").iterdir()
    (record,) = json.loads(path.read_text())
    assert path.name == f"{record['time'][:10]}-{record['slug']}.json"
    assert record["note"].startswith("a test; quick")
    assert record["machine"]["processor"] in printed
    rows = record["rows"]
    assert {part: sum(row["part"] == part for row in rows) for part in ROWS} == ROWS
    assert len(rows) == sum(ROWS.values())
    for row in rows:
        assert row["name"] in printed and row["baseline"] in printed
        assert 0 < row["low"] <= row["ratio"] <= row["high"] < np.inf


def test_contenders_take_turns_and_the_order_alternates(bench):
    called = []
    work = {name: lambda name=name: called.append(name) for name in "ab"}
    bench.measure.Turns(repeats=3, least_seconds=0).take(work)
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"


def test_a_ratio_is_of_one_turn_and_drift_cancels(bench):
    drifting = np.arange(1.0, 6)
    row = bench.measure.rate_row("part", "half as fast", 1e6, 2 * drifting, "base", drifting)
    assert (row.low, row.ratio, row.high, row.repeats) == (0.5, 0.5, 0.5, 5)
    row = bench.measure.time_row("part", "twice as long", 2 * drifting, "base", drifting)
    assert (row.value, row.baseline_value, row.ratio) == (6000, 3000, 2)


def test_short_work_is_repeated_within_a_turn(bench):
    calls = []
    bench.measure.Turns(repeats=1, least_seconds=1.0).take({"short": lambda: calls.append(0) or 0.25})
    assert len(calls) == 1 + 4


def test_history_grows_and_refuses_what_it_did_not_write(bench, tmp_path):
    record = {"time": "2026-01-02T03:04:05+00:00", "slug": "some-machine", "rows": []}
    path = bench.report.keep(record, tmp_path)
    assert bench.report.keep(record, tmp_path) == path
    assert json.loads(path.read_text()) == [record, record]
    path.write_text("{torn")
    with pytest.raises(bench.report.Refusal, match="not a list"):
        bench.report.keep(record, tmp_path)
    assert path.read_text() == "{torn"


def test_help_teaches():
    done = subprocess.run([sys.executable, "-m", "bench", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for word in ("baseline", "--quick", "--no-history", "--threads"):
        assert word in done.stdout
