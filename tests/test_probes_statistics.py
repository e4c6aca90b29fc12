"""Intervals, tests and corrections: against plain calculations, and on made-up data whose truth is known."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes import statistics

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(np.array)


def test_a_draw_is_the_mean_of_the_images_that_it_took():
    values = np.random.default_rng(1).normal(size=(3, 40))
    drawn = statistics.mean_draws(values, draws=50, seed=4)
    weights = np.concatenate(list(statistics.image_weights(40, 50, seed=4)))
    for r, k in itertools.product(range(50), range(3)):
        taken = np.repeat(values[k], np.rint(weights[r] * 40).astype(int))
        assert len(taken) == 40
        assert drawn[r, k] == pytest.approx(taken.mean(), abs=1e-5)


def test_images_that_are_unknown_to_one_quantity_are_left_out_of_its_mean_alone():
    values = np.random.default_rng(1).normal(size=(2, 60))
    values[1, ::3] = np.nan
    drawn = statistics.mean_draws(values, draws=20)
    weights = np.concatenate(list(statistics.image_weights(60, 20)))
    known = ~np.isnan(values[1])
    np.testing.assert_allclose(drawn[:, 0], weights @ values[0], atol=1e-5)
    expected = (weights[:, known] @ values[1][known]) / weights[:, known].sum(1)
    np.testing.assert_allclose(drawn[:, 1], expected, atol=1e-5)
    assert statistics.means(values[:, None])[1] == pytest.approx(np.nanmean(values[1]))


def test_rows_of_one_image_are_drawn_together():
    rng = np.random.default_rng(2)
    clusters = rng.integers(0, 12, 50)
    values = rng.normal(size=(1, 50))
    drawn = statistics.mean_draws(values, clusters, draws=30)
    names = np.unique(clusters)
    weights = np.concatenate(list(statistics.image_weights(len(names), 30)))
    for r in range(30):
        counts = np.rint(weights[r] * len(names)).astype(int)
        rows = np.concatenate([np.flatnonzero(clusters == name) for name in np.repeat(names, counts)])
        assert drawn[r, 0] == pytest.approx(values[0, rows].mean(), abs=1e-5)


def test_twice_the_same_image_makes_no_interval_narrower():
    values = np.random.default_rng(3).normal(size=200)
    _, low, high = statistics.interval(values)
    _, low2, high2 = statistics.interval(np.tile(values, 2), np.tile(np.arange(200), 2))
    assert high2 - low2 == pytest.approx(high - low, rel=0.01)


def test_the_weights_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    whole = np.concatenate(list(statistics.image_weights(30, 100)))
    monkeypatch.setattr(statistics, "HELD", 300)
    pieces = list(statistics.image_weights(30, 100))
    assert len(pieces) == 10
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_resampled_seeds_show_the_variance_of_a_mean_of_seeds():
    values = np.random.default_rng(5).normal(size=5)
    drawn = statistics.seed_weights(5, 200_000) @ values
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.01)
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 5, rel=0.02)
    assert (statistics.seed_weights(1) == 1).all()


def test_a_paired_difference_is_narrower_than_the_values_it_is_made_of():
    rng = np.random.default_rng(6)
    scene = rng.normal(size=(1, 300))
    a, b = (scene + 0.1 * rng.normal(size=(3, 300)) + shift for shift in (0.5, 0.4))
    _, low, high = statistics.interval(a - b)
    assert 0 < low < 0.1 < high
    _, low_a, high_a = statistics.interval(a)
    assert high - low < (high_a - low_a) / 3


@pytest.mark.parametrize(("seed_sd", "seeds"), [(0.0, 1), (0.0, 5), (0.08, 5), (0.05, 10), (0.3, 3), (0.3, 5)])
def test_an_interval_covers_the_truth_about_as_often_as_it_says(seed_sd, seeds):
    rng = np.random.default_rng(7)
    trials, n = 400, 60
    image, seed = rng.normal(0, 0.5, (trials, 1, n)), rng.normal(0, seed_sd, (trials, seeds, 1))
    values = 0.3 + image + seed + rng.normal(0, 0.2, (trials, seeds, n))
    low, high = statistics.ends(statistics.hierarchical_draws(values, draws=1000))
    covered = ((low <= 0.3) & (high >= 0.3)).mean()
    assert 0.90 <= covered <= 0.99


def test_students_quantiles_are_those_of_the_tables():
    for freedom, quantile in (
        (1, 12.706),
        (1.5, 6.017),
        (2, 4.303),
        (3.5, 2.940),
        (7, 2.365),
        (20, 2.086),
        (1e9, 1.960),
    ):
        assert statistics.student(np.array([freedom]))[0] == pytest.approx(quantile, rel=0.01)


def test_seeds_that_agree_leave_the_interval_to_the_images():
    values = np.random.default_rng(8).normal(size=300)
    one, five = (statistics.interval(np.tile(values, (seeds, 1))) for seeds in (1, 5))
    assert five == pytest.approx(one, abs=1e-3)


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(8)
    values = rng.normal(0, 0.2, (5, 200))
    _, low, high = statistics.interval(values)
    _, low2, high2 = statistics.interval(values + np.array([-0.3, -0.1, 0, 0.1, 0.3])[:, None])
    assert high2 - low2 > 3 * (high - low)


def test_a_sign_flip_test_counts_all_flips_of_a_small_sample():
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.25, -0.05])
    flips = np.array(list(itertools.product([-1, 1], repeat=6)))
    exact = (np.abs(flips @ differences) >= np.abs(differences.sum()) - 1e-12).mean()
    assert statistics.sign_flip(differences[None], flips=40_000)[0] == pytest.approx(exact, abs=0.01)


def test_p_is_uniform_where_there_is_no_difference_and_small_where_there_is():
    rng = np.random.default_rng(9)
    p = np.sort(statistics.sign_flip(rng.standard_t(4, (500, 80)), flips=1999))
    assert np.abs(p - (np.arange(500) + 0.5) / 500).max() < 1.63 / np.sqrt(500)  # Kolmogorov–Smirnov at 1 %
    assert statistics.sign_flip(rng.normal(0.5, 1, (1, 200)))[0] == 1 / (statistics.FLIPS + 1)
    assert statistics.sign_flip(np.zeros((1, 9)))[0] == 1


def test_seeds_p_is_that_of_students_t_where_seeds_alone_differ():
    # Rows of the t table: degrees of freedom, t, two-sided p.
    for seeds, t, p in ((2, 12.706, 0.05), (3, 9.925, 0.01), (5, 2.132, 0.1), (5, 8.610, 0.001), (11, 2.228, 0.05)):
        means = np.random.default_rng(0).normal(size=seeds)
        means = (means - means.mean()) / means.std(ddof=1) * np.sqrt(seeds) + t
        drawn = np.tile(means.astype(np.float32), (20_000, 1, 1))
        assert statistics.seeds_p(drawn)[0] == pytest.approx(p, rel=0.15)


def test_seeds_p_and_the_interval_agree():
    rng = np.random.default_rng(9)
    values = rng.normal(0, 0.2, (200, 4, 1)) + rng.normal(0.2, 0.5, (200, 4, 60))
    drawn = statistics.mean_draws(values.reshape(800, 60)).reshape(-1, 200, 4)
    low, high = statistics.ends(statistics.over_seeds(drawn))
    outside = (low > 0) | (high < 0)
    assert 0.2 < outside.mean() < 0.9
    assert ((statistics.seeds_p(drawn) < 0.05) == outside).mean() > 0.9


@pytest.mark.parametrize("seeds", [3, 5])
def test_seeds_luck_alone_is_seldom_called_a_difference(seeds):
    rng = np.random.default_rng(12)
    differences = rng.normal(0, 0.1, (600, seeds, 1)) + rng.normal(0, 0.3, (600, 1, 200))
    assert (statistics.sign_flip(differences.mean(1), flips=999) < 0.05).mean() > 0.2  # it tests images alone
    drawn = statistics.mean_draws(differences.reshape(-1, 200), draws=1000).reshape(-1, 600, seeds)
    p = statistics.seeds_p(drawn)
    assert (p < 0.05).mean() < 0.08
    assert (p < 0.005).mean() < 0.04


@given(p_values)
def test_holm_is_what_its_steps_say(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    expected, worst = np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, p[i] * (len(p) - rank)))
        expected[i] = worst
    np.testing.assert_allclose(statistics.holm(p), expected)


@given(p_values)
def test_benjamini_hochberg_is_what_its_definition_says(p):
    ranked = np.sort(p)
    expected = [min(1.0, min(ranked[j] * len(p) / (j + 1) for j in range(len(p)) if ranked[j] >= value)) for value in p]
    np.testing.assert_allclose(statistics.benjamini_hochberg(p), expected)


def test_benjamini_hochberg_keeps_false_finds_to_their_share():
    rng = np.random.default_rng(10)
    shares = []
    for _ in range(200):
        p = np.concatenate([rng.uniform(size=80), rng.beta(0.05, 5, 20)])
        found = statistics.benjamini_hochberg(p) < 0.05
        shares.append(found[:80].sum() / max(found.sum(), 1))
    assert np.mean(shares) < 0.06


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_wilson_interval_holds_its_share_and_solves_the_score_equation(case):
    hits, n = case
    low, high = statistics.wilson(hits / n, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert (hits / n - end) ** 2 == pytest.approx(statistics.Z**2 * end * (1 - end) / n, abs=1e-9)


def test_a_hundred_probes_of_five_seeds_take_seconds():
    values = np.random.default_rng(11).random((100, 5, 1040), np.float32)
    start = time.process_time()
    statistics.ends(statistics.hierarchical_draws(values))
    assert time.process_time() - start < 20  # 1 to 2 s on an idle core
