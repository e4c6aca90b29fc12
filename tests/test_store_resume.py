"""Kills, second writers, full disks and damage: a store is whole, or says what is not, or goes on to be whole."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import store
from store.__main__ import COMMANDS
from store.commandline import route
from store.synthetic import fill_block, synthetic_plan, synthetic_sample, synthetic_store

ROOT = Path(__file__).parents[1]

WRITER = """
import resource, sys, time
import store
from store.synthetic import synthetic_sample
path, worker, blocks, pause, limit = sys.argv[1], sys.argv[2], eval(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with store.Writer(path, worker) as writer:
        for b in blocks:
            if b not in store.pending(path):
                continue
            with writer.block(b) as block:
                for sample in block.samples:
                    block.add(sample, **synthetic_sample(writer.plan, sample))
                    time.sleep(pause)
            print("committed", b, flush=True)
except store.Refusal as refusal:
    sys.exit(f"error: {refusal}")
"""


def start_writer(path, worker="0", blocks="range(3)", pause=0.0, limit=0):
    """A real writer process."""
    arguments = [sys.executable, "-c", WRITER, str(path), worker, blocks, str(pause), str(limit)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def plan():
    attention = {"attention": ("text_to_image",), "attention_layers": ("0",)}
    return synthetic_plan(20, seed=4, **attention)


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """A store written in one go."""
    return synthetic_store(tmp_path_factory.mktemp("whole") / "store", plan)


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "store"))


@pytest.fixture(scope="module")
def content_hash(whole):
    report = store.verify(whole)
    assert report.ok and not report.problems
    return report.content_hash


def test_killed_in_mid_block_a_store_resumes_to_the_same_content(plan, content_hash, tmp_path):
    path = store.create(tmp_path / "store", plan)
    writer = start_writer(path, pause=0.15)
    assert writer.stdout.readline() == "committed 0\n"
    time.sleep(0.5)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert store.pending(path) == [1, 2]
    report = store.verify(path)
    assert not report.ok and report.samples == 8 and "1, 2" in report.problems[0]
    store.create(path, plan)
    synthetic_store(path, plan, store.pending(path))
    assert store.verify(path).ok
    assert store.verify(path).content_hash == content_hash
    assert not list(path.glob("record/partial/files/*/*"))


def test_two_writers_at_once_on_disjoint_blocks_give_the_same_content(plan, content_hash, tmp_path):
    path = store.create(tmp_path / "store", plan)
    writers = [start_writer(path, "a", "[2, 0]"), start_writer(path, "b", "[1]")]
    assert [writer.wait(60) for writer in writers] == [0, 0], [writer.stderr.read() for writer in writers]
    [writer.communicate() for writer in writers]
    assert store.verify(path).ok and store.verify(path).content_hash == content_hash


def test_the_content_hash_does_not_depend_on_codec_or_block_size(content_hash, tmp_path):
    other = synthetic_plan(
        20, seed=4, attention=("text_to_image",), attention_layers=("0",), codec="none", samples_per_block=5
    )
    assert store.verify(synthetic_store(tmp_path / "store", other)).content_hash == content_hash


def test_the_content_hash_depends_on_the_values(content_hash, tmp_path):
    other = synthetic_plan(20, seed=5, attention=("text_to_image",), attention_layers=("0",))
    assert store.verify(synthetic_store(tmp_path / "store", other)).content_hash != content_hash


def test_a_full_disk_stops_with_one_line_leaves_no_pieces_and_resumes(plan, content_hash, tmp_path):
    path = store.create(tmp_path / "store", plan)
    writer = start_writer(path, limit=3000)
    _, error = writer.communicate(timeout=60)
    assert writer.returncode == 1 and "no space left" in error and "goes on from there" in error, error
    assert store.pending(path) == [0, 1, 2] and not [p for p in path.rglob("record/partial/files/*/*")]
    synthetic_store(path, plan, store.pending(path))
    assert store.verify(path).content_hash == content_hash


def test_a_torn_commit_line_does_not_count_and_the_next_writer_goes_on(plan, content_hash, copied):
    log = copied / "record/commits/0.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    assert store.pending(copied) == [2]
    assert not store.open(copied).valid[16:].any()
    synthetic_store(copied, plan, [2])
    assert len(log.read_bytes().splitlines()) == 3
    assert store.verify(copied).content_hash == content_hash


def test_a_damaged_commit_line_is_a_problem(copied):
    log = copied / "record/commits/0.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"block":1', b'"block":2', 1))
    report = store.verify(copied)
    assert not report.ok and "line 2" in report.problems[0] and store.pending(copied) == [1]


@pytest.mark.parametrize("place", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize(
    "name",
    [
        "hidden/image/c/1/0/0/0",
        "hidden/text/c/0/0/0/0",
        "attention/text_to_image/c/2/0/0/0",
        "record/tokens/00001.parquet",
    ],
)
def test_a_flipped_byte_is_found_and_named(copied, name, place):
    damaged = bytearray((copied / name).read_bytes())
    damaged[int(place * (len(damaged) - 1))] ^= 4
    (copied / name).write_bytes(damaged)
    report = store.verify(copied)
    assert not report.ok and any(name in problem for problem in report.problems)
    assert len(report.damaged_blocks) == 1


@pytest.mark.parametrize("name", ["zarr.json", "hidden/text/zarr.json", "record/samples-*.parquet", "record/plan.json"])
def test_damaged_metadata_is_a_problem(copied, name):
    (path,) = copied.glob(name)
    damaged = path.read_bytes()
    path.write_bytes(damaged[: len(damaged) // 2])
    assert not store.verify(copied).ok


def test_a_lost_or_shortened_file_is_found(copied):
    (copied / "hidden/text/c/0/0/0/0").unlink()
    shard = copied / "hidden/image/c/2/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    report = store.verify(copied)
    assert report.damaged_blocks == [(0, 0), (0, 2)]
    assert "is not there" in report.problems[0]


def test_a_lost_shard_never_reads_as_zeros(copied):
    (copied / "hidden/text/c/0/0/0/0").unlink()
    with pytest.raises(ValueError, match=r"hidden/text/c/0/0/0/0 is not there"):
        store.open(copied).hidden.text.isel(sample=0).compute()


def test_a_block_that_is_not_there_reads_as_nan_and_null_and_is_left_out_of_batches(plan, tmp_path):
    path = synthetic_store(tmp_path / "store", plan, [0, 2])
    opened = store.open(path)
    assert opened.samples["valid"].to_list() == [True] * 8 + [False] * 8 + [True] * 4
    assert opened.samples["vlm_x1"].is_null().to_list() == [False] * 8 + [True] * 8 + [False] * 4
    for lazy in (opened.hidden.image, opened.hidden.text, opened.attention.text_to_image):
        assert np.isnan(lazy[8:16].values).all()
        assert not np.isnan(lazy[7].values[..., 0]).all()
    assert sorted(s for b in opened.batches("0", "text") for s in b.sample.tolist()) == [*range(8), *range(16, 20)]
    with pytest.raises(store.Refusal, match="not committed"):
        opened.read([8], "0")


def test_a_sample_set_aside_is_not_valid_reads_as_nan_and_the_store_is_whole(plan, tmp_path):
    path = store.create(tmp_path / "store", plan)
    with store.Writer(path) as writer:
        for b in range(3):
            with writer.block(b) as block:
                for sample in block.samples:
                    if sample in (3, *range(16, 20)):
                        block.set_aside(sample, "its picture does not decode")
                    else:
                        block.add(sample, **synthetic_sample(plan, sample))
    report = store.verify(path)
    assert report.ok and report.samples == 15 and report.set_aside == 5, report
    opened = store.open(path)
    assert not opened.samples["valid"][3] and opened.samples["set_aside"][3] == "its picture does not decode"
    assert np.isnan(opened.hidden.image[3].values).all() and np.isnan(opened.hidden.text[16:].values).all()
    assert 3 not in torch_samples(opened)
    with pytest.raises(store.Refusal, match="does not decode"):
        opened.read([3], "0")


def torch_samples(opened):
    return [s for b in opened.batches("0", "all") for s in b.sample.tolist()]


def test_another_identity_is_refused_with_the_key_and_both_values(plan, copied):
    before = sorted((p, p.stat().st_mtime_ns) for p in copied.rglob("*"))
    other = synthetic_plan(
        20,
        seed=4,
        identity={"weights": {"sha256": "other"}, "seed": 4, "kernel": "sdpa"},
        attention=("text_to_image",),
        attention_layers=("0",),
    )
    with pytest.raises(
        store.Refusal,
        match=r"identity.kernel is None there and 'sdpa' here.*identity.weights.sha256 is 'made up' there and 'other'",
    ) as refused:
        store.create(copied, other)
    assert "--store" in str(refused.value) and "seed" not in str(refused.value)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in copied.rglob("*"))


def test_another_plan_is_refused_with_the_key(copied):
    with pytest.raises(store.Refusal, match=r"plan.n_samples is 20 there and 21 here"):
        store.create(copied, synthetic_plan(21, seed=4, attention=("text_to_image",), attention_layers=("0",)))


def test_the_same_plan_is_found_again_and_a_strange_folder_refused(plan, copied, tmp_path):
    assert store.create(copied, plan) == copied
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(store.Refusal, match="not a store"):
        store.create(tmp_path / "mine", plan)


def test_too_small_a_disk_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(store.Refusal, match=r"needs an estimated 1000\.\d* TB|needs an estimated 1000000"):
        store.check_space(tmp_path / "new/store", 10**18)
    assert not (tmp_path / "new").exists()
    store.check_space(tmp_path / "new/store", 1000)


@pytest.mark.parametrize(("damage", "match"), [(0x7F80, "not finite"), (0, "zero throughout")])
def test_bad_states_are_named_by_sample_and_layer_and_nothing_is_committed(plan, tmp_path, damage, match):
    path = store.create(tmp_path / "store", plan)
    given = synthetic_sample(plan, 10)
    given["text"][1, 3] = damage
    with (
        pytest.raises(store.BadStates, match=f"made-4-00010' at layer '0' is {match}"),
        store.Writer(path) as writer,
    ):
        for b in writer.blocks():
            with writer.block(b) as block:
                for sample in block.samples:
                    block.add(sample, **(given if sample == 10 else synthetic_sample(plan, sample)))
    assert 1 in store.pending(path) and not list(path.glob("record/partial/files/*/*"))


def test_a_block_with_a_sample_forgotten_is_not_committed(plan, tmp_path):
    path = store.create(tmp_path / "store", plan)
    with store.Writer(path) as writer:
        with pytest.raises(ValueError, match=r"samples \[1, 2, 3, 4, 5, 6, 7\]"), writer.block(0) as block:
            block.add(0, **synthetic_sample(plan, 0))
        with pytest.raises(KeyboardInterrupt), writer.block(1) as block:
            fill_block(block, plan)
            raise KeyboardInterrupt
        with writer.block(2) as block:
            fill_block(block, plan)
        with pytest.raises(store.Refusal, match="committed"):
            writer.block(2)
    assert store.pending(path) == [0, 1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image": np.ones((3, 2, 16), np.uint16)}, r"planned \(layer, token, width\)"),
        ({"text": None}, "planned"),
        ({"text_to_text": np.ones((1, 2, 2))}, "not planned"),
        ({"tokens": pl.DataFrame({"position": [0], "kind": ["image"]})}, "1 image and 0 other tokens"),
        ({"tokens": pl.DataFrame({"position": [0]})}, "lacks the columns kind"),
    ],
)
def test_what_was_not_planned_is_refused_when_added(plan, tmp_path, change, match):
    path = store.create(tmp_path / "store", plan)
    with store.Writer(path) as writer, pytest.raises(ValueError, match=match), writer.block(0) as block:
        block.add(0, **synthetic_sample(plan, 0) | change)


def test_a_second_writer_of_the_same_name_is_refused(plan, tmp_path):
    path = store.create(tmp_path / "store", plan)
    with store.Writer(path, "a"), store.Writer(path, "b"), pytest.raises(store.Refusal, match="'a'"):
        store.Writer(path, "a")
    store.Writer(path, "a").close()


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"n_text": [4, 0]}, "n_text holds 0"),
        ({"sample_id": ["a", "a"]}, "'a' comes twice"),
        ({"split": None}, "lacks the columns split"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(columns, match):
    table = {"sample_id": ["a", "b"], "n_image": [3, 3], "n_text": [4, 4], "split": ["train", "train"]} | columns
    samples = pl.DataFrame({name: values for name, values in table.items() if values is not None})
    with pytest.raises(store.Refusal, match=match):
        store.Plan(layers=("0",), width=4, samples=samples, identity={})


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "store", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def routed(capsys, *arguments):
    """The command in this process: exit code, output, errors."""
    with pytest.raises(SystemExit) as ended:
        route("python -m store", "", COMMANDS, [str(argument) for argument in arguments])
    return ended.value.code, *capsys.readouterr()


def test_the_command_line_exits_0_only_for_a_whole_store(whole, plan, content_hash, tmp_path, capsys):
    done = command("verify", whole, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["ok"] and found["samples"] == 20 and found["problems"] == [] and found["content_hash"] == content_hash
    part = synthetic_store(tmp_path / "part", plan, [1])
    code, out, _ = routed(capsys, "verify", part)
    assert code == 1 and "NOT OK" in out
    code, _, err = routed(capsys, "verify", tmp_path / "absent")
    assert code == 2 and err.startswith("error: ") and "not a store" in err


def test_repair_gives_damaged_blocks_back_and_mends_metadata(plan, copied, content_hash, capsys):
    shard = copied / "hidden/text/c/1/0/0/0"
    shard.write_bytes(b"?" + shard.read_bytes()[1:])
    (copied / "hidden/image/zarr.json").write_text("{")
    code, out, _ = routed(capsys, "repair", copied)
    assert code == 1 and "2 of 3 blocks are whole" in out and store.pending(copied) == [1]
    synthetic_store(copied, plan, [1])
    assert store.verify(copied).ok and store.verify(copied).content_hash == content_hash
    assert routed(capsys, "repair", copied)[0] == 0


def test_inspect_and_du_show_what_is_there(whole, plan, capsys):
    code, out, _ = routed(capsys, "inspect", whole, "--sample", 5)
    assert code == 0 and "hidden/text" in out and "made-4-00005" in out
    found = json.loads(routed(capsys, "du", whole, "--json")[1])
    shards = [path for path in (whole / "hidden/text/c").rglob("0") if path.is_file()]
    assert found["hidden/image"]["raw"] == plan.bytes_raw()["hidden/image"]
    assert found["hidden/text"]["disk"] == sum(path.stat().st_size for path in shards)


def test_a_finished_store_needs_no_more_space(whole, plan):
    store.check_space(whole, sum(store.open(whole).place.sizes().values()))
