"""Verdicts of a person: nothing that was confirmed is lost, nothing senseless is kept, nobody else can send one."""

import dataclasses
import io
import json
import resource
import shutil
import threading
from pathlib import Path

import google_crc32c
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reviewing import BOX, Review, lines, make_store
from torchvision.ops import box_iou

import store
from extract.review import verdicts
from extract.review.agreement import iou, mean_iou
from extract.review.config import ReviewConfig
from extract.review.desk import Desk, Unfit
from extract.review.pictures import Missing, Pictures
from extract.review.server import chosen_samples, review
from extract.review.verdicts import Verdict, VerdictLog
from extract.scenes.shards import ScenesConfig, write_scenes
from store.errors import Refusal

SAMPLES = 10


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=SAMPLES, seed=3, difficulty="medium"))
    return folder


@pytest.fixture(scope="module")
def reviewed(scenes, tmp_path_factory):
    """A store; samples 1 and 4 have no box, the model's box of 0 is 10 pixels too wide."""
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    return make_store(path, scenes, vlm=[(104.0, 364.0, 195.0, 450.0), None, (212.0, 203.0, 274.0, 292.0)])


@pytest.fixture
def desk(reviewed, scenes, tmp_path):
    opened = store.open(reviewed)
    log = VerdictLog(tmp_path / "v.jsonl", opened.plan.identity_hash)
    yield Desk(opened.samples, Pictures(str(scenes)), log, "Ada")
    log.close()


def verdict(number, kind="accepted", box=(1.0, 2.0, 30.0, 40.0), **changes):
    held = box if kind in ("accepted", "fixed") else None
    given = Verdict(f"id{number}", kind, held, None, box, None, verdicts.now(), "hash")
    return dataclasses.replace(given, **changes)


def written(path, *told):
    log = VerdictLog(path, "hash")
    for one in told:
        log.append(one)
    log.close()
    return path


# ---- the file ----------------------------------------------------------------------------------------------------


def test_every_field_of_a_verdict_comes_back(tmp_path):
    given = [
        verdict(0, reviewer="Ada \u202e 😀"),
        verdict(1, "rejected", reason='two of "them"\nand a line'),
        verdict(2, "fixed", box_before=None),
    ]
    found = verdicts.read(written(tmp_path / "v", *given))
    assert dict(found.schema) == verdicts.SCHEMA
    for row, one in zip(found.iter_rows(named=True), given, strict=True):
        expected = dataclasses.asdict(one)
        assert row["time"].isoformat(timespec="milliseconds") == expected.pop("time")
        for name, value in expected.items():
            assert row[name] == (list(value) if isinstance(value, tuple) else value)
    assert len((tmp_path / "v").read_bytes().splitlines()) == 3


def test_the_last_verdict_of_a_sample_counts_and_one_taken_back_does_not(tmp_path):
    told = [verdict(0), verdict(1), verdict(0, "rejected"), verdict(2), verdict(1, "withdrawn"), verdict(2, "fixed")]
    path = written(tmp_path / "v", *told)
    assert verdicts.read(path)[["sample_id", "verdict"]].rows() == [("id0", "rejected"), ("id2", "fixed")]
    assert verdicts.boxes_by_id(path) == {"id0": None, "id2": (1, 2, 30, 40)}


def test_a_file_without_verdicts_reads_as_an_empty_table(tmp_path):
    assert dict(verdicts.read(written(tmp_path / "v")).schema) == verdicts.SCHEMA
    assert verdicts.boxes_by_id(tmp_path / "v") == {}


def test_a_line_torn_anywhere_does_not_count_and_is_cut_off_by_the_next_review(tmp_path):
    whole = written(tmp_path / "whole", verdict(0), verdict(1)).read_bytes()
    first = whole.index(b"\n") + 1
    for end in sorted({*range(first, len(whole), 9), len(whole) - 1}):
        path = tmp_path / "v"
        path.write_bytes(whole[:end])
        assert list(verdicts.boxes_by_id(path)) == ["id0"]
        log = VerdictLog(path, "hash")
        assert (list(log.last), log.cut, path.read_bytes()) == (["id0"], end - first, whole[:first])
        log.append(verdict(2))
        log.close()
        assert list(verdicts.boxes_by_id(path)) == ["id0", "id2"]


@pytest.mark.parametrize(
    "line",
    [
        b"\x00\x00\x00",
        b"{}",
        b"[]",
        b'"accepted"',
        b"\xff\xfe",
        json.dumps(dataclasses.asdict(verdict(0)) | {"box": [3, 3, 1, 1]}).encode(),
        json.dumps(dataclasses.asdict(verdict(0)) | {"box": None}).encode(),
        json.dumps(dataclasses.asdict(verdict(0)) | {"verdict": "perhaps"}).encode(),
        json.dumps(dataclasses.asdict(verdict(0)) | {"more": 1}).encode(),
    ],
)
def test_a_damaged_line_is_refused_by_its_number_and_the_file_is_left_alone(tmp_path, line):
    path = written(tmp_path / "v", verdict(0))
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    before = path.read_bytes()
    for use in (verdicts.read, verdicts.boxes_by_id, lambda p: VerdictLog(p, "hash")):
        with pytest.raises(Refusal, match="line 2"):
            use(path)
    assert path.read_bytes() == before


def test_verdicts_of_another_store_are_not_mixed_with_these(tmp_path):
    path = written(tmp_path / "v", verdict(0))
    with pytest.raises(Refusal, match=r"another store \(identity hash, this one is other\)"):
        VerdictLog(path, "other")


@pytest.mark.parametrize("out", ["folder", "missing/v.jsonl", "file/v.jsonl"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match=f"{out} cannot be written"):
        VerdictLog(tmp_path / out, "hash")
    with pytest.raises(Refusal, match="is no file of verdicts"):
        verdicts.read(tmp_path / out)


def test_only_one_review_has_a_file_at_a_time(tmp_path):
    log = VerdictLog(tmp_path / "v", "hash")
    with pytest.raises(Refusal, match="in use by another review"):
        VerdictLog(tmp_path / "v", "hash")
    log.close()
    VerdictLog(tmp_path / "v", "hash").close()


def test_a_verdict_that_the_disk_cannot_take_leaves_no_trace(tmp_path):
    path = written(tmp_path / "v", verdict(0))
    size = path.stat().st_size
    log = VerdictLog(path, "hash")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            log.append(verdict(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(log.last) == ["id0"] and path.stat().st_size == size
    log.append(verdict(2))
    log.close()
    assert list(verdicts.boxes_by_id(path)) == ["id0", "id2"]


def test_verdicts_of_many_threads_are_all_kept_whole(tmp_path):
    log = VerdictLog(tmp_path / "v", "hash")
    threads = [
        threading.Thread(target=lambda t=t: [log.append(verdict(f"{t}-{n}")) for n in range(20)]) for t in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(verdicts.boxes_by_id(tmp_path / "v")) == 160


# ---- putting verdicts to use -------------------------------------------------------------------------------------

coordinates = st.tuples(*[st.floats(0, 100, width=32)] * 4).map(lambda c: (min(c[0], c[2]), min(c[1], c[3]), 200, 200))
one_told = st.tuples(st.integers(0, 11), st.sampled_from(["accepted", "fixed", "rejected", "withdrawn"]), coordinates)


@settings(deadline=None)
@given(st.lists(one_told, max_size=30))
def test_apply_changes_what_was_told_and_nothing_else(tmp_path_factory, told):
    samples = pl.DataFrame(
        {
            "sample_id": [f"id{n}" for n in range(8)],
            "split": ["train", "test"] * 4,
            "valid": [n != 3 for n in range(8)],
            **{name: [float(n) if n % 2 else None for n in range(8)] for name in BOX},
            "note": list("abcdefgh"),
        },
        schema_overrides=dict.fromkeys(BOX, pl.Float32),
    )
    path = written(tmp_path_factory.mktemp("v") / "v", *(verdict(n, kind, box) for n, kind, box in told))
    found = verdicts.read(path)
    after = verdicts.apply(samples, found)
    assert after.drop("verified").schema == samples.schema
    expected = {f"id{n}": (kind, box) for n, kind, box in told}
    for was, row in zip(samples.iter_rows(named=True), after.iter_rows(named=True), strict=True):
        kind, box = expected.get(was["sample_id"], ("withdrawn", None))
        kind = None if kind == "withdrawn" else kind
        assert row.pop("verified") == kind
        new = dict(zip(BOX, box, strict=True)) if kind in ("accepted", "fixed") else {}
        assert row == was | new | {"valid": was["valid"] and kind != "rejected"}
    assert verdicts.apply(after, found).equals(after)


# ---- boxes and agreement -----------------------------------------------------------------------------------------


def test_iou_is_torchvisions():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 9, (2, 500, 2, 2)), axis=2).reshape(2, 500, 4)
    reference = box_iou(*map(torch.as_tensor, corners)).diagonal().numpy()
    assert (reference > 0).sum() > 100
    np.testing.assert_allclose(iou(*corners), reference, atol=1e-12)
    assert iou(np.array([[1.0, 1, 1, 5]]), np.array([[1.0, 1, 1, 5]])) == 0


def test_the_interval_of_the_agreement_covers_the_mean_of_all_images():
    rng = np.random.default_rng(1)
    wide = rng.uniform(1, 3, (300, 40))
    true = 1 / wide  # IoU of a unit square with one that is so many times as wide
    hits = 0
    for row in wide:
        mean, low, high = mean_iou([((0, 0, 1, 1), (0, 0, w, 1)) for w in row])
        assert low < mean < high
        hits += low <= true.mean() <= high
    assert 0.89 <= hits / 300 <= 0.98


# ---- pictures ----------------------------------------------------------------------------------------------------


def encoded(picture, kind="PNG", **settings):
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()


def noise(seed, size=(40, 30)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def row_of(name, file, row, data):
    """What a samples table says of a sample."""
    return {"sample_id": name, "file": file, "row": row, "image_crc32c": google_crc32c.value(data or b"")}


def test_every_picture_is_found_in_whatever_shard_and_row_group_it_lies(tmp_path):
    rows = []
    for shard in range(3):
        cells = [encoded(noise(99 * shard + n)) for n in range(99)]
        table = [{"omni_edit_id": f"{shard}-{n}", "src_img": {"bytes": data}} for n, data in enumerate(cells)]
        pq.write_table(pa.Table.from_pylist(table), tmp_path / f"train-{shard}.parquet", row_group_size=70)
        rows += [row_of(f"{shard}-{n}", f"train-{shard}.parquet", n, data) for n, data in enumerate(cells)]
    pictures = Pictures(str(tmp_path))
    for at in np.random.default_rng(0).permutation(len(rows))[:60]:
        assert (pixels(pictures.png(rows[at])) == np.asarray(noise(at))).all()


def test_a_picture_is_shown_upright_as_the_model_saw_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(0), exif=exif)
    pq.write_table(pa.Table.from_pylist([{"omni_edit_id": 7, "src_img": {"bytes": data}}]), tmp_path / "a.parquet")
    shown = Pictures(str(tmp_path / "a.parquet")).png(row_of("7", "a.parquet", 0, data))
    assert (pixels(shown) == np.rot90(np.asarray(noise(0)), -1)).all()


def test_another_picture_than_the_stores_is_not_shown(tmp_path):
    one, other = encoded(noise(1)), encoded(noise(2))
    cells = {"a": one, "b": b"not a picture", "c": other, "d": None}
    rows = [{"omni_edit_id": name, "src_img": {"bytes": data}} for name, data in cells.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    pictures = Pictures(str(tmp_path))
    assert (pixels(pictures.png(row_of("a", "a.parquet", 0, one))) == np.asarray(noise(1))).all()
    for row, why in (
        (row_of("c", "a.parquet", 2, one), "another picture"),
        (row_of("b", "a.parquet", 1, b"not a picture"), "cannot be read"),
        (row_of("d", "a.parquet", 3, None), "cannot be read"),
        (row_of("z", "a.parquet", 0, one), "no sample z"),
        (row_of("a", "a.parquet", 9, one), "cannot be read"),
        (row_of("a", "b.parquet", 0, one), "cannot be read"),
        (row_of("a", "gone.parquet", 0, one), "cannot be read"),
    ):
        with pytest.raises(Missing, match=why):
            pictures.png(row)


def test_a_shard_that_changed_or_went_during_the_review_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    cells = [encoded(noise(n)) for n in range(40)]
    rows = [{"omni_edit_id": str(n), "src_img": {"bytes": data}} for n, data in enumerate(cells)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    changed, gone = Pictures(str(tmp_path)), Pictures(str(tmp_path))
    pq.write_table(pa.Table.from_pylist(rows[:5]), path)
    with pytest.raises(Missing, match="cannot be read"):
        changed.png(row_of("39", "a.parquet", 39, cells[39]))
    path.unlink()
    with pytest.raises(Missing, match="cannot be read"):
        gone.png(row_of("39", "a.parquet", 39, cells[39]))


# ---- what makes a verdict ----------------------------------------------------------------------------------------


def told(desk, place, kind="accepted", **changes):
    shown = desk.sample(place)
    box = shown["box"] if kind in ("accepted", "fixed") else None
    return {"sample_id": shown["sample_id"], "verdict": kind, "box": box, "reason": None} | changes


def test_the_first_box_is_the_true_one_else_the_models_else_none(reviewed, scenes, desk):
    row = desk.row(0)
    assert desk.sample(0)["box"] == tuple(row[name] for name in BOX)
    assert desk.sample(1)["box"] is None
    changed = desk.samples.with_columns(vlm_x1=pl.lit(1.5), vlm_y1=pl.lit(2.0), vlm_x2=pl.lit(9.0), vlm_y2=pl.lit(8.0))
    assert Desk(changed, desk.pictures, desk.log, None).sample(1)["box"] == (1.5, 2, 9, 8)
    flat = changed.with_columns(vlm_x2=pl.lit(1.5))  # the model answered with a box without area
    assert Desk(flat, desk.pictures, desk.log, None).sample(1)["box"] is None


def test_a_verdict_is_kept_with_all_that_explains_it(desk):
    desk.judge(told(desk, 2, "fixed", box=[1, 2.25, 30, 40]))
    desk.judge(told(desk, 1, "rejected", reason="the whole picture"))
    fixed, rejected = lines(desk.log.path)
    assert (fixed["verdict"], fixed["box"], fixed["reviewer"]) == ("fixed", [1, 2.25, 30, 40], "Ada")
    assert fixed["box_before"] == list(desk.sample(2)["box"])
    assert fixed["identity_hash"] == desk.log.identity_hash
    assert fixed["time"].endswith("+00:00")
    assert (rejected["box"], rejected["box_before"], rejected["reason"]) == (None, None, "the whole picture")


@pytest.mark.parametrize(
    ("place", "kind", "changes", "status", "why"),
    [
        (0, "accepted", {"sample_id": "nobody"}, 404, "no sample 'nobody'"),
        (0, "accepted", {"sample_id": ["x"]}, 404, "no sample"),
        (0, "perhaps", {}, 422, "'perhaps' is not one of"),
        (0, ["accepted"], {}, 422, "is not one of"),
        (0, "accepted", {"more": 1}, 400, "fields sample_id, verdict, box, reason"),
        (0, "accepted", {"box": [0, 0, 5, 5]}, 422, "accepted is the box that was shown first"),
        (0, "fixed", {}, 422, "fixed is another one"),
        (0, "accepted", {"box": None}, 422, "needs a box"),
        (1, "accepted", {}, 422, "needs a box"),
        (0, "fixed", {"box": [5, 5, 5, 9]}, 422, "x1 < x2"),
        (0, "fixed", {"box": [5, 9, 9, 5]}, 422, "y1 < y2"),
        (0, "fixed", {"box": [0, 0, 5]}, 422, "four numbers"),
        (0, "fixed", {"box": [0, 0, 5, "9"]}, 422, "four numbers"),
        (0, "fixed", {"box": [0, 0, 5, True]}, 422, "four numbers"),
        (0, "fixed", {"box": [0, 0, 5, float("nan")]}, 422, "four numbers"),
        (0, "fixed", {"box": [0, 0, 5, 10**400]}, 422, "four numbers"),
        (0, "fixed", {"box": {"x1": 0}}, 422, "four numbers"),
        (0, "fixed", {"box": [-0.5, 0, 5, 5]}, 422, "leaves the picture of 320×480"),
        (0, "fixed", {"box": [0, 0, 320.5, 5]}, 422, "leaves the picture"),
        (0, "rejected", {"box": [0, 0, 5, 5]}, 422, "rejected has no box"),
        (0, "rejected", {"reason": 5}, 422, "a reason"),
        (0, "rejected", {"reason": "x" * 2001}, 422, "at most 2000"),
        (0, "rejected", {"reason": "\ud800"}, 422, "a reason"),
        (0, "accepted", {"reason": "fine"}, 422, "belongs to a rejection"),
        (0, "withdrawn", {}, 409, "no verdict to take back"),
    ],
)
def test_what_is_no_verdict_is_refused_and_not_kept(desk, place, kind, changes, status, why):
    with pytest.raises(Unfit, match=why) as refused:
        desk.judge(told(desk, place, kind, **changes))
    assert refused.value.status == status
    assert desk.log.path.read_bytes() == b""


def test_the_review_goes_on_at_the_next_sample_without_a_verdict_then_at_those_that_were_skipped(desk):
    for place in (0, 2, 5, 6, 7, 8, 9, 3):
        answer = desk.judge(told(desk, place, "rejected"))
    assert answer["progress"] == {"total": SAMPLES, "accepted": 0, "fixed": 0, "rejected": 8, "left": 2}
    assert [desk.next_left(place) for place in (0, 3, 4, 9)] == [1, 4, 1, 1]
    desk.judge(told(desk, 4, "rejected"))
    assert desk.judge(told(desk, 1, "rejected"))["next_left"] is None
    assert desk.judge(told(desk, 5, "withdrawn"))["next_left"] == 5


def test_the_summary_says_how_well_the_models_box_agrees_with_the_final_one(desk):
    desk.judge(told(desk, 0))  # 81 wide, the model says 91
    desk.judge(told(desk, 2))  # the model is right
    desk.judge(told(desk, 3))  # the model said nothing
    desk.judge(told(desk, 5, "rejected"))
    assert desk.summary() == (
        "3 accepted, 0 fixed, 1 rejected, 6 left, of 10 samples\n"
        f"agreement: mean IoU of the model's box with the final one {(1 + 81 / 91) / 2:.3f} "
        f"[{81 / 91:.3f}, 1.000], n = 2; the model gave no box for 1 more"
    )


# ---- the command and its server ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(reviewed, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "v.jsonl"
    with Review("--store", reviewed, "--data", scenes, "--out", out, "--reviewer", "Ada") as running:
        yield running


def test_the_page_its_samples_and_its_pictures_are_served_with_strict_headers(served, scenes):
    for path, word in (
        ("", b"<!doctype html>"),
        ("page.css", b"#overlay"),
        ("page.js", b"use strict"),
        ("local.js", b"use strict"),
    ):
        status, data = served.ask(path)
        assert status == 200 and word in data
        assert "default-src 'none'" in served.headers["Content-Security-Policy"]
        assert "unsafe" not in served.headers["Content-Security-Policy"]
        assert served.headers["X-Content-Type-Options"] == "nosniff"
        assert served.headers["Cache-Control"] == "no-store"
        assert served.headers["Access-Control-Allow-Origin"] is None
        assert b"http://" not in data.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in data
    status, sample = served.ask("samples/0")
    assert status == 200 and sample["width"], sample["height"] == (320, 480)
    status, png = served.ask("pictures/0")
    assert status == 200 and pixels(png).shape == (480, 320, 3)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "127.0.0.2", "localhost.", "", "[::1]:80", "["]
)
def test_a_name_that_is_not_this_machines_is_refused(served, host):
    for path, body in (("", None), ("samples/0", None), ("verdicts", {})):
        status, answer = served.ask(path, body, headers={"Host": host})
        assert status == 421 and "Host" in answer["error"]


def test_the_page_may_be_seen_through_a_forwarded_port(served):
    assert served.ask("samples/0", headers={"Host": "localhost:9"})[0] == 200


@pytest.mark.parametrize("token", ["", "wrong", "%C3%A9", "../x"])
def test_without_the_token_nothing_is_shown_or_kept(served, token):
    for path, body in (("", None), ("page.js", None), ("samples/0", None), ("pictures/0", None), ("verdicts", {})):
        status, answer = served.ask(path, body, token=token)
        assert status == 404 and "address that the command printed" in answer["error"]


@pytest.mark.parametrize(
    ("path", "sent", "status", "why"),
    [
        ("verdicts", {"body": {}, "headers": {"Origin": "http://evil.example"}}, 403, "another page"),
        ("verdicts", {"body": {}, "headers": {"Origin": "null"}}, 403, "another page"),
        ("verdicts", {"body": {}, "headers": {"Content-Type": "text/plain"}}, 415, "application/json"),
        ("verdicts", {"body": b"{"}, 400, "no JSON"),
        ("verdicts", {"body": b"[" * 30000}, 400, "no JSON"),
        ("verdicts", {"body": b"\xff"}, 400, "no JSON"),
        ("verdicts", {"body": []}, 400, "fields sample_id"),
        ("verdicts", {"body": b" " * 70000}, 413, "at most"),
        ("verdicts", {"method": "POST", "headers": {"Content-Length": "-1"}}, 411, "Content-Length"),
        ("verdicts", {"method": "GET"}, 404, "no 'verdicts' here"),
        ("verdicts", {"method": "PUT"}, 405, "PUT"),
        ("verdicts", {"method": "OPTIONS"}, 405, "OPTIONS"),
        ("samples/0", {"body": {}}, 404, "nothing can be sent"),
        ("samples/10", {}, 404, "there are 10"),
        ("samples/-1", {}, 404, "here"),
        ("samples/99999999999999999999", {}, 404, "here"),
        ("pictures/10", {}, 404, "there are 10"),
        ("../server.py", {}, 404, "here"),
        ("page/../config.py", {}, 404, "here"),
    ],
)
def test_a_senseless_request_is_answered_with_what_is_wrong(served, path, sent, status, why):
    found, answer = served.ask(path, **sent)
    assert found == status, answer
    assert why in answer["error"]


def test_the_server_listens_on_this_machine_alone(served):
    listening = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"}
    assert f"0100007F:{served.port:04X}" in listening
    assert f"00000000:{served.port:04X}" not in listening


def test_what_was_confirmed_survives_a_kill_and_the_same_command_goes_on(served):
    served.withdraw_all()
    _, shown = served.ask("samples/0")
    told = {"sample_id": shown["sample_id"], "verdict": "accepted", "box": shown["box"], "reason": None}
    status, answer = served.ask("verdicts", told)
    assert (status, answer["next_left"]) == (200, 1)
    served.kill()
    with served.out.open("ab") as file:
        file.write(b'{"sample_id": "torn')
    served.start()
    assert "19 bytes of a line that was never confirmed are cut off" in served.said
    assert "9 of 10 samples left" in served.said
    assert served.ask("progress")[1]["next_left"] == 1
    assert served.ask("samples/0")[1]["verdict"]["verdict"] == "accepted"
    assert [line["reviewer"] for line in lines(served.out)] == ["Ada"]


def test_ctrl_c_ends_a_review_with_a_summary_of_its_split_and_verdicts_lie_beside_the_store(reviewed, scenes, tmp_path):
    path = shutil.copytree(reviewed, tmp_path / "s.zarr")
    with Review("--store", f"{path}/", "--data", scenes, "--split", "train") as running:
        assert "4 of 4 samples left" in running.said
        shown = [running.ask(f"samples/{place}")[1] for place in range(4)]
        train = store.open(path).samples.filter(split="train")["sample_id"]
        assert [one["sample_id"] for one in shown] == train.to_list()
        told = {"sample_id": train[0], "verdict": "accepted", "box": shown[0]["box"], "reason": None}
        assert running.ask("verdicts", told)[0] == 200
        with pytest.raises(Refusal, match="in use by another review"):
            review(ReviewConfig(store=str(path), data=str(scenes)))
        said = running.stop()
    assert "1 accepted, 0 fixed, 0 rejected, 3 left, of 4 samples" in said
    assert "agreement: mean IoU of the model's box with the final one 0.890 [0.890, 0.890], n = 1" in said
    assert len(lines(tmp_path / "s.zarr.verdicts.jsonl")) == 1


def test_what_cannot_be_reviewed_is_refused(reviewed, scenes, served, tmp_path):
    write_scenes(ScenesConfig(tmp_path / "other", samples=2, seed=9))
    (tmp_path / "empty").mkdir()
    for options, why in (
        ({"data": "TIGER-Lab/OmniEdit-Filtered-1.2M"}, "neither a folder here nor a data set that the hub gives"),
        ({"data": str(tmp_path / "missing")}, "there are no data at .*missing"),
        ({"data": str(tmp_path / "empty")}, "no parquet shard"),
        ({"data": str(tmp_path / "other")}, "holds none of the store's samples"),
        ({"split": "dev"}, "'dev' has no sample; the store has test, train"),
        ({"out": Path("s3://bucket/v.jsonl")}, "is a URL"),
        ({"out": tmp_path / "v", "port": served.port}, "cannot be had"),
        ({"port": 70000}, "--port 70000"),
        ({"reviewer": "\udcff"}, "printable"),
        ({"store": str(tmp_path)}, "is not a store"),
    ):
        with pytest.raises(Refusal, match=why):
            review(ReviewConfig(**{"store": str(reviewed), "data": str(scenes)} | options))
    assert not (tmp_path / "v").exists()


def test_samples_that_are_not_extracted_yet_are_left_out(scenes, tmp_path, capsys):
    half = store.open(make_store(tmp_path / "half", scenes, blocks=[0])).samples
    assert chosen_samples(half, None)["sample_id"].to_list() == half["sample_id"][:8].to_list()
    assert "2 samples are not extracted yet" in capsys.readouterr().out
    with pytest.raises(Refusal, match="no sample of the store is extracted yet"):
        chosen_samples(store.open(make_store(tmp_path / "none", scenes, blocks=[])).samples, "train")


def test_a_store_without_sizes_is_refused(tmp_path, scenes):
    with pytest.raises(Refusal, match="no column width, height"):
        Desk(pl.DataFrame({"sample_id": ["a"], "instruction": ["x"]}), None, None, None)


def test_verdicts_on_a_store_in_an_object_store_need_a_file_of_their_own(s3, scenes):
    make_store(s3, scenes)
    with pytest.raises(Refusal, match="give --out"):
        review(ReviewConfig(store=s3, data=str(scenes)))
