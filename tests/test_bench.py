"""The bench: every row beside its named baseline, turns that are fair, and a history that is data."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FEW = {"capture": 4, "extraction": 11, "GPU, 7B shapes": 7, "proxies": 6}
"""Rows of the parts that are not about the store."""


@pytest.fixture(scope="module")
def bench():
    """The package, which is not installed: it is run from the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        import bench.gpu
        import bench.run

        yield bench


@pytest.fixture(scope="module")
def ran(bench, tmp_path_factory):
    """What a quick run printed, and where it kept the record."""
    history = tmp_path_factory.mktemp("bench") / "history"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        bench.run.bench(bench.config.BenchConfig(quick=True, history=history, note="a test"))
    (path,) = history.iterdir()
    return printed.getvalue(), path


@pytest.fixture
def quick(ran):
    """Rows of the quick run."""
    (record,) = json.loads(ran[1].read_text())
    return record["rows"]


@pytest.mark.slow
def test_a_quick_run_prints_every_row_and_keeps_it_as_data(ran):
    printed, path = ran
    (record,) = json.loads(path.read_text())
    assert path.name == f"{record['time'][:10]}-{record['slug']}.json"
    assert record["note"].startswith("a test; quick")
    assert record["machine"]["processor"] in printed
    rows = record["rows"]
    assert {part: sum(row["part"] == part for row in rows) for part in FEW} == FEW
    for row in rows:
        assert row["name"] in printed and row["baseline"] in printed and row["part"] in printed
        if row["ratio"] is None:
            assert row["note"] and row["note"] in printed
        else:
            assert 0 < row["low"] <= row["ratio"] <= row["high"] < np.inf
    assert "MISSED" not in printed, "a quick run says nothing about speed"


@pytest.mark.slow
def test_a_sweep_is_measured_beside_one_by_one_and_beside_the_vlm(quick):
    rows = [row for row in quick if row["part"] == "proxies"]
    # A probe, a permuted one and a control task for each of 14 layers.
    assert {(row["name"], row["baseline"], row["goal"]) for row in rows[:3]} == {
        ("sweep of 42 probes, steps of a probe", "plain PyTorch, one by one", 8.0),
        ("sweep of 42 probes, steps of a probe", "our code, one by one", None),
        ("sweep of 42 probes, steps of a probe", "VLM again for each batch", 50.0),
    }
    assert [row["unit"] for row in rows[3:]] == ["MB/s", "ms", "MB"]
    assert rows[4]["ratio"] < 1, "it waits for longer than it trains"


@pytest.mark.slow
def test_the_papers_sizes_are_measured_in_a_run_of_their_own(bench, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        bench.run.bench(bench.config.BenchConfig(quick=True, paper=True, history=tmp_path))
    (path,) = tmp_path.iterdir()
    (record,) = json.loads(path.read_text())
    assert record["settings"]["paper"] and {row["part"].rsplit(", ", 1)[0] for row in record["rows"]} == {
        "proxies, paper sizes"
    }
    measured = [row for row in record["rows"] if row["ratio"] is not None]
    assert [row["unit"] for row in measured] == ["steps/s"] * 3 + ["GB"] * 2
    assert all(row["value"] > 0 and row["baseline_value"] > 0 for row in measured)
    assert "3 layers at once" in printed.getvalue()
    absent = [row for row in record["rows"] if row["ratio"] is None]
    assert all(row["part"].endswith("GPU") and row["note"] == "not measured: no GPU" for row in absent)


@pytest.mark.parametrize("label", ["pocket states", "made-up states, 64 wide"])
@pytest.mark.slow
def test_the_store_is_measured_beside_every_rival(bench, quick, label):
    parts = {}
    for row in quick:
        if row["part"].startswith(f"{label}: "):
            parts.setdefault(row["part"].removeprefix(f"{label}: "), []).append(row)
    codecs = {row["name"] for part, rows in parts.items() if part.startswith("codecs") for row in rows}
    assert codecs >= {*bench.rivals.CODECS, "store, none", "store, zstd", "store, int8", "store, fp8"}
    shuffled = [rows for part, rows in parts.items() if part.startswith("shuffled ") and "from disk" not in part]
    from_disk = [rows for part, rows in parts.items() if part.startswith("shuffled from disk")]
    assert len(shuffled) == len(from_disk) == 2
    kept = {kind.name for kind in (*bench.rivals.MAPS, *bench.rivals.KEEPERS)}
    for rows in shuffled:
        named = {name for row in rows for name in (row["name"], row["baseline"])}
        assert named >= kept | {f"{kind.name}, zstd store" for kind in bench.rivals.READERS}
        promised = {(row["name"], row["goal"]) for row in rows if row["goal"]}
        assert promised >= {("store, none", 0.9), ("store, zstd", 0.5), ("store, none", 3.0)}
    assert {row["goal"] for rows in from_disk for row in rows if row["name"] == "store, none"} == {2.0, 10.0}
    assert {row["goal"] for row in parts["writing"] if row["name"] == "store, none"} == {0.7}
    assert "verify" in {row["name"] for row in parts["writing, verification"]}
    assert "arrays, zstd" in {row["name"] for row in parts["on disk"]}


def test_a_rival_that_is_not_there_is_a_row(bench):
    with pytest.raises(bench.rivals.Unavailable, match="not installed"):
        bench.rivals.need("a_package_that_nobody_has")
    row = bench.measure.missing_row("part", "absent", "base", "not installed")
    record = {"machine": bench.machine.describe(), "settings": {"quick": False, "threads": 1, "repeats": 1}}
    record |= {"commit": None, "time": "", "weights": "", "note": ""}
    assert "not installed" in bench.report.table(record, [row])
    assert row.met is None


def test_a_goal_is_kept_or_missed(bench):
    even = np.ones(3)
    fast, slow = (bench.measure.rate_row("part", "x", 1e6, s * even, "base", even, goal=0.9) for s in (1.1, 1.2))
    small = bench.measure.size_row("part", "x", 2.0, "base", 1.0, goal=2.5)
    assert (fast.met, slow.met, small.met) == (True, False, True)
    record = {"machine": bench.machine.describe(), "settings": {"quick": False, "threads": 1, "repeats": 1}}
    record |= {"commit": None, "time": "", "weights": "", "note": ""}
    printed = bench.report.table(record, [fast, slow, small])
    assert "≥ 0.90 met" in printed and "≥ 0.90 MISSED" in printed and "≤ 2.50 met" in printed
    assert "2 of 3 goals met; missed:" in printed


def test_files_leave_memory_and_a_touched_map_keeps_them(bench, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(2**24))
    try:
        bench.measure.drop_from_memory([path])
    except bench.measure.StillWarm as why:
        pytest.skip(f"this file system keeps what it has: {why}")
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped[:: 2**12].sum() == 0
    with pytest.raises(bench.measure.StillWarm, match="pages stay"):
        bench.measure.drop_from_memory([path])


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


def test_the_rows_of_a_gpu_are_measured_by_code_that_runs(bench):
    """At tiny shapes on the CPU: what a GPU adds is the side stream alone."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = bench.gpu.config_7b()
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, vision.depth, vision.out_hidden_size) == (3584, 28, 32, 3584)
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 96, 3
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 32, 48, 2
    vision.out_hidden_size, vision.fullatt_block_indexes = 64, [1]
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    rows = bench.gpu.of_pictures(model, 112, 2, 64, 1)
    rows.append(bench.gpu.moving(torch.device("cpu"), 10**6, 1))
    assert [row.goal for row in rows] == [None, None, 1.05, 1.05, None]
    assert all(row.value > 0 and row.ratio > 0 for row in rows)


def test_help_teaches():
    done = subprocess.run([sys.executable, "-m", "bench", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for word in ("baseline", "--quick", "--no-history", "--threads", "--paper"):
        assert word in done.stdout
