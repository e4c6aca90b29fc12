"""CKA between layers: against the estimator written out in loops, and the cases in which it is not defined."""

import numpy as np
import polars as pl
import pytest
import torch

from analysis.states.norms import PADDING
from analysis.states.similarity import MINIBATCH, Grams, Views, answer, centred, minibatches, steps, table


def song(k, m):
    """The unbiased HSIC of two Gram matrices, as Song et al. 2012 write it."""
    n = len(k)
    k, m = k.copy(), m.copy()
    for i in range(n):
        k[i, i] = m[i, i] = 0
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def rows(n=70, layers=3, width=5, seed=0):
    """Layers that share half of what they hold, ``[n, l, w]``."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 1, width))
    return (shared + rng.normal(size=(n, layers, width))).astype(np.float32)


def grams_of(rows_nlw, names=None):
    grams = Grams()
    grams.add(names or [str(layer) for layer in range(rows_nlw.shape[1])], rows_nlw)
    return grams


def by_hand(rows_nlw, parts):
    layers = range(rows_nlw.shape[1])
    hsic = np.zeros((len(layers), len(layers)))
    for part in parts:
        own = [rows_nlw[part, layer].astype(float) @ rows_nlw[part, layer].T.astype(float) for layer in layers]
        hsic += [[song(own[a], own[b]) for b in layers] for a in layers]
    return hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))


def test_cka_is_the_ratio_of_unbiased_hsics_averaged_over_minibatches():
    rows_nlw = rows()
    value, low, high = grams_of(rows_nlw).cka()
    parts = [np.arange(35), np.arange(35, 70)]
    assert np.allclose(value, by_hand(rows_nlw, parts), atol=1e-6)
    assert (low <= value + 1e-12).all()
    assert (value <= high + 1e-12).all()


def test_products_of_u_centred_grams_are_songs_estimator():
    one, other = (rows(n=9, layers=1, seed=seed)[:, 0] for seed in (1, 2))
    wanted = song(*(x.astype(float) @ x.T.astype(float) for x in (one, other)))
    assert (centred(one) * centred(other)).sum() / (9 * 6) == pytest.approx(wanted, rel=1e-6)


def test_a_layer_is_as_like_itself_as_can_be_and_turning_or_scaling_it_changes_nothing():
    base = rows(layers=1)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    both = np.concatenate([base, (base @ turn * 7 + 3).astype(np.float32)], axis=1)
    assert np.allclose(grams_of(both).cka()[0], 1, atol=1e-5)


def test_layers_that_share_nothing_have_cka_about_zero_though_images_are_fewer_than_dimensions():
    wide = np.random.default_rng(0).normal(size=(320, 2, 200)).astype(np.float32)
    value, low, high = grams_of(wide).cka()
    assert abs(value[0, 1]) < 0.05
    assert low[0, 1] < 0 < high[0, 1]


def test_shuffled_images_leave_nothing_and_the_same_seed_leaves_the_same():
    grams = grams_of(rows(n=320))
    first, second = grams.cka(shuffle=3)[0], grams.cka(shuffle=3)[0]
    assert (first == second).all()
    assert np.abs(first).max() < 0.2


def test_intervals_narrow_with_more_images():
    few, many = (grams_of(rows(n=n)).cka() for n in (4 * MINIBATCH, 16 * MINIBATCH))
    assert (many[2] - many[1])[0, 1] < (few[2] - few[1])[0, 1]


def test_jackknife_intervals_cover_the_value_of_many_images():
    truth = grams_of(rows(n=6000, seed=99)).cka()[0][0, 1]
    hits = 0
    for seed in range(30):
        _, low, high = grams_of(rows(n=5 * MINIBATCH, seed=seed)).cka()
        hits += low[0, 1] <= truth <= high[0, 1]
    assert hits >= 26


def test_a_layer_that_does_not_vary_is_like_no_other_and_is_no_zero():
    rows_nlw = rows()
    rows_nlw[:, 1] = 2.5
    found = table({"image": grams_of(rows_nlw)}, 0, "store")
    assert found.filter(pl.col("a") == "1")["value"].is_null().all()
    assert found.filter(a="0", b="2")["value"].is_not_null().all()


def test_images_without_a_row_are_left_out():
    rows_nlw = rows(n=74)
    rows_nlw[[3, 10, 20, 73]] = np.nan
    grams = grams_of(rows_nlw)
    assert grams.images == 70
    kept = np.delete(rows_nlw, [3, 10, 20, 73], axis=0)
    assert np.allclose(grams.cka()[0], grams_of(kept).cka()[0])


def test_one_minibatch_has_no_interval_and_three_images_no_value():
    value, low, _ = grams_of(rows(n=20)).cka()
    assert np.isfinite(value).all()
    assert np.isnan(low).all()
    assert np.isnan(grams_of(rows(n=3)).cka()[0]).all()
    assert minibatches(np.zeros(5, bool)) == []


def test_rows_are_means_of_the_kind_and_the_last_instruction_token():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    kinds = np.array([[0, 0, 1, 1, 2], [0, 1, 2, PADDING, PADDING]])
    views = Views(3, 3, 4)
    views.add(torch.from_numpy(states), torch.from_numpy(kinds), slice(1, 3))
    assert np.allclose(views.of("image")[1], states[0, :, :2].mean(1), atol=1e-6)
    assert np.allclose(views.of("instruction")[1], states[0, :, 2:4].mean(1), atol=1e-6)
    assert np.array_equal(views.of("last")[1], states[0, :, 3])
    assert np.array_equal(views.of("last")[2], states[1, :, 1])


def test_a_sample_without_an_instruction_has_no_row_of_it():
    views = Views(1, 1, 4)
    views.add(torch.ones(1, 1, 2, 4), torch.tensor([[0, 2]]), slice(0, 1))
    assert np.isfinite(views.of("image")).all()
    assert np.isnan(views.of("instruction")).all()
    assert np.isnan(views.of("last")).all()


def test_the_answer_names_the_largest_step_between_blocks():
    rng = np.random.default_rng(0)
    early, late = rows(n=96, layers=1, seed=1), rows(n=96, layers=1, seed=2)
    layers = [early, early + 0.1 * rng.normal(size=early.shape), late, late]
    grams = grams_of(np.concatenate(layers, axis=1).astype(np.float32), ["embed", "0", "1", "final"])
    found = table({"image": grams, "instruction": grams, "last": grams}, 0, "store")
    assert steps(found.filter(view="image", labels="true"))["a"].to_list() == ["0"]
    assert "from 0 to 1" in answer(found)
