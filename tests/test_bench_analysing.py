"""The bench of the pass over attention mass: a store that is whole, rows that are there, bytes that are the same."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

import store
from store.errors import Refusal


@pytest.fixture(scope="module")
def bench():
    """The package, which is not installed: it is run from the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent)
        import bench.analysing
        import bench.run

        yield bench


@pytest.mark.slow
def test_the_pass_over_masses_is_measured_in_a_run_of_its_own(bench, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        bench.run.bench(bench.config.BenchConfig(quick=True, analysis=True, history=tmp_path))
    (path,) = tmp_path.iterdir()
    (record,) = json.loads(path.read_text())
    assert record["settings"]["analysis"]
    rows = record["rows"]
    assert {row["part"] for row in rows} == {"attention mass, 300 samples × 4 heads × 3 queries × 5 layers"}
    assert [row["unit"] for row in rows] == ["MB/s"] * 4 + ["GB", "ms"]
    assert all(row["value"] > 0 and row["baseline_value"] > 0 for row in rows)
    assert "same bytes: yes" in rows[-1]["note"] and "same bytes: yes" in printed.getvalue()
    # In GB, what is allowed is the ratio that is promised times the baseline.
    masses = 2 * 300 * 4 * 3 * 5
    assert rows[0]["goal"] == 0.5 and rows[4]["goal"] * masses == pytest.approx(4e9)


def test_made_up_masses_are_a_sound_store_of_shares(bench, tmp_path, monkeypatch):
    # Shards of 8 samples, so that some of them are copies and the last is short.
    monkeypatch.setattr("store.growth.CHUNK_BYTES", 4 * 2 * 4 * 3 * 5)
    monkeypatch.setattr("store.growth.SHARD_BYTES", 8 * 2 * 4 * 3 * 5)
    sizes = dataclasses.replace(bench.config.ANALYSIS_QUICK, samples=60)
    bench.analysing.make_up(tmp_path / "s.zarr", sizes)
    lazy = store.open(tmp_path / "s.zarr").derived["mass"]
    assert lazy.chunksizes["sample"] == (8,) * 7 + (4,)
    mass = lazy.values
    there = np.isfinite(mass).all((1, 2, 3))
    np.testing.assert_allclose(mass[there].astype(float).sum(-1), 1, atol=5e-3)
    np.testing.assert_array_equal(mass[32:40], mass[:8])
    np.testing.assert_array_equal(mass[56:], mass[24:28])
    assert not np.array_equal(mass[8:16], mass[:8])
    problems = [problem for problem in store.verify(tmp_path / "s.zarr").problems if "derived" in problem]
    assert not problems


def test_two_runs_of_their_own_are_refused(bench):
    with pytest.raises(Refusal, match="--paper and --analysis"):
        bench.config.BenchConfig(paper=True, analysis=True)
