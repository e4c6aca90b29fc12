"""Places read off states: cells, ridge regression against NumPy's own, and tables against loops."""

import numpy as np
import pytest

from analysis.states.position import CLASSES, RIDGE, Asked, Decoder, Ridge, answer, cells, one_hot, shuffled_within


def ridge_by_hand(states, targets):
    """Centred, scaled, penalised least squares, written as one system of equations with rows for the penalty."""
    spread = states.std(0)
    scaled = (states - states.mean(0)) / np.where(spread > 1e-6, spread, np.inf)
    wide = np.concatenate([scaled, np.sqrt(RIDGE * len(states)) * np.eye(states.shape[1])])
    long = np.concatenate([targets - targets.mean(0), np.zeros((states.shape[1], targets.shape[1]))])
    weights = np.linalg.lstsq(wide, long, rcond=None)[0]
    return lambda asked: (
        ((asked - states.mean(0)) / np.where(spread > 1e-6, spread, np.inf)) @ weights + targets.mean(0)
    )


def test_a_cell_is_that_of_the_centre_in_the_picture_row_by_row():
    boxes = np.array([[0, 0, 10, 10], [190, 0, 200, 10], [80, 40, 120, 60], [0, 90, 10, 100], [150, 80, 200, 100]])
    assert cells(boxes.astype(float), np.tile([200.0, 100.0], (5, 1))).tolist() == [0, 2, 4, 6, 8]


def test_a_centre_outside_of_the_picture_counts_as_at_its_edge_and_an_unknown_box_as_unknown():
    boxes = np.array([[-80, 0, -20, 10], [150, 90, 400, 300], [np.nan] * 4])
    assert cells(boxes, np.tile([200.0, 100.0], (3, 1))).tolist() == [0, 8, -1]


def test_ridge_from_streamed_sums_is_least_squares_with_a_penalty():
    rng = np.random.default_rng(0)
    states = rng.normal(3, [0.1, 1, 40, 5], (200, 4)).astype(np.float32)
    targets = one_hot(rng.integers(0, CLASSES, 200))
    ridge = Ridge(4, CLASSES)
    for start in range(0, 200, 33):
        ridge.add(states[start : start + 33], targets[start : start + 33])
    weights, offset = ridge.solve()
    wanted = ridge_by_hand(states.astype(float), targets)(states.astype(float))
    assert np.allclose(states @ weights + offset, wanted, atol=1e-6)


def test_a_dimension_that_does_not_vary_says_nothing_and_breaks_nothing():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(50, 3))
    states[:, 1] = 400.3
    ridge = Ridge(3, CLASSES)
    ridge.add(states, one_hot(rng.integers(0, CLASSES, 50)))
    weights, offset = ridge.solve()
    assert (weights[1] == 0).all()
    assert np.isfinite(offset).all()


def test_fewer_states_than_dimensions_can_be_taught():
    rng = np.random.default_rng(0)
    ridge = Ridge(64, CLASSES)
    ridge.add(rng.normal(size=(10, 64)), one_hot(np.arange(10) % CLASSES))
    assert np.isfinite(ridge.solve()[0]).all()


def test_shuffled_cells_stay_with_their_sample():
    rng = np.random.default_rng(0)
    samples = np.repeat([4, 1, 7], [30, 20, 25])
    true = rng.integers(0, CLASSES, 75)
    mixed = shuffled_within(true, samples, rng)
    assert (mixed != true).any()
    for sample in (4, 1, 7):
        assert sorted(mixed[samples == sample]) == sorted(true[samples == sample])


def planted(images=60, each=9, seed=0):
    """Two layers of 16: noise, and noise over the cell; with cells and images."""
    rng = np.random.default_rng(seed)
    images_n, cells_n = np.repeat(np.arange(images), each), np.tile(np.arange(CLASSES), images)
    letters = np.random.default_rng(5).normal(size=(CLASSES, 16))
    states = rng.normal(size=(2, len(cells_n), 16))
    states[1] += letters[cells_n]
    return states.astype(np.float32), cells_n, images_n


def asked(seed=0):
    states, cells_n, images_n = planted(seed=seed)
    decoder = Decoder(2, 16)
    mixed = shuffled_within(cells_n, images_n, np.random.default_rng(1))
    for piece in np.array_split(np.arange(len(cells_n)), 3):
        decoder.fit(states[:, piece], cells_n[piece], mixed[piece])
    states, true, images_n = planted(seed=seed + 1)
    for piece in np.array_split(np.arange(len(true)), 4):
        decoder.predict(states[:, piece])
    return Asked("token", true, images_n, cells_n, 60, [np.concatenate(decoder.told, axis=2)])


def test_a_planted_cell_is_read_in_its_layer_alone_and_not_when_shuffled_cells_were_taught():
    found = asked().table(["0", "1"]).filter(metric="cell")
    values = {(row["layer"], row["labels"]): row for row in found.to_dicts()}
    assert values["1", "true"]["value"] > 0.8
    for floor in (("0", "true"), ("1", "shuffled"), ("0", "shuffled"), (None, "most-frequent")):
        assert abs(values[floor]["value"] - 1 / CLASSES) < 0.06
    assert values["0", "minus-last"]["high"] < 0 < values["1", "minus-first"]["low"]
    assert values["1", "minus-last"]["value"] == 0


def test_the_table_is_what_loops_over_predictions_count():
    one = asked()
    found = one.table(["0", "1"])
    told = one.told[0]
    for layer in range(2):
        for metric, part in (("cell", lambda c: c), ("row", lambda c: c // 3), ("column", lambda c: c % 3)):
            right = [part(int(a)) == part(int(b)) for a, b in zip(told[0, layer], one.true_n, strict=True)]
            (row,) = found.filter(layer=str(layer), labels="true", metric=metric).to_dicts()
            assert row["value"] == pytest.approx(np.mean(right))
            assert row["low"] <= row["value"] <= row["high"]
            assert (row["n"], row["images"], row["taught"]) == (540, 60, 60)


def test_layers_that_come_in_groups_give_one_table():
    whole = asked()
    parts = Asked("token", whole.true_n, whole.images_n, whole.taught_n, 60, np.split(whole.told[0], 2, axis=1))
    assert parts.table(["0", "1"]).equals(whole.table(["0", "1"]))


def test_the_answer_says_what_could_not_be_asked_and_why():
    found = asked().table(["0", "1"]).with_columns(source=np.array(["store"] * 27))
    said = answer(found, {"object": "the store has no boxes"})
    assert "is read best at 1" in said
    assert "Not asked, the cell of the edited object: the store has no boxes." in said
