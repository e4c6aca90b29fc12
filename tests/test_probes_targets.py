"""What a probe may be asked for: every form of target, its answers, its labels, and what is refused."""

import numpy as np
import polars as pl
import pytest
import torch
from planted_store import Planted, alone, quick

from probes import floors, targets
from probes.evaluate import read_run
from probes.sweep import sweep, train
from store.errors import Refusal

TABLE = Planted(n=60).table()
TRAIN = np.array([i for i in range(60) if i % 3])


def made(name, **columns):
    return targets.make(name, TABLE.with_columns(**{key: pl.Series(values) for key, values in columns.items()}))


def test_boxes_are_shares_of_the_picture():
    box = made("box")
    assert box.known.all()
    assert box.labels.dtype == np.float32
    np.testing.assert_allclose(box.labels[:, 0] * 200, TABLE["x1"], rtol=1e-5)
    np.testing.assert_allclose(box.labels[:, 3] * 100, TABLE["y2"], rtol=1e-5)


def test_a_box_with_a_corner_missing_or_not_finite_is_not_known():
    x1 = [None, float("nan"), float("inf"), *TABLE["x1"][3:]]
    assert made("box", x1=x1).known.tolist() == [False] * 3 + [True] * 57


def test_cells_are_read_row_by_row_and_centres_outside_belong_to_the_border():
    corners = {"x1": [0.0, 190.0, -90.0, 300.0], "x2": [10.0, 199.0, -10.0, 400.0]}
    corners |= {"y1": [0.0, 90.0, 40.0, 0.0], "y2": [10.0, 99.0, 50.0, 5.0]}
    table = TABLE[:4].with_columns(**{name: pl.Series(values) for name, values in corners.items()})
    cells = targets.make("cell-3x4", table)
    assert cells.outputs == 12
    assert [cells.classes[place] for place in cells.labels] == [
        "row 1, column 1",
        "row 3, column 4",
        "row 2, column 1",
        "row 1, column 4",
    ]


def test_words_booleans_and_small_counts_are_classes_in_a_natural_order():
    assert list(made("object_kind").classes) == ["ball", "cone", "cube", "ring"]
    assert list(made("count", count=[(9, 10, 11)[i % 3] for i in range(60)]).classes) == ["9", "10", "11"]
    assert list(made("there", there=[i % 2 == 0 for i in range(60)]).classes) == ["false", "true"]
    words = pl.Series(["a", "b"] * 30).cast(pl.Enum(["a", "b"]))
    assert list(made("kind", kind=words).classes) == ["a", "b"]


def test_other_numbers_are_quantities_in_units_of_their_spread():
    number = made("weight")
    assert number.form == "number"
    assert number.labels.std() == pytest.approx(1, abs=1e-5)
    told = number.answers(torch.from_numpy(number.labels)[:, None], number.labels)
    np.testing.assert_allclose(told["predicted"], TABLE["weight"], rtol=1e-5)
    np.testing.assert_allclose(told["true"], TABLE["weight"], rtol=1e-5)


def test_many_whole_numbers_are_a_quantity():
    assert made("count", count=list(range(60))).form == "number"


def test_samples_without_a_value_have_no_answer():
    assert made("object_kind", object_kind=[None, *TABLE["object_kind"][1:]]).known.tolist() == [False] + [True] * 59
    assert made("weight", weight=[float("nan"), None, *TABLE["weight"][2:]]).known.sum() == 58


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("other", None, "'other' is no column: give box, cell-3x3 or one of"),
        ("same", ["a"] * 60, "1 different values; classes are 2 to 64"),
        ("same", [3] * 60, "1 different values"),
        ("same", [0.5] * 60, "do not differ"),
        ("none", pl.Series([None] * 60, dtype=pl.String), "0 different values"),
        ("none", pl.Series([None] * 60, dtype=pl.Float64), "do not differ"),
        ("none", [None] * 60, "neither classes nor numbers"),
        ("lists", [[1, 2]] * 60, "neither classes nor numbers"),
        ("sample_id", [f"{i}" for i in range(60)], None),
        ("cell-1x1", None, "a grid has 2 to 64 cells, e.g. cell-3x3"),
        ("cell-0x3", None, "a grid has"),
        ("cell-9x9", None, "a grid has"),
        ("cell-3", None, "no column"),
        ("cell-3x", None, "no column"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_name(name, column, words):
    if words is None:  # 60 words are classes, if only just
        assert made(name, **{name: column}).outputs == 60
        return
    with pytest.raises(Refusal, match=words) as refusal:
        made(name, **({} if column is None else {name: column}))
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_described_target_reads_another_store_in_the_classes_and_units_of_training():
    kind = made("object_kind")
    other = TABLE.with_columns(object_kind=pl.Series(["ring", "unheard-of"] * 30))
    again = targets.make("object_kind", other, kind.describe())
    assert again.known.tolist() == [True, False] * 30
    assert list(again.classes) == list(kind.classes)
    weight = made("weight")
    again = targets.make("weight", TABLE.with_columns(weight=pl.lit(10.0)), weight.describe())
    np.testing.assert_allclose(again.labels * weight.spread + weight.mean, 10, rtol=1e-6)


# -- labels ------------------------------------------------------------------------------------------------------------

TYPES = np.arange(60) % 7


def test_permuted_labels_are_a_permutation_of_the_train_samples_own():
    box = made("box")
    labels, counts = targets.taught(box, "permuted", TRAIN, TYPES, 0)
    assert sorted(labels[TRAIN].tolist()) == sorted(box.labels[TRAIN].tolist())
    assert (labels[TRAIN] != box.labels[TRAIN]).any(1).mean() > 0.8
    test = np.setdiff1d(np.arange(60), TRAIN)
    np.testing.assert_array_equal(labels[test], box.labels[test])
    assert counts.all()


@pytest.mark.parametrize("name", ["box", "cell-3x3", "object_kind", "weight"])
def test_the_control_tasks_answer_is_a_function_of_the_type_alone(name):
    target = made(name)
    labels, _ = targets.taught(target, "control", TRAIN, TYPES, 0)
    for kind in range(7):
        assert len(np.unique(labels[kind == TYPES], axis=0)) == 1
    assert {str(value) for value in labels} <= {str(value) for value in target.labels[TRAIN]}
    np.testing.assert_array_equal(labels, targets.taught(target, "control", TRAIN, TYPES, 0)[0])
    assert (labels != targets.taught(target, "control", TRAIN, TYPES, 1)[0]).any()


def test_samples_of_a_type_that_was_not_there_in_training_do_not_count_in_the_control_task():
    types = TYPES.copy()
    types[[0, 3]] = 99  # test samples
    _, counts = targets.taught(made("box"), "control", TRAIN, types, 0)
    assert np.flatnonzero(~counts).tolist() == [0, 3]


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted().write(tmp_path_factory.mktemp("planted") / "store")


@pytest.mark.parametrize(("target", "column"), [("cell-2x2", "nll"), ("object_kind", "nll"), ("n_objects", "nll")])
def test_a_run_of_every_class_target_ends_with_its_tables(planted, tmp_path, target, column):
    sweep(quick(planted, tmp_path, target=target, parts=("layers", "permuted", "control-task"), layers=("0", "1")))
    run = read_run(tmp_path)
    assert set(run.about["target"]) == {target}
    told = run.predictions.filter(probe="layer-1")
    assert told[column].is_finite().all()
    assert {"floor-majority-" + target, "layer-0", "control-1"} <= set(run.results["probe"])
    assert "accuracy" in run.results["metric"].to_list()


def test_a_run_of_numbers_ends_with_their_tables(planted, tmp_path, capsys):
    sweep(quick(planted, tmp_path, target="weight", parts=("layers", "permuted"), layers=("1",)))
    assert {"r2", "absolute_error"} <= set(read_run(tmp_path).results["metric"])
    assert "floor-mean-weight" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", ["image", "text", "instruction"])
@pytest.mark.parametrize("kind", ["qformer", "linear", "mlp", "attention"])
def test_every_kind_of_probe_reads_every_kind_of_tokens(planted, tmp_path, kind, tokens):
    train(alone(planted, tmp_path, "0", "1", tokens=tokens, probe=kind, seeds=(0,), steps=2))
    (row,) = read_run(tmp_path).about.filter(pl.col("kind") == kind).to_dicts()
    assert (row["probe"], row["tokens"], row["layers"]) == (f"joint-0+1-{tokens}", tokens, ["0", "1"])


def test_floors_of_every_form_are_of_the_train_samples_alone():
    test = np.setdiff1d(np.arange(60), TRAIN)
    mean, centre = dict(floors.constant(made("box"), TRAIN, test)).values()
    assert mean["x1"][0] == pytest.approx(made("box").labels[TRAIN, 0].mean())
    assert centre["x2"].tolist() == [0.75] * 20
    ((_, most),) = floors.constant(made("object_kind"), TRAIN, test)
    assert most["predicted"][0] == TABLE["object_kind"].gather(TRAIN).mode()[0]
    ((_, said),) = floors.constant(made("weight"), TRAIN, test)
    assert said["predicted"][0] == pytest.approx(TABLE["weight"].gather(TRAIN).mean(), rel=1e-5)
