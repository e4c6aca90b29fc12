"""Decisive heads, the vote on l* and how firm it is: against plain loops, and where nothing is to be found."""

import shutil
from pathlib import Path

import numpy as np
import plain_analysis as plain
import polars as pl
import pytest
from attended_store import ASIDE, HEADS, READ, attended_store
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from analysis import heads, layers
from analysis.attention import choose, mass
from analysis.config import Attended
from analysis.study import Study
from store.errors import Refusal

N = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return attended_store(tmp_path_factory.mktemp("attended") / "store", N)


@pytest.fixture(scope="module")
def study(place, tmp_path_factory):
    return Study(Attended(place, tmp_path_factory.mktemp("out")))


@pytest.fixture(scope="module")
def masses(place):
    return mass(place).values.astype(np.float64)


def members(split):
    return [s for s in range(N) if s not in ASIDE and (s % 3 == 0) == (split == "test")]


def test_drops_and_ranks_are_those_of_plain_loops_on_each_split(study, masses):
    found = study.decisive(study.chosen.main)
    for part, split in enumerate(("train", "test")):
        np.testing.assert_allclose(found.drop_ph[part], plain.drops(masses, members(split)), rtol=1e-5)
    rows = heads.ranked_rows(study.census(study.chosen.main), found)
    expected = plain.ranked(masses, members("test")).mean(1)
    np.testing.assert_allclose(rows["mass"].to_numpy().reshape(len(HEADS), -1), expected, rtol=1e-5)


def test_the_threshold_is_chosen_on_one_split_and_reported_on_the_other(study, masses):
    found = study.decisive(study.chosen.main)
    assert found.threshold == pytest.approx(plain.otsu(plain.drops(masses, members("train"))), rel=1e-5)
    assert found.decisive_h.tolist() == [True] * 3 + [False] * 3 == found.stable_h.tolist()
    table = heads.table(study.census(study.chosen.main), found, study.reported)
    assert set(table["head"][:3]) == set(HEADS[:3]) and table["n"].unique().to_list() == [len(members("test"))]
    assert set(table["layer"][:3]) == {"2"}
    assert (table["low"] <= table["drop"]).all() and (table["drop"] <= table["high"]).all()
    for row in table.iter_rows(named=True):
        h = HEADS.index(row["head"])
        assert row["mass"] == pytest.approx(masses[members("test"), h].mean((0, 1)).max(), rel=1e-5)


@given(st.lists(st.floats(0, 1).map(lambda v: round(v, 3)), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_otsu_parts_values_where_the_variance_within_is_least(values):
    threshold = heads.otsu(np.array(values))
    if len(set(values)) == 1:
        assert threshold <= values[0]
        return
    groups = [[v for v in values if (v > threshold) == above] for above in (False, True)]
    within = sum(np.var(group) * len(group) for group in groups)
    best = plain.otsu(values)
    least = sum(
        np.var(group) * len(group) for group in ([v for v in values if v <= best], [v for v in values if v > best])
    )
    assert all(groups) and within == pytest.approx(least, abs=1e-9)


def test_the_vote_its_ties_and_its_entropy_are_those_of_plain_loops(study, masses):
    voted = study.voted
    for s in range(N):
        row = voted.row(s, named=True)
        if s in ASIDE:
            assert (row["l_star"], row["votes"], row["entropy"]) == (None, None, None)
            continue
        winner, most, tied, entropy = plain.vote(masses[s], [0, 1, 2])
        assert (row["l_star"], row["votes"], row["tied"], row["heads"]) == (READ[winner], most, tied, 3)
        assert row["entropy"] == pytest.approx(entropy, abs=1e-6)
    assert voted["sample_id"].to_list() == [f"scene-{s}" for s in range(N)]
    assert voted.filter(pl.col("part") == "report")["sample"].to_list() == [s for s in range(N) if s % 3 == 0]


@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 4), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_kappa_is_cohens_mean_over_pairs(seed, n, voters, n_layers):
    codes_kn = np.random.default_rng(seed).integers(0, n_layers, (voters, n))
    found = layers.kappa(codes_kn, n_layers)[0]
    pairs = [(a, b) for a in range(voters) for b in range(a + 1, voters)]
    known = [(a, b) for a, b in pairs if len({*codes_kn[a]} | {*codes_kn[b]}) > 1]
    if not known:
        assert np.isnan(found)
        return
    assert found == pytest.approx(np.mean([plain.kappa(codes_kn[a], codes_kn[b]) for a, b in known]), abs=1e-9)


def test_voters_that_agree_have_kappa_1_and_voters_by_lot_0_within_the_interval():
    codes_n = np.random.default_rng(0).integers(0, 4, 500)
    assert layers.kappa(np.stack([codes_n, codes_n]), 4) == pytest.approx((1, 1, 1))
    whole, low, high = layers.kappa(np.random.default_rng(1).integers(0, 4, (3, 500)), 4)
    assert low < 0 < high and low < whole < high
    assert all(np.isnan(layers.kappa(np.zeros((2, 9), int), 4)))
    assert all(np.isnan(layers.kappa(codes_n[None], 4)))


def test_shares_of_the_vote_are_counts_with_intervals():
    codes_n = np.array([0, 0, 0, 2, 2, 1, 0, 0])
    found = layers.shares(codes_n, ["a", "b", "c", "d"])
    assert found["share"].to_list() == [5 / 8, 1 / 8, 2 / 8, 0]
    assert found["even"].unique().to_list() == [0.25] and found["n"].unique().to_list() == [8]
    assert ((found["low"] <= found["share"]) & (found["share"] <= found["high"])).all()


def test_the_map_of_heads_and_layers_has_masses_and_false_discovery_rates(study, masses):
    cells = heads.layer_map(study.census(study.chosen.main), study.reported)
    expected = masses[members("test")].mean((0, 2))
    np.testing.assert_allclose(cells["mass"].to_numpy().reshape(len(HEADS), -1), expected, rtol=1e-5)
    planted = cells.filter(pl.col("layer") == "2", pl.col("head").is_in(HEADS[:3]))
    assert (planted["q"] < 0.05).all() and (planted["low"] > planted["even"]).all()


def test_one_layer_has_no_second_rank_and_no_head_above_a_threshold_is_refused(study):
    assert heads.drops(np.ones((2, 3, 4, 1))).tolist() == [[0] * 3] * 2
    with pytest.raises(Refusal, match=r"--threshold 0.99: no head is decisive; the largest drop is 0\.\d+, of head"):
        heads.find(study.census(study.chosen.main), 0.99)


def test_splits_that_are_not_there_are_refused_with_those_there_are(place, tmp_path):
    with pytest.raises(Refusal, match=r"--choose dev: .* has no such split; it has test, train"):
        _ = Study(Attended(place, tmp_path, choose="dev")).parts_s
    with pytest.raises(Refusal, match="--choose and --report are both test"):
        Attended(place, choose="test")
    with pytest.raises(Refusal, match=r"--threshold 1\.5"):
        Attended(place, threshold=1.5)


def test_splits_of_which_no_sample_has_attention_are_refused(tmp_path):
    lonely = attended_store(tmp_path / "lonely", 6, seed=3)
    study = Study(Attended(lonely, tmp_path))
    study.parts_s = np.where(study.parts_s == 1, -1, study.parts_s)
    with pytest.raises(Refusal, match="--report names a split of which no sample has attention"):
        study.decisive(study.chosen.main)


def test_a_torn_or_lost_shard_is_refused_and_verify_named(place, tmp_path):
    copied = Path(shutil.copytree(place, tmp_path / "store"))
    (shard,) = (copied / "derived/attention-true-0").rglob("c/0/*/*/*/*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2 - 400) + whole[-400:])
    with pytest.raises(Refusal, match=r"derived/attention-true-0 of .*(cannot be read|lost).*store verify"):
        Study(Attended(str(copied), tmp_path)).decisive(choose(store.open(copied)).main)
    shard.unlink()
    with pytest.raises(Refusal, match=r"has the attention of 0 samples and was written for 38.*verify"):
        Study(Attended(str(copied), tmp_path)).decisive(choose(store.open(copied)).main)
