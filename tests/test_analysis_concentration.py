"""Which tokens are read within l*: shares, ranks, words and parts of speech against plain loops."""

import numpy as np
import plain_analysis as plain
import polars as pl
import pytest
from attended_store import READ, attended_store

import store
from analysis import concentration
from analysis.config import Attended
from analysis.study import Study
from store.errors import Refusal

N = 40
DECISIVE = [0, 1, 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return attended_store(tmp_path_factory.mktemp("attended") / "store", N)


@pytest.fixture(scope="module")
def study(place, tmp_path_factory):
    return Study(Attended(place, tmp_path_factory.mktemp("out")))


@pytest.fixture(scope="module")
def expected(place, study):
    """Shares of the reported samples by plain loops."""
    whole = store.open(place).derived["attention-true-0"].values.astype(np.float64)
    at = [READ.index(layer) for layer in study.voted["l_star"].gather(study.reported)]
    return np.stack(
        [plain.token_shares(whole[s], DECISIVE, layer) for s, layer in zip(study.reported, at, strict=True)]
    )


def test_shares_within_l_star_are_those_of_plain_loops(study, expected):
    np.testing.assert_allclose(study.shares_nt, expected, rtol=1e-5)
    assert np.nansum(study.shares_nt, axis=1) == pytest.approx(np.ones(len(expected)), abs=1e-6)


def test_the_same_at_another_layer_is_another_layers(place, study):
    whole = store.open(place).derived["attention-true-0"].values.astype(np.float64)
    found = study.shares_of(study.reported, np.zeros(N, int))
    for share, s in zip(found, study.reported, strict=True):
        np.testing.assert_allclose(share, plain.token_shares(whole[s], DECISIVE, 0), rtol=1e-5)


def test_ranks_are_sorted_shares_of_those_samples_that_have_so_many_tokens(study, expected):
    found = concentration.ranked(study.shares_nt)
    ordered = [sorted((v for v in row if v == v), reverse=True) for row in expected]
    for row in found.iter_rows(named=True):
        values = [one[row["rank"] - 1] for one in ordered if len(one) >= row["rank"]]
        even = [1 / len(one) for one in ordered if len(one) >= row["rank"]]
        assert row["n"] == len(values)
        assert row["share"] == pytest.approx(np.mean(values), rel=1e-5) and row["even"] == pytest.approx(np.mean(even))
        assert row["low"] <= row["share"] + 1e-9 and row["share"] <= row["high"] + 1e-9
    assert found.height == max(map(len, ordered))


def test_the_most_read_words_are_in_order_with_what_they_are(study, expected):
    top = study.top(2)
    for n, s in enumerate(study.reported.tolist()):
        words = study.words.filter(pl.col("sample") == s)
        order = sorted(words["token"].to_list(), key=lambda t: (-expected[n][t], t))[:2]
        rows = top.filter(pl.col("sample") == s)
        assert rows["token"].to_list() == order and rows["rank"].to_list() == [0, 1]
        assert (rows["kind"] == "instruction").all()
        whole = sum(expected[n][t] for t in words["token"])
        assert rows["share"].to_list() == pytest.approx([expected[n][t] / whole for t in order], rel=1e-5)


def test_parts_of_speech_get_their_tokens_shares_beside_an_even_spread(study, expected):
    found = concentration.by_tag(study.shares_nt, study.reported, study.tokens)
    table = study.tokens
    for row in found.iter_rows(named=True):
        share, even, first = [], [], []
        for n, s in enumerate(study.reported.tolist()):
            own = table.filter(pl.col("sample") == s)
            of = own.filter(pl.col("tag") == row["tag"])["token"].to_list()
            share.append(sum(expected[n][t] for t in of))
            even.append(len(of) / own.height)
            first.append(int(np.nanargmax(expected[n])) in of)
        assert row["share"] == pytest.approx(np.mean(share), rel=1e-5) and row["even"] == pytest.approx(np.mean(even))
        assert row["first"] == pytest.approx(np.mean(first)) and row["n"] == len(share)
        assert row["excess"] == pytest.approx(np.mean(share) - np.mean(even), abs=1e-6)
    assert found["share"].sum() == pytest.approx(1, abs=1e-5)


def test_words_are_counted_where_they_are_first_and_where_they_stand(study):
    top = concentration.top(study.shares_nt, study.reported, study.tokens, 1)
    found = concentration.words(top, study.tokens)
    assert found["first"].sum() == len(study.reported)
    for row in found.iter_rows(named=True):
        spoken = study.tokens.with_columns(pl.col("word").fill_null(pl.col("text").str.replace_all("\n", "⏎")))
        assert row["n"] == spoken.filter(pl.col("word") == row["word"])["sample"].n_unique()
        assert row["rate"] == pytest.approx(row["first"] / row["n"])


def test_attention_that_was_summed_over_tokens_says_how_to_keep_them(place, tmp_path):
    study = Study(Attended(place, tmp_path, attention="attention-true-1"))
    with pytest.raises(Refusal, match=r"is summed over tokens: run .*--keep tokens"):
        _ = study.shares_nt


def test_a_sample_whose_words_have_no_mass_at_all_is_left_out_of_what_is_said_of_words(study):
    share_nt = study.shares_nt.copy()
    kinds = study.words.filter(pl.col("sample") == study.reported[0])
    share_nt[0, kinds["token"].to_numpy()] = 0  # as float16 rounds them
    spoken_nt = concentration.among(share_nt, study.reported, study.words)
    assert np.isnan(spoken_nt[0]).all() and not np.isnan(spoken_nt[1]).all()
    top = concentration.top(spoken_nt, study.reported, study.words, 1)
    assert study.reported[0] not in top["sample"].to_list() and top.height == len(study.reported) - 1
    tags = concentration.by_tag(spoken_nt[1:], study.reported[1:], study.words)
    assert tags["n"].unique().to_list() == [len(study.reported) - 1]
    assert tags["share"].sum() == pytest.approx(1, abs=1e-5)


def test_prompt_tokens_are_ranked_whole_and_image_tokens_are_not_among_them(study, expected, tmp_path):
    ranked = study.ranked_tokens(everyone=False)
    for n, s in enumerate(study.reported.tolist()):
        rows = ranked.filter(pl.col("sample") == s)
        assert rows["token"].to_list() == np.argsort(-expected[n], kind="stable")[: rows.height].tolist()
        assert rows["slot"].to_list() == rows["token"].to_list()  # the proxy read text, so both count alike
    everyone = study.ranked_tokens(everyone=True)
    assert everyone.filter(pl.col("sample").is_in(study.reported.tolist())).select(ranked.columns).equals(ranked)
    pictured = Study(Attended(attended_store(tmp_path / "store", 20, tokens="image"), tmp_path))
    assert pictured.ranked_tokens(everyone=False).is_empty()
