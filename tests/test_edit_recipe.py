"""The recipe end to end: what it makes, what an interruption, a changed setting, a bad sample and a person do to it."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from commands import run_here
from PIL import Image
from tiny_recipe import save_editor

import store
from edit.recipe.config import RecipeConfig
from edit.recipe.run import STAGES, Workshop, make, recipe, stages_of
from edit.recipe.scenes import odd_scene
from edit.recipe.stages import Made, Stage
from extract.config import POCKET
from extract.omniedit import BadSample, Sample, read
from extract.review.desk import Desk
from extract.review.pictures import Pictures
from extract.review.verdicts import VerdictLog
from extract.scenes.scene import paint
from store.errors import Busy, Refusal

N = 12
BOX, TRUE = ("x1", "y1", "x2", "y2"), ("true_x1", "true_y1", "true_x2", "true_y2")
EXACT = {"boxer": "scenes", "device": "cpu"}


def records(out, stage):
    """Inode and time of a stage's results: they change if one is written again."""
    # A folder that is still being written has another name.
    found = sorted((out / "stages" / stage).glob(f"{'[0-9]' * 6}/record.json"))
    return [(path.parent.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in found]


def products(out):
    """The bytes of all that a run leaves for others."""
    paths = [*sorted((out / "dataset").iterdir()), out / "manifest.parquet", out / "recipe.json"]
    return {path.name: path.read_bytes() for path in paths}


def manifest(out):
    return pl.read_parquet(out / "manifest.parquet")


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A run whose every stage is exact."""
    out = tmp_path_factory.mktemp("exact") / "run"
    assert recipe(RecipeConfig(out, samples=N, **EXACT)) == 0
    return out


@pytest.fixture
def copied(exact, tmp_path):
    """A run to be changed."""
    shutil.copytree(exact, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """The default run, of scenes boxed by the pocket model, and its summary."""
    out = tmp_path_factory.mktemp("pocket") / "run"
    done = run_here("edit.recipe", "--out", out, "--samples", N, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_readers_of_omniedit_find_every_sample_with_its_true_box(exact):
    samples = list(read(exact / "dataset", edited=True))
    assert len(samples) == N
    for number, sample in enumerate(samples):
        assert isinstance(sample, Sample)
        scene = odd_scene(0, number)
        uniform, owner = paint(scene, scene.things, scene.background)
        assert np.array_equal(np.asarray(sample.image), uniform)
        rows, columns = np.nonzero(owner == scene.wish.target)
        assert sample.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert sample.instruction == scene.instructions[0]
        assert scene.reference in sample.instruction.lower()


def test_the_target_is_the_picture_with_one_odd_object(exact):
    for number, sample in enumerate(read(exact / "dataset", edited=True)):
        things = odd_scene(0, number).things
        assert len({(thing.kind, thing.colour, thing.texture) for thing in things}) == 1
        changed = np.abs(np.asarray(sample.image, int) - np.asarray(sample.edited, int)).max(2) > 40
        x1, y1, x2, y2 = map(int, sample.box)
        assert changed.sum() > 20
        # What is put in another's place, and its shadow, may reach a little beyond it.
        margin = round(0.35 * max(x2 - x1, y2 - y1))
        changed[max(y1 - margin, 0) : y2 + margin, max(x1 - margin, 0) : x2 + margin] = False
        assert not changed.any()


def test_no_scene_asks_for_a_removal_of_which_no_odd_object_would_be_left():
    wishes = [odd_scene(3, number).wish for number in range(60)]
    assert {wish.task for wish in wishes} == {"swap", "attribute_modification"}


def test_the_shards_say_how_they_were_made_and_keep_the_prompts(exact):
    (shard,) = (exact / "dataset").iterdir()
    described = json.loads(pq.read_metadata(shard).metadata[b"analysis_by_proxy.recipe"])
    assert described == json.loads((exact / "recipe.json").read_text())
    assert list(described["stages"]) == sorted(STAGES)
    for number, row in enumerate(pq.read_table(shard).to_pylist()):
        scene = odd_scene(0, number)
        assert scene.reference in row["scene_prompt"]
        assert row["edit_prompt"].endswith("like the others.")
        assert len(row["objects"]) == len(scene.things)
        assert row["true_box"] in [one["box"] for one in row["objects"]]


def test_the_pocket_model_boxes_most_scenes_and_the_summary_says_how_well(pocket):
    out, summary = pocket
    found, rows = summary["boxes"], manifest(out)
    given, truth = rows.select(BOX).to_numpy(), rows.select(TRUE).to_numpy()
    given = np.nan_to_num(given)
    shared = (np.minimum(given[:, 2:], truth[:, 2:]) - np.maximum(given[:, :2], truth[:, :2])).clip(0).prod(1)
    areas = [(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (given, truth)]
    iou = shared / (areas[0] + areas[1] - shared)
    share, z = (iou >= 0.5).mean(), 1.96
    middle, half = share + z * z / (2 * N), z * np.sqrt(share * (1 - share) / N + z * z / (4 * N * N))
    assert found["n"] == N
    assert found["mean_iou"] == pytest.approx(iou.mean(), abs=1e-6)
    assert found["mean_iou_interval"][0] < iou.mean() < found["mean_iou_interval"][1]
    assert found["iou50"] == pytest.approx(share)
    ends = [(middle - half) / (1 + z * z / N), (middle + half) / (1 + z * z / N)]
    assert found["iou50_interval"] == pytest.approx(ends)
    assert share > 0.7
    assert [summary["stages"][stage]["samples"] for stage in STAGES][:5] == [N] * 5


def test_a_killed_run_goes_on_to_the_same_bytes_and_nobody_else_works_in_it_meanwhile(pocket, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "edit.recipe", "--out", str(out), "--samples", str(N), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(records(out, "box")) < 3:
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.002)
        with pytest.raises(Busy, match="at work in another process"):
            recipe(RecipeConfig(out, samples=N))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {stage: records(out, stage) for stage in STAGES}
    assert 3 <= len(before["box"]) < N
    assert not (out / "dataset").exists()
    assert recipe(RecipeConfig(out, samples=N, device="cpu")) == 0
    for stage in STAGES:
        assert set(before[stage]) <= set(records(out, stage)), f"{stage} was done again"
    assert products(out) == products(pocket[0])
    assert not [*out.rglob("*.partial"), *out.rglob("*.replaced")]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_samples(exact, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        recipe(RecipeConfig(tmp_path / name, samples=N, seed=seed, **EXACT))
    assert products(tmp_path / "same") == products(exact)
    there, here = (set(manifest(out)["sample_id"]) for out in (exact, tmp_path / "other"))
    assert not there & here


def test_a_run_that_is_done_does_nothing_again(copied, capsys):
    before = {stage: records(copied, stage) for stage in STAGES}
    capsys.readouterr()
    recipe(RecipeConfig(copied, samples=N, json=True, **EXACT))
    summary = json.loads(capsys.readouterr().out)
    assert [stage["new"] for stage in summary["stages"].values()] == [0] * len(STAGES)
    assert {stage: records(copied, stage) for stage in STAGES} == before


def test_a_changed_setting_redoes_its_stage_and_those_after_it(copied, tmp_path):
    config = RecipeConfig(copied, samples=N, harmonizer=save_editor(tmp_path / "editor"), **EXACT)
    kept = {stage: records(copied, stage) for stage in STAGES}
    for steps in (1, 2):
        recipe(dataclasses.replace(config, samples=3, harmonizer_steps=steps))
        for stage in ("write", "generate"):
            assert records(copied, stage) == kept[stage]
        for stage in ("harmonize", "reverse", "caption", "box"):
            now = records(copied, stage)
            assert not set(now[:3]) & set(kept[stage])
            assert now[3:] == kept[stage][3:]
            kept[stage] = now
    # Another boxer, and nothing before it is touched.
    recipe(dataclasses.replace(config, samples=3, harmonizer_steps=2, boxer=POCKET))
    for stage in STAGES:
        assert (records(copied, stage) == kept[stage]) == (stage != "box")


def test_more_samples_are_added_to_those_that_are_there(copied, exact):
    before = records(copied, "generate")
    recipe(RecipeConfig(copied, samples=N + 2, **EXACT))
    assert records(copied, "generate")[:N] == before
    assert manifest(copied)[:N].equals(manifest(exact))
    assert len(list(read(copied / "dataset"))) == N + 2


@pytest.mark.parametrize("damage", ["picture", "record", "half a folder"])
def test_a_damaged_result_is_made_again(copied, exact, damage):
    name = "stages/harmonize/000004"
    folder = copied / name
    if damage == "picture":
        path = folder / "harmonized.png"
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "record":
        (folder / "record.json").write_text('{"fingerprint": 3')
    else:
        folder.rename(folder.with_name("000004.partial"))
    recipe(RecipeConfig(copied, samples=N, **EXACT))
    assert products(copied) == products(exact)
    made = [{path.name: path.read_bytes() for path in (run / name).iterdir()} for run in (copied, exact)]
    assert made[0] == made[1]
    assert not list(copied.rglob("*.partial"))


class Picky:
    """A captioner that cannot do with some samples."""

    def __init__(self, good):
        self.good, self.seen = good, []

    def describe(self):
        return {"model": "picky"}

    def load(self):
        return self.caption

    def caption(self, given):
        self.seen.append(given.number)
        if given.number == 2:
            raise RuntimeError("out of words\nand more")
        if given.number == 5:
            raise BadSample("said nothing", "5")
        return self.good(given)


def test_a_sample_that_fails_is_set_aside_with_stage_and_reason_and_the_run_goes_on(copied, capsys):
    config = RecipeConfig(copied, samples=8, json=True, **EXACT)
    stages = {stage.name: stage for stage in stages_of(config)}
    picky = Picky(stages["caption"].model.load())
    mixed = [Stage("caption", picky) if name == "caption" else stage for name, stage in stages.items()]
    capsys.readouterr()
    assert make(config, mixed) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["dataset"]["samples"] == 6
    assert summary["set_aside"] == {"caption: RuntimeError": 1, "caption: said nothing": 1}
    assert summary["boxes"]["n"] == 6
    rows = manifest(copied)
    aside = rows.filter(pl.col("set_aside").is_not_null()).select("number", "stage", "set_aside", "detail", "sample_id")
    assert aside.rows() == [
        (2, "caption", "RuntimeError", "out of words", None),
        (5, "caption", "said nothing", "5", None),
    ]
    assert rows.filter(number=3)["stage"].to_list() == ["box"]
    assert picky.seen == list(range(8))
    # They stay there until they are asked for again, and only they are.
    make(config, mixed)
    assert picky.seen == list(range(8))
    make(dataclasses.replace(config, retry=True), mixed)
    assert picky.seen == [*range(8), 2, 5]


def test_a_sample_that_got_no_box_counts_as_a_miss_against_the_true_ones(copied, capsys):
    class Shy:
        def describe(self):
            return {"model": "shy"}

        def load(self):
            return self.box

        def box(self, given):
            if given.number in (1, 6):
                raise BadSample("no list of four numbers", "there")
            x1, y1, x2, y2 = given.told["true_box"]
            return Made({"box": [x1, y1, (x1 + x2) / 2, y2], "answer": "half of it"})

    config = RecipeConfig(copied, samples=8, json=True, **EXACT)
    capsys.readouterr()
    make(config, [Stage(one.name, Shy()) if one.name == "box" else one for one in stages_of(config)])
    summary = json.loads(capsys.readouterr().out)
    assert summary["dataset"]["samples"] == 6
    found = summary["boxes"]
    assert (found["n"], found["no_box"], found["iou50"]) == (8, 0.25, 0.75)
    assert found["mean_iou"] == pytest.approx(6 * 0.5 / 8)
    ends = found["mean_iou_interval"]
    assert 0 <= ends[0] < 0.375 < ends[1] <= 0.5


def test_a_harmonizer_that_changes_nothing_gives_no_pair(copied):
    class Idle:
        def describe(self):
            return {"model": "idle"}

        def load(self):
            return lambda given: Made(pictures={"harmonized": given.picture("drawn")})

    config = RecipeConfig(copied, samples=3, **EXACT)
    stages = [Stage(one.name, Idle()) if one.name == "harmonize" else one for one in stages_of(config)]
    with pytest.raises(Refusal, match=r"no sample came through.*3 × reverse: the harmonizer changed nothing"):
        make(config, stages)
    assert manifest(copied)["stage"].to_list() == ["reverse"] * 3


def judged(out, verdicts):
    """A person's verdicts by number, kept as the review keeps them."""
    (path,) = (out / "review").glob("*.zarr")
    opened = store.open(path)
    log = VerdictLog(path.with_name(f"{path.name}.verdicts.jsonl"), opened.plan.identity_hash)
    desk = Desk(opened.samples, Pictures(str(out / "dataset")), log, "me")
    for number, (verdict, box, reason) in verdicts.items():
        shown = desk.sample(number)
        assert Image.open(BytesIO(desk.picture(number))).size == (shown["width"], shown["height"])
        box = shown["box"] if verdict == "accepted" else box
        desk.judge({"sample_id": shown["sample_id"], "verdict": verdict, "box": box, "reason": reason})
    log.close()
    return log.path


def test_what_a_person_accepted_or_fixed_is_the_verified_set(copied, tmp_path, capsys):
    config = RecipeConfig(copied, samples=N, json=True, **EXACT)
    fixed = [1.5, 2.5, 60.0, 70.0]
    told = {0: ("accepted", None, None), 3: ("fixed", fixed, None), 4: ("rejected", None, "names a colour")}
    path = judged(copied, told)
    capsys.readouterr()
    recipe(config)
    summary = json.loads(capsys.readouterr().out)
    assert summary["verdicts"] == {"accepted": 1, "fixed": 1, "rejected": 1}
    boxes = [sample.box for sample in read(copied / "dataset")]
    across, down = (max(0, min(boxes[3][i + 2], fixed[i + 2]) - max(boxes[3][i], fixed[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (boxes[3], fixed))
    assert summary["boxes_of_person"]["n"] == 2
    assert summary["boxes_of_person"]["mean_iou"] == pytest.approx((1 + across * down / (areas - across * down)) / 2)
    assert [sample.box for sample in read(copied / "verified")] == [boxes[0], tuple(fixed)]
    rows = manifest(copied)
    assert rows["verdict"].to_list() == ["accepted", None, None, "fixed", "rejected"] + [None] * (N - 5)
    assert rows.filter(number=4).select("stage", "set_aside", "detail").rows() == [
        ("verify", "rejected", "names a colour")
    ]
    # A file can be given, and says nothing about samples that became others.
    kept = tmp_path / "kept.jsonl"
    path.rename(kept)
    recipe(config)
    assert not (copied / "verified").exists()
    recipe(dataclasses.replace(config, verdicts=kept))
    assert len(list(read(copied / "verified"))) == 2
    with pytest.raises(Refusal, match="says nothing about this run's samples"):
        recipe(dataclasses.replace(config, verdicts=kept, seed=5))
    with pytest.raises(Refusal, match="no file of verdicts"):
        recipe(dataclasses.replace(config, verdicts=tmp_path / "nowhere.jsonl"))


def test_verdicts_stay_with_their_samples_when_others_are_added(copied):
    judged(copied, {0: ("accepted", None, None), 1: ("rejected", None, None)})
    recipe(RecipeConfig(copied, samples=N + 1, **EXACT))
    assert manifest(copied)["verdict"].to_list() == ["accepted", "rejected"] + [None] * (N - 1)


def test_two_runs_in_one_folder_are_refused(copied):
    with Workshop(copied), pytest.raises(Busy, match="wait, or give another folder"):
        recipe(RecipeConfig(copied, samples=N, **EXACT))


def test_a_run_killed_while_it_made_its_folder_goes_on(tmp_path):
    (tmp_path / "recipe.json.partial").write_text("{")
    with Workshop(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Refusal, match="no recipe's"):
        recipe(RecipeConfig(tmp_path, **EXACT))
    with pytest.raises(Refusal, match="is a file"):
        recipe(RecipeConfig(tmp_path / "notes.txt", **EXACT))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**32)], "--seed"),
        (["--side", "100"], "--side 100"),
        (["--side", "0"], "--side 0"),
        (["--threads", "0"], "--threads 0"),
        (["--generator-steps", "0"], "--generator-steps 0"),
        (["--harmonizer-steps", "-3"], "--harmonizer-steps -3"),
        (["--preset", "large"], "large"),
        (["--writer", "/nowhere/model"], "--generator scenes draws no text of --writer"),
        (["--generator", "/nowhere/model"], "--harmonizer scenes knows nothing"),
        (["--captioner", "/nowhere/at/all"], "--captioner '/nowhere/at/all' is neither"),
        (["--boxer", ""], "--boxer ''"),
        (["--boxer", "../.."], "no config.json"),
        (["--harmonizer", "pocket/../.."], "--harmonizer"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line_before_any_work(tmp_path, options, named):
    done = run_here("edit.recipe", "--out", tmp_path / "run", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_help_names_the_papers_models():
    done = run_here("edit.recipe", "--help")
    text = " ".join(done.stdout.split())
    for word in (
        "Qwen/Qwen-Image-Edit",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "python -m extract.review",
        "by position alone",
    ):
        assert word in text


def test_the_papers_preset_names_its_models_and_any_of_them_can_be_another():
    config = RecipeConfig(preset="paper", boxer="pocket")
    assert (config.samples, config.generator, config.boxer) == (400, "Qwen/Qwen-Image", "pocket")
    assert config.conditioner == config.captioner == "Qwen/Qwen2.5-VL-7B-Instruct"
