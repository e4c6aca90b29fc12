"""Boxes for data without a store: one row a sample, whole parts only, the same rows whatever happened on the way."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extract.boxes import Problem
from extract.ground import SCHEMA, BoxTable, GroundConfig, ground, summary_of
from extract.omniedit import EMPTY_PROMPT, SPECIAL_TOKENS, TRUNCATED
from extract.planning import LONG_PROMPT
from extract.scenes.shards import ScenesConfig, write_scenes
from store.errors import Refusal

SETTINGS = {"batch_size": 4, "part_samples": 8, "threads": 1, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(ScenesConfig(folder, samples=36, seed=41))
    return folder


@pytest.fixture(scope="module")
def boxes(scenes, tmp_path_factory) -> Path:
    """The table of all scenes, made without an interruption."""
    out = tmp_path_factory.mktemp("table") / "boxes.parquet"
    assert ground(GroundConfig(str(scenes), out, **SETTINGS)) == 0
    return out


def rows_of(scenes) -> list[dict]:
    (shard,) = scenes.glob("*.parquet")
    return pq.read_table(shard).to_pylist()


def written(rows, folder) -> str:
    """A data set of these rows."""
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet")
    return str(folder)


def bytes_of(table) -> dict[str, bytes]:
    return {part.name: part.read_bytes() for part in table.iterdir()}


def test_every_sample_has_a_row_in_the_order_of_the_data(scenes, boxes):
    rows, data = pl.read_parquet(boxes), rows_of(scenes)
    assert dict(rows.schema) == SCHEMA
    assert rows["sample_id"].to_list() == [row["omni_edit_id"] for row in data]
    assert rows.select("width", "height").rows() == [(row["width"], row["height"]) for row in data]
    assert rows.select("true_x1", "true_y1", "true_x2", "true_y2").rows() == [tuple(row["box"]) for row in data]
    assert pq.read_table(boxes).num_rows == len(data)  # and other readers of parquet find the same


def test_boxes_are_in_pixels_of_the_source_picture(boxes):
    summary = summary_of(pl.read_parquet(boxes))
    assert summary["n_true"] == 36
    assert summary["model"]["iou50"] >= 0.8
    assert summary["model"]["low"] > summary["centre_box"]["high"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(scenes, boxes, tmp_path, capsys):
    out = tmp_path / "boxes.parquet"
    given = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "extract.ground", "--data", str(scenes), "--out", str(out), *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "part-00001.parquet").exists():
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = bytes_of(out)
    assert len(there) < 5
    assert ground(GroundConfig(str(scenes), out, **SETTINGS, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["new"] == 36 - sum(len(pl.read_parquet(out / name)) for name in there)
    assert bytes_of(out) == bytes_of(boxes)
    assert [left.name for left in tmp_path.iterdir()] == ["boxes.parquet"]


def test_what_a_kill_left_half_written_is_no_part(scenes, boxes, tmp_path):
    out = tmp_path / "boxes.parquet"
    (tmp_path / "boxes.parquet.partial").write_bytes(b"PAR1 and then the power went")
    ground(GroundConfig(str(scenes), out, **SETTINGS, limit=8))
    assert (out / "part-00000.parquet").read_bytes() == (boxes / "part-00000.parquet").read_bytes()
    assert [left.name for left in tmp_path.iterdir()] == ["boxes.parquet"]


def test_a_table_that_is_done_is_left_as_it_is(scenes, boxes, capsys):
    before = [part.stat().st_mtime_ns for part in sorted(boxes.iterdir())]
    for limit in (None, 36, 10):
        assert ground(GroundConfig(str(scenes), boxes, **SETTINGS, limit=limit, json=True)) == 0
        assert json.loads(capsys.readouterr().out)["new"] == 0
    assert [part.stat().st_mtime_ns for part in sorted(boxes.iterdir())] == before


def test_a_larger_limit_adds_to_the_table(scenes, boxes, tmp_path):
    out = tmp_path / "boxes.parquet"
    for limit in (8, 20):
        ground(GroundConfig(str(scenes), out, **SETTINGS, limit=limit))
        assert len(pl.read_parquet(out)) == limit
    assert pl.read_parquet(out)[:16].equals(pl.read_parquet(boxes)[:16])


def test_what_cannot_be_asked_has_a_row_that_says_why(scenes, tmp_path, capsys):
    rows = rows_of(scenes)[:9]
    rows[1]["src_img"]["bytes"] = rows[1]["src_img"]["bytes"][:-900]
    rows[2]["edited_prompt_list"] = ["remove " + "the red cube " * 300]
    rows[3]["edited_prompt_list"] = ["  "]
    rows[4]["box"] = None
    rows[5]["edited_prompt_list"] = ["Remove <|im_end|> it."]
    out = tmp_path / "boxes.parquet"
    assert ground(GroundConfig(written(rows, tmp_path / "data"), out, **SETTINGS, json=True)) == 0
    summary, table = json.loads(capsys.readouterr().out), pl.read_parquet(out)
    problems = dict(table.select("sample_id", "problem").iter_rows())
    names = [row["omni_edit_id"] for row in rows]
    assert set(problems) == {*names} - {names[3]}
    assert {name: problem for name, problem in problems.items() if problem} == {
        names[1]: TRUNCATED,
        names[2]: LONG_PROMPT,
        names[5]: SPECIAL_TOKENS,
    }
    assert table.filter(pl.col("problem").is_not_null())["answer"].to_list() == [None] * 3
    assert summary["set_aside"] == {EMPTY_PROMPT: 1}
    assert summary["boxes"] == 5
    assert summary["n_true"] == 4  # asked, and with a true box


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("max_new_tokens", 30, "max_new_tokens is 40 there and 30 here"),
        ("batch_size", 5, "batch_size is 4 there and 5 here"),
        ("max_pixels", 30_000, "processor.size.longest_edge is 39200 there and 30000 here"),
        ("prompt", "last", "prompt is 'first' there and 'last' here"),
    ],
)
def test_a_table_of_other_settings_is_refused_by_their_names(scenes, boxes, setting, value, named):
    before = bytes_of(boxes)
    with pytest.raises(Refusal, match=named):
        ground(GroundConfig(str(scenes), boxes, **SETTINGS | {setting: value}))
    assert bytes_of(boxes) == before


def test_the_identity_travels_in_every_part(boxes):
    for part in boxes.iterdir():
        described = json.loads(pl.read_parquet_metadata(part)["analysis_by_proxy.boxes"])
        assert {"weights", "template", "max_new_tokens", "libraries"} <= described.keys()
        assert len(described["weights"]["model.safetensors"]) == 64


def test_data_that_changed_are_refused(scenes, tmp_path):
    rows, out = rows_of(scenes), tmp_path / "boxes.parquet"
    ground(GroundConfig(str(scenes), out, **SETTINGS, limit=8))
    for name, others in (("less", rows[:5]), ("other", [*rows[:3], *rows[4:]])):
        with pytest.raises(Refusal, match="the data changed"):
            ground(GroundConfig(written(others, tmp_path / name), out, **SETTINGS, limit=9))


def test_two_processes_do_not_write_one_table(tmp_path):
    with (
        BoxTable(tmp_path / "boxes.parquet", {}),
        pytest.raises(Refusal, match="another process"),
        BoxTable(tmp_path / "boxes.parquet", {}),
    ):
        pass


@pytest.mark.parametrize("foreign", ["notes.txt", "part-00000.parquet", "part-00001.parquet"])
def test_a_folder_with_other_files_is_refused(tmp_path, foreign):
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / foreign)
    with pytest.raises(Refusal, match=f"holds {foreign}, which is not part-00000"), BoxTable(tmp_path, {}):
        pass


def test_a_missing_part_is_refused(tmp_path):
    with BoxTable(tmp_path, {"a": 1}) as table:
        for name in "xyz":
            table.append([{"sample_id": name}])
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(Refusal, match="holds part-00002"), BoxTable(tmp_path, {"a": 1}):
        pass


def test_the_summary_counts_bad_answers_as_misses_of_those_that_were_asked():
    true = {"true_x1": 10, "true_y1": 10, "true_x2": 30, "true_y2": 30, "width": 100, "height": 100}
    hit = {"x1": 10, "y1": 10, "x2": 30, "y2": 30, "answer": "a"}
    rows = [
        {"sample_id": "right"} | true | hit,
        {"sample_id": "edge"} | true | hit | {"x1": 0, "x2": 0, "problem": str(Problem.DEGENERATE)},
        {"sample_id": "silent"} | true | {"answer": "", "problem": str(Problem.NO_NUMBERS)},
        {"sample_id": "cut"} | true | {"answer": "[1", "problem": str(Problem.UNFINISHED)},
        {"sample_id": "unasked"} | true | {"problem": TRUNCATED},
        {"sample_id": "no true box", "width": 100, "height": 100} | hit,
    ]
    summary = summary_of(pl.DataFrame(rows, schema=SCHEMA))
    assert (summary["samples"], summary["boxes"], summary["n_true"]) == (6, 2, 4)
    assert summary["problems"] == dict.fromkeys(
        (Problem.DEGENERATE, Problem.NO_NUMBERS, Problem.UNFINISHED, TRUNCATED), 1
    )
    assert summary["model"]["iou50"] == 0.25
    assert summary["model"]["no_box"] == 0.5
    assert summary["centre_box"]["iou50"] == 0  # a box of the true size in the middle
    assert summary_of(pl.DataFrame(rows[4:], schema=SCHEMA))["model"] is None
