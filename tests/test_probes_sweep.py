"""A sweep on small real stores: alone or together, stopped and resumed, what is planted and what is not."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from planted_store import LAYERS, PLANTED, QUICK, Planted, alone, quick, weights_of
from safetensors.torch import load_file

from probes import checkpoint, gathering, learn, provenance, shifts, wave
from probes.config import EvaluateConfig, SweepConfig, TrainConfig
from probes.evaluate import evaluate, final_table, read_run
from probes.learn import Job, Stack
from probes.specs import Spec
from probes.sweep import sweep, train

PARTS = ("layers", "permuted", "prompt")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted().write(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """The same samples without anything planted: in another order, and some missing."""
    samples = [i for i in reversed(range(96)) if i not in (4, 5, 6)]
    return Planted(planted=None, seed=1, samples=samples).write(tmp_path_factory.mktemp("control") / "store")


@pytest.fixture(scope="module")
def whole(planted, control, tmp_path_factory):
    """Settings of a sweep of everything, trained to its end."""
    config = quick(planted, tmp_path_factory.mktemp("whole") / "run", random_weights=control, prompt_layers=("0", "1"))
    sweep(config)
    return config


@pytest.fixture
def doubled(monkeypatch):
    """Everything is computed in double precision: Adam turns rounding into steps."""
    monkeypatch.setattr(Stack, "dtype", torch.float64)
    monkeypatch.setattr(Stack, "_mixed", lambda self: contextlib.nullcontext())
    make = learn.make
    monkeypatch.setattr(learn, "make", lambda *args: make(*args).double())


def close(out, other, names=None, **tolerance):
    """Whether probes of two folders have the same weights."""
    names = names or sorted(path.name for path in (out / "proxies").iterdir())
    assert names
    for name in names:
        mine, others = (load_file(folder / "proxies" / name / "probe.safetensors") for folder in (out, other))
        for key, value in mine.items():
            torch.testing.assert_close(value, others[key], **tolerance, msg=lambda m, n=name, k=key: f"{n} {k}: {m}")


def batches_of(monkeypatch):
    """The samples of every training step from now on."""
    seen, step = [], Stack.train

    def recorded(self, views, number):
        seen.append((number, views.read.samples.tolist()))
        return step(self, views, number)

    monkeypatch.setattr(Stack, "train", recorded)
    return seen


# -- alone and together ------------------------------------------------------------------------------------------------


def test_a_probe_of_a_sweep_is_the_one_that_is_trained_alone(planted, tmp_path, doubled, monkeypatch):
    seen = batches_of(monkeypatch)
    sweep(quick(planted, tmp_path / "sweep", parts=("layers", "permuted", "control-task", "prompt")))
    together = {step: samples for step, samples in seen}
    for number, changes in enumerate(({}, {"labels": "permuted"}, {"labels": "control"})):
        seen.clear()
        out = tmp_path / str(number)
        train(alone(planted, out, "1", **changes))
        assert dict(seen) == together
        close(out, tmp_path / "sweep", atol=1e-7, rtol=1e-6)
    predictions = [pl.read_parquet(tmp_path / name / "predictions.parquet") for name in ("0", "sweep")]
    mine, swept = (p.filter(pl.col("probe") == "layer-1").sort("seed", "sample") for p in predictions)
    np.testing.assert_allclose(mine["x1"].to_numpy(), swept["x1"].to_numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp", "attention"])
def test_that_holds_for_every_kind_of_probe(planted, tmp_path, doubled, kind):
    sweep(quick(planted, tmp_path / "sweep", probe=kind, parts=("layers", "permuted", "prompt")))
    train(alone(planted, tmp_path / "alone", "1", probe=kind))
    close(tmp_path / "alone", tmp_path / "sweep", atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("changes", [{"threads": 2}, {"memory": 1e-9}, {"layers": ("0", "1")}])
def test_threads_memory_and_company_change_nothing(planted, tmp_path, doubled, changes):
    sweep(quick(planted, tmp_path / "plain", parts=PARTS))
    sweep(quick(planted, tmp_path / "other", parts=PARTS, **changes))
    names = [path.name for path in (tmp_path / "other" / "proxies").iterdir()]
    close(tmp_path / "other", tmp_path / "plain", names, atol=1e-7, rtol=1e-6)


def test_a_sweep_in_float32_gives_nearly_the_same_boxes_as_training_alone(planted, whole, tmp_path):
    # The control store lacks samples: without it they would be trained on.
    config = quick(planted, tmp_path / "sweep", parts=PARTS)
    sweep(config)
    train(alone(planted, tmp_path / "alone", "1"))
    mine, swept = (
        pl.read_parquet(tmp_path / name / "predictions.parquet").filter(pl.col("probe") == "layer-1")
        for name in ("alone", "sweep")
    )
    np.testing.assert_allclose(mine["x1"].to_numpy(), swept["x1"].to_numpy(), atol=2e-3)


def test_the_same_sweep_gives_the_same_bits(planted, tmp_path):
    for name in "ab":
        sweep(quick(planted, tmp_path / name, parts=PARTS))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    tables = [pl.read_parquet(tmp_path / name / "predictions.parquet") for name in "ab"]
    assert tables[0].equals(tables[1])


def test_a_probe_that_train_made_is_not_trained_again_by_a_sweep(planted, tmp_path, monkeypatch):
    train(alone(planted, tmp_path, "1"))
    before = weights_of(tmp_path)
    trained = []
    monkeypatch.setattr("probes.trained.save", recording(wave.trained.save, trained))
    sweep(quick(planted, tmp_path, parts=("layers",)))
    assert sorted(job.name for job in trained) == [
        f"layer-{name}-seed{seed}" for name in sorted(set(LAYERS) - {"1"}) for seed in (0, 1)
    ]
    assert before.items() <= weights_of(tmp_path).items()
    assert json.loads((tmp_path / "proxies/layer-1-seed0/probe.json").read_text())["spec"]["role"] == "layer"


def test_probes_of_other_tokens_have_one_name_in_train_and_in_a_sweep(planted, tmp_path):
    sweep(quick(planted, tmp_path, parts=("layers",), layers=("1",), tokens="instruction"))
    before = weights_of(tmp_path)
    train(alone(planted, tmp_path, "1", tokens="instruction"))
    assert weights_of(tmp_path) == before
    assert list(before) == ["layer-1-instruction-seed0", "layer-1-instruction-seed1"]


def recording(function, calls):
    def recorded(out, job, *rest):
        calls.append(job)
        return function(out, job, *rest)

    return recorded


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_a_whole_sweep_has_every_part_and_its_tables_are_of_it(whole):
    run = read_run(whole.out)
    roles = dict(run.about.group_by("role").agg(pl.len()).rows())
    # 64 train samples less three that the control store lacks: portions of less than two samples are not coded.
    assert roles == {
        "floor": 5,
        "layer": 5,
        "prompt": 1,
        "control": 16,  # each layer thrice, and the joint probe's twin
        "other": 1,
        "matched": 4,
        "efficiency": 20,
        "codelength": 25,
    }
    counts = run.predictions.filter(part="test").group_by("probe", "seed").len()
    assert set(counts.filter(~pl.col("probe").str.starts_with("control"))["len"]) == {31}
    assert set(run.about.filter(pl.col("source") == "random-weights")["layer"]) == set(LAYERS)
    assert run.results.filter(pl.col("metric") == "compression").height == len(LAYERS)
    steps = run.results.filter(pl.col("probe") == "layer-1", pl.col("metric") == "one_minus_iou")["step"].unique()
    assert steps.sort().to_list() == [0, 6, 12]
    assert not (whole.out / "checkpoint").exists()
    assert not (whole.out / ".partial").exists()


def test_a_sample_of_the_test_split_is_never_in_a_training_batch(planted, tmp_path, monkeypatch):
    seen = batches_of(monkeypatch)
    sweep(quick(planted, tmp_path, parts=("layers", "shares"), layers=("1",)))
    trained_on = {sample for _, samples in seen for sample in samples}
    assert trained_on
    assert not {sample for sample in trained_on if sample % 3 == 0}


def test_each_state_is_read_once_a_step(planted, tmp_path, monkeypatch):
    told = []
    run = wave.Wave.train
    monkeypatch.setattr(wave.Wave, "train", lambda self: told.append(run(self)) or told[-1])
    for number, changes in enumerate(({"parts": ("layers",), "seeds": (0,)}, {"parts": ("layers", "permuted")})):
        sweep(quick(planted, tmp_path / str(number), **changes))
    # Twice the seeds and the permuted labels on top, and not a byte more.
    assert told[0].nbytes == told[1].nbytes
    most = 8 + 6
    steps, watched, test = 12 * 16, 3 * 16, 32
    assert told[0].nbytes <= (steps + watched + test) * len(LAYERS) * most * 16 * 2


def test_no_more_threads_compute_than_are_given(planted, tmp_path, monkeypatch):
    inside, at_once, most = [], [0], [0]
    lock, step = threading.Lock(), Stack.train

    def counted(self, views, number):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            inside.append(torch.get_num_threads())
        try:
            return step(self, views, number)
        finally:
            with lock:
                at_once[0] -= 1

    monkeypatch.setattr(Stack, "train", counted)
    before = torch.get_num_threads()
    sweep(quick(planted, tmp_path / "two", parts=("layers", "permuted"), threads=2))
    assert set(inside) == {1}
    assert most[0] <= 2
    assert torch.get_num_threads() == before


# -- planted truth -----------------------------------------------------------------------------------------------------

LEARNED = QUICK | dict(depth=2, queries=4, batch=32, steps=140, warm_up=20, l1_steps=20, watch=64, watch_every=70)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Settings of a sweep that had time to learn."""
    folder = tmp_path_factory.mktemp("learned")
    path = Planted(n=420, spelled=("box",)).write(folder / "store")
    config = SweepConfig(
        path, folder / "run", parts=("layers", "prompt", "floors", "permuted", "control-task"), **LEARNED
    )
    sweep(config)
    return config


def ious(out):
    return {row["probe"]: row for row in final_table(read_run(out).results).to_dicts()}


def test_the_planted_box_is_found_where_it_was_planted_and_nowhere_else(learned):
    found = ious(learned.out)
    floors = max(row["iou"] for row in found.values() if row["role"] == "floor")
    assert found[f"layer-{PLANTED}"]["iou"] > floors + 0.1
    assert found["mid-prompt"]["iou"] > floors + 0.1
    for name in set(LAYERS) - {PLANTED}:
        assert found[f"layer-{name}"]["iou"] < floors + 0.05


def test_neither_permuted_labels_nor_the_control_task_are_learned_at_the_planted_layer(learned):
    found = ious(learned.out)
    for control in ("permuted", "control"):
        assert found[f"{control}-{PLANTED}"]["iou"] < found[f"layer-{PLANTED}"]["iou"] - 0.1


def test_the_verdict_is_yes_where_it_is_planted(learned, capsys):
    evaluate(EvaluateConfig(learned.out, json=True))
    told = json.loads(capsys.readouterr().out)["verdict"]
    assert told["layer"]["answer"] is True, told["layer"]["sentence"]


def test_the_verdict_is_not_yes_where_nothing_is_planted(tmp_path, capsys):
    path = Planted(n=420, planted=None).write(tmp_path / "store")
    sweep(SweepConfig(path, tmp_path / "run", parts=("layers", "floors"), **LEARNED | {"steps": 40}))
    capsys.readouterr()
    evaluate(EvaluateConfig(tmp_path / "run", json=True))
    assert json.loads(capsys.readouterr().out)["verdict"]["layer"]["answer"] is False


# -- stopped and resumed -----------------------------------------------------------------------------------------------


class Stop(BaseException):
    """A kill, in this process."""


def stopped(config, module, name, after):
    """Run a sweep until a function was called so often; the kill comes before its next call."""
    calls = itertools.count()
    function = getattr(module, name)

    def dying(*args, **kwargs):
        if next(calls) == after:
            raise Stop
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, name, dying)
        sweep(config)


@pytest.fixture(scope="module")
def uninterrupted(planted, tmp_path_factory):
    config = quick(planted, tmp_path_factory.mktemp("uninterrupted") / "run", parts=PARTS, checkpoint=0)
    sweep(config)
    return config


STEPS = QUICK["steps"]
STOPS = {
    "in a step": (Stack, "train", 17),
    "while a checkpoint is written": (checkpoint, "save_file", 10),
    "before a checkpoint is whole": (checkpoint, "checksum_of", 7),
    "while probes are saved": (wave.trained, "save", 7),
    "before any probe is saved": (wave.trained, "save", 0),
    "while tables are written": (wave.trained, "read_job", 10),
}


@pytest.mark.parametrize("when", STOPS)
def test_a_sweep_that_was_stopped_goes_on_to_the_same_end(uninterrupted, tmp_path, when):
    config = dataclasses.replace(uninterrupted, out=tmp_path)
    stopped(config, *STOPS[when])
    before = weights_of(tmp_path)
    sweep(config)
    after = weights_of(tmp_path)
    assert before.items() <= after.items()
    assert after.keys() == weights_of(uninterrupted.out).keys()
    if when != "while probes are saved":  # what is left is stacked otherwise, and only answers
        assert after == weights_of(uninterrupted.out)
    close(tmp_path, uninterrupted.out, atol=1e-6, rtol=1e-5)
    for name in ("predictions", "about"):
        mine, whole = (pl.read_parquet(out / f"{name}.parquet") for out in (tmp_path, uninterrupted.out))
        assert mine.columns == whole.columns
        assert len(mine) == len(whole)
    curves = [
        pl.read_parquet(out / "results.parquet").filter(pl.col("step").is_not_null()) for out in (tmp_path, config.out)
    ]
    assert len(curves[0]) == len(curves[1])
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("changes", [{}, {"threads": 2}, {"memory": 1e-9}, {"layers": ("1",)}])
def test_steps_before_the_checkpoint_are_not_repeated_whatever_is_left_and_however_it_is_stacked(
    uninterrupted, tmp_path, monkeypatch, changes
):
    config = dataclasses.replace(uninterrupted, out=tmp_path)
    stopped(config, Stack, "train", 8 * stacks_in(tmp_path, uninterrupted))
    seen = batches_of(monkeypatch)
    again = dataclasses.replace(config, **changes)
    sweep(again)
    assert sorted({step for step, _ in seen}) == list(range(8, STEPS))
    names = sorted(path.name for path in (tmp_path / "proxies").iterdir())
    close(tmp_path, uninterrupted.out, names, atol=2e-3, rtol=2e-3)


def stacks_in(folder, config):
    """Steps of stacks that a step of the sweep takes."""
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        made = wave.learn.stacks_of
        patch.setattr(wave.learn, "stacks_of", lambda *args: counted.append(made(*args)) or counted[-1])
        stopped(dataclasses.replace(config, out=folder / "count"), Stack, "train", 0)
    shutil.rmtree(folder / "count")
    return len(counted[0])


def test_probes_that_were_saved_before_a_kill_cost_the_others_nothing(uninterrupted, tmp_path, monkeypatch):
    config = dataclasses.replace(uninterrupted, out=tmp_path)
    stopped(config, wave.trained, "save", 7)
    assert len(weights_of(tmp_path)) == 7
    seen = batches_of(monkeypatch)
    sweep(config)
    assert seen == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no stand", "empty stand", "odd stand", "lost file"])
def test_a_damaged_checkpoint_is_told_and_left_out(uninterrupted, tmp_path, capsys, damage):
    config = dataclasses.replace(uninterrupted, out=tmp_path)
    stopped(config, Stack, "train", 20)
    (stand,) = (tmp_path / "checkpoint").glob("[!.]*")
    file = stand / "0.safetensors"
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[:-100])
    elif damage == "flipped":
        file.write_bytes(data[:-10] + bytes([data[-10] ^ 255]) + data[-9:])
    elif damage == "lost file":
        file.unlink()
    elif damage == "no stand":
        (stand / "stand.json").unlink()
    else:
        (stand / "stand.json").write_text({"empty stand": "", "odd stand": "[3]"}[damage])
    sweep(config)
    assert "is damaged" in capsys.readouterr().err
    assert weights_of(tmp_path) == weights_of(uninterrupted.out)
    assert not (tmp_path / "checkpoint").exists()


def command(config, name="sweep", **more):
    """The command line of these settings."""
    argv = [sys.executable, "-m", "probes", name]
    for field in dataclasses.fields(config):
        value = more.get(field.name, getattr(config, field.name))
        if value is not None and value != () and field.name != "json":
            values = value if isinstance(value, tuple) else (value,)
            argv += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return argv


KILLS = {
    "during a wave": lambda out: list(out.glob("checkpoint/*-[3-9]")),
    "while probes are saved": lambda out: len(list(out.glob("proxies/*"))) > 2,
    "while tables are gathered": lambda out: len(list(out.glob("proxies/*"))) == 22,
}


@pytest.mark.parametrize(
    "when", [name if name == "during a wave" else pytest.param(name, marks=pytest.mark.slow) for name in KILLS]
)
def test_a_killed_process_leaves_what_the_next_one_brings_to_the_same_end(uninterrupted, tmp_path, when):
    config = dataclasses.replace(uninterrupted, out=tmp_path)
    process = subprocess.Popen(
        command(config),
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not KILLS[when](tmp_path) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = weights_of(tmp_path)
    assert not (tmp_path / "comparisons.parquet").exists()
    sweep(config)
    assert before.items() <= weights_of(tmp_path).items()
    assert weights_of(tmp_path) == weights_of(uninterrupted.out)


# -- what is told ------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_it_trains_how_far_it_is_and_what_reading_cost(planted, tmp_path, capsys):
    sweep(quick(planted, tmp_path, parts=("layers",), layers=("0", "1")))
    told = capsys.readouterr()
    assert "4 probes, 64 train and 32 test samples (16 of them watched)" in told.out
    assert "GB/s; training waited" in told.out
    assert "4 probes: 100%" in told.err
    assert "best IoU" in told.err


def test_a_finished_sweep_trains_nothing_and_makes_its_tables_again(whole, monkeypatch, capsys):
    monkeypatch.setattr(wave.Wave, "train", None)
    (whole.out / "results.parquet").unlink()
    sweep(whole)
    assert "probes are finished already" in capsys.readouterr().out
    assert (whole.out / "results.parquet").exists()


def test_tables_keep_floors_of_what_was_asked_before(planted, tmp_path):
    sweep(quick(planted, tmp_path, parts=("layers", "codelength"), layers=("1",), seeds=(0,)))
    train(alone(planted, tmp_path, "1"))
    assert "floor-majority-cell-3x3" in read_run(tmp_path).about["probe"].to_list()


def test_tables_are_made_again_without_the_store(planted, tmp_path):
    path = shutil.copytree(planted, tmp_path / "store")
    config = quick(path, tmp_path / "run", parts=("layers",))
    sweep(config)
    before = read_run(config.out)
    shutil.rmtree(path)
    gathering.gather(config.out)
    for mine, other in zip(read_run(config.out), before, strict=True):
        assert mine.equals(other)


@pytest.mark.parametrize("name", ["sweep", "train"])
def test_help_shows_examples_and_presets(name, capsys):
    from store.commandline import parse

    config_type = {"sweep": SweepConfig, "train": TrainConfig}[name]
    with pytest.raises(SystemExit):
        parse(config_type, f"python -m probes {name}", config_type.__doc__, ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for word in ("Examples", "pocket", "paper", "--layers 6", "--target", "--seeds"):
        assert word in told, word


# -- other stores ------------------------------------------------------------------------------------------------------


def test_probes_answer_for_another_store_where_they_were_not_trained(whole, tmp_path, capsys):
    out = shutil.copytree(whole.out, tmp_path / "run")
    # The same scenes again, and new ones.
    ids = [f"s{i}" if i < 96 else f"new{i}" for i in range(126)]
    path = Planted(n=126, seed=5, more={"sample_id": ids}).write(tmp_path / "store")
    capsys.readouterr()
    evaluate(EvaluateConfig(out, on=(f"fresh={path}",), json=True))
    told = json.loads(capsys.readouterr().out)
    assert {row["data"] for row in told["probes"]} == {"held-out", "fresh"}
    asked = read_run(out).predictions.filter(data="fresh")
    assert sorted(asked["sample"].unique()) == [i for i in range(126) if i >= 96 or i % 3 == 0]
    assert set(asked["probe"]) == set(
        read_run(out).about.filter(
            pl.col("labels") != "control", pl.col("source") == "ordinary", pl.col("role") != "codelength"
        )["probe"]
    ) - {"floor-majority-cell-3x3"}


def test_answers_for_the_own_store_are_those_of_the_sweep(whole, tmp_path, planted):
    out = shutil.copytree(whole.out, tmp_path / "run")
    evaluate(EvaluateConfig(out, on=(f"same={planted}",)))
    predictions = read_run(out).predictions.filter(part="test").sort("probe", "seed", "sample")
    keys = ["probe", "seed", "sample"]
    both = predictions.filter(data="same").join(predictions.filter(data="held-out"), on=keys, suffix="_own")
    assert len(both) > 500
    np.testing.assert_allclose(both["x1"].to_numpy(), both["x1_own"].to_numpy(), atol=1e-4)


def test_probes_that_do_not_fit_into_memory_together_are_asked_in_turns(whole, tmp_path, planted, monkeypatch):
    out = shutil.copytree(whole.out, tmp_path / "run")
    answers = []
    for room in (8e9, 1e6):
        monkeypatch.setattr("probes.shifts.ROOM", room)
        shifts.ask(out, f"same={planted}")
        answers.append(pl.read_parquet(out / "data/same.parquet"))
    np.testing.assert_allclose(answers[0]["x1"].to_numpy(), answers[1]["x1"].to_numpy(), atol=1e-5)


def test_class_probes_answer_in_their_own_classes(planted, tmp_path):
    sweep(quick(planted, tmp_path / "run", target="object_kind", parts=("layers",), layers=("1",)))
    words = ["ring", "cone", "unheard-of"]
    ids = [f"new{i}" for i in range(60)]
    kinds = [words[i % 3] for i in range(60)]
    plain = Planted(n=60, seed=5, planted=None, more={"sample_id": ids})
    plain.table = lambda table=plain.table: table().with_columns(object_kind=pl.Series(kinds))
    from planted_store import WORDS

    path = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planted_store.WORDS", (*WORDS, "unheard-of"))
        path = plain.write(tmp_path / "store")
    evaluate(EvaluateConfig(tmp_path / "run", on=(f"fresh={path}",)))
    asked = read_run(tmp_path / "run").predictions.filter(data="fresh")
    assert set(asked["predicted"]) <= set(WORDS)
    assert set(asked["true"]) == {"ring", "cone"}
    assert len(asked) == 40 * 2


def test_a_job_is_finished_only_as_it_is_wanted(whole):
    job = Job(Spec("layer-1", "layer", ("1",)), 0)
    assert provenance.finished(whole.out, job)
    assert not provenance.finished(whole.out, dataclasses.replace(job, seed=9))
