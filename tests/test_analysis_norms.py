"""Norms of states: every number against a loop over tokens, and the hostile cases."""

import numpy as np
import polars as pl
import pytest
import torch

from analysis.states.norms import KINDS, OTHER, PADDING, Norms, answer, measured, quantile_ends, registers
from store.inspection import MASSIVE

KINDS_S = [[0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 2], [0, 0, 1, 1, 1, OTHER]]
"""Kinds of three samples' tokens."""


def filled(layers=2, width=6, batches=((0, 2), (2, 3)), kinds_s=KINDS_S, spoil=None):
    """Norms of made-up states, given batch by batch, and the states by sample, ``[t, l, w]``."""
    rng = np.random.default_rng(0)
    states_s = [rng.normal(size=(len(kinds), layers, width)).astype(np.float32) for kinds in kinds_s]
    if spoil:
        spoil(states_s)
    sizes = [len(kinds) for kinds in kinds_s]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    norms = Norms(
        [str(n) for n in range(layers)],
        np.concatenate(kinds_s),
        np.repeat(np.arange(len(sizes)), sizes),
        len(sizes),
        width,
    )
    for begin, end in batches:
        longest = max(sizes[begin:end])
        states, kinds = (
            np.zeros((end - begin, layers, longest, width), np.float32),
            np.full((end - begin, longest), PADDING),
        )
        for row, sample in enumerate(range(begin, end)):
            states[row, :, : sizes[sample]] = states_s[sample].transpose(1, 0, 2)
            kinds[row, : sizes[sample]] = kinds_s[sample]
        span = slice(starts[begin], starts[end])
        norms.add(torch.from_numpy(states), torch.from_numpy(kinds), span, slice(begin, end))
    return norms, states_s


def of_kind(states_s, k):
    return [states[np.array(kinds) == k] for states, kinds in zip(states_s, KINDS_S, strict=True)]


def value(table, **which):
    (row,) = table.filter(**which).to_dicts()
    return row


def test_mean_median_and_p99_are_those_of_all_tokens_of_a_kind():
    norms, states_s = filled()
    table = norms.table()
    for k, kind in enumerate(KINDS):
        for layer in range(2):
            lengths = [np.sqrt((token[layer] ** 2).sum()) for tokens in of_kind(states_s, k) for token in tokens]
            mean = value(table, layer=str(layer), kind=kind, metric="mean")
            assert mean["value"] == pytest.approx(np.mean(lengths), rel=1e-5)
            assert mean["low"] <= mean["value"] <= mean["high"]
            assert mean["tokens"] == len(lengths)
            for name, share in (("median", 0.5), ("p99", 0.99)):
                found = value(table, layer=str(layer), kind=kind, metric=name)
                assert found["value"] == pytest.approx(np.quantile(lengths, share), rel=1e-5)
                assert found["low"] <= found["value"] <= found["high"]


def test_images_count_once_each_in_n():
    table = filled()[0].table()
    assert value(table, layer="0", kind="template", metric="mean")["images"] == 2
    assert value(table, layer="0", kind="image", metric="mean")["images"] == 3


def test_the_batches_in_which_states_come_change_nothing():
    one, other = (filled(batches=batches)[0].table() for batches in (((0, 3),), ((0, 1), (1, 2), (2, 3))))
    assert one.equals(other)


def test_the_share_of_four_dimensions_is_the_mean_over_images_of_each_images_share():
    norms, states_s = filled(width=9)
    squares = [np.square(states[:, 1].astype(float)).sum(0) for states in of_kind(states_s, 0)]
    top = np.argsort(-sum(squares))[:4]
    wanted = np.mean([one[top].sum() / one.sum() for one in squares])
    assert value(norms.table(), layer="1", kind="image", metric="top4")["value"] == pytest.approx(wanted, rel=1e-5)


def test_a_massive_dimension_is_found_where_it_is_and_with_its_ratio():
    def spoil(states_s):
        for states in states_s:
            states[:, 1, 3] = 400

    norms, states_s = filled(width=9, spoil=spoil)
    found = norms.massive()
    assert set(found["layer"]) == {"1"}
    assert set(found["dim"]) == {3}
    images = np.concatenate(of_kind(states_s, 0))[:, 1]
    rms = np.sqrt(np.square(images.astype(float)).mean(0))
    row = value(found, kind="image")
    assert row["ratio"] == pytest.approx(rms[3] / np.median(rms), rel=1e-5)
    assert row["ratio"] >= MASSIVE
    assert row["low"] <= row["ratio"] <= row["high"]


def test_states_without_massive_dimensions_have_an_empty_table_and_an_answer_that_says_so():
    norms, _ = filled()
    assert norms.massive().is_empty()
    assert "No dimension is massive" in answer(norms.table(), norms.massive(), None)


def test_a_register_is_far_above_its_own_pictures_mean():
    rng = np.random.default_rng(1)
    norms_lm = rng.normal(10, 1, (2, 60))
    norms_lm[0, 7] = 90
    images_m = np.repeat([0, 5, 9], 20)
    found = registers(norms_lm, images_m)
    for layer in range(2):
        for image in (0, 5, 9):
            own = images_m == image
            line = norms_lm[layer, own].mean() + 2 * norms_lm[layer, own].std()
            assert (found[layer, own] == (norms_lm[layer, own] > line)).all()
    assert found[0, 7]


def test_intervals_of_a_quantile_cover_it():
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        norms_1m = rng.normal(size=(1, 300))
        middle = np.quantile(norms_1m, 0.5, axis=1)
        _, low, high = measured((norms_1m <= middle[:, None]).astype(np.float32), np.repeat(np.arange(100), 3))
        _, low, high = quantile_ends(norms_1m, middle, low, high)
        hits += low[0] <= 0 <= high[0]
    assert hits >= 34


def test_a_quantity_that_nobody_knows_is_nan_and_not_zero():
    for ends in measured(np.array([[np.nan, np.nan], [1, 3]])):
        assert np.isnan(ends[0])
        assert not np.isnan(ends[1])


def test_one_layer_of_one_sample_is_enough():
    norms, _ = filled(layers=1, kinds_s=KINDS_S[:1], batches=((0, 1),))
    table = norms.table()
    assert set(table["kind"]) == set(KINDS)
    row = value(table, kind="image", metric="mean")
    assert row["low"] == row["value"] == row["high"] or row["high"] - row["low"] < 1e-5


def test_a_kind_without_tokens_has_no_rows():
    norms, _ = filled(kinds_s=[[0, 0], [0, 0, 0]], batches=((0, 2),))
    assert set(norms.table()["kind"]) == {"image"}
    assert isinstance(norms.table(), pl.DataFrame)
