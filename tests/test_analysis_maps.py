"""Maps at l*: whose rows they are, how they are scored against the true box, and what they are compared with."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from looking import BLOCKS, LOOKING, Looking, top_words, votes_for

import store
from analysis.maps import rows as rows_module
from analysis.maps import scores as maps_module
from analysis.maps.figure import chosen, draw
from analysis.maps.rollout import rollout
from analysis.maps.scores import ALL, CONTRAST, LAST, OBJECT, OTHERS, RANDOM, ROLLOUT, ROLLOUT_STAR, STAR, Boxes, maps
from analysis.maps.tables import CHANCE, by_layer, by_stratum, comparisons, finding
from probes.statistics import holm, interval, sign_flip
from store.errors import Refusal
from store.synthetic import synthetic_plan, synthetic_store


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return Looking().write(tmp_path_factory.mktemp("maps") / "s.zarr")


@pytest.fixture(scope="module")
def found(opened):
    return mapped(opened)


def mapped(opened, **changes):
    n = opened.samples.height
    given = {"votes": votes_for(opened), "top": top_words(opened), "samples": np.arange(n), "tokens": 2} | changes
    return maps(opened, **given)


def plain_rows(opened, sample, first):
    """Rows of one sample by the lazy arrays, heads averaged: (block, query, image token), instruction's from first."""
    row = opened.samples.row(sample, named=True)
    lazy = opened.attention.text_to_image[sample]
    lazy = lazy.mean("head") if "head" in lazy.dims else lazy
    return lazy.values[:, first : row["n_query"], : row["n_image"]].astype(float)


def plain_scores(row, cells, map_t):
    """Pointing and energy of one map, in loops."""
    share = [0.0 if np.isnan(cell).any() else mass for mass, cell in zip(map_t, cells, strict=True)]
    share = np.array(share) / np.sum(share)
    energy, hits, peaks = 0.0, 0, 0
    for mass, (x1, y1, x2, y2) in zip(share, cells, strict=True):
        if np.isnan(x1):
            continue
        wide = max(0.0, min(x2, row["x2"]) - max(x1, row["x1"]))
        high = max(0.0, min(y2, row["y2"]) - max(y1, row["y1"]))
        energy += mass * wide * high / ((x2 - x1) * (y2 - y1))
        if mass == share.max():
            peaks += 1
            inside = row["x1"] <= (x1 + x2) / 2 <= row["x2"] and row["y1"] <= (y1 + y2) / 2 <= row["y2"]
            hits += inside
    return hits / peaks, energy


def cells_of(opened, sample):
    tokens = opened.tokens.filter(pl.col("sample") == sample, pl.col("kind") == "image").sort("slot").collect()
    return tokens.select("px1", "py1", "px2", "py2").to_numpy().astype(float)


# What is scored


@pytest.mark.parametrize("changes", [{}, {"heads": 3}, {"queries": "prompt"}, {"unseen": {0: 1, 3: 2}}])
def test_every_block_is_scored_as_a_plain_loop_scores_it(tmp_path, changes):
    opened = Looking(**changes).write(tmp_path / "s.zarr")
    found = mapped(opened)
    first = 2 if changes.get("queries") == "prompt" else 0
    for sample in range(opened.samples.height):
        rows = plain_rows(opened, sample, first)
        for layer in range(len(BLOCKS)):
            wanted = plain_scores(
                opened.samples.row(sample, named=True), cells_of(opened, sample), (rows[layer, 1] + rows[layer, 2]) / 2
            )
            np.testing.assert_allclose(found.layers_mln[:, layer, sample], wanted, atol=1e-6)


def test_words_that_look_at_the_object_in_one_block_point_at_it_there(found):
    assert found.scores[STAR][0].mean() == 1
    assert found.scores[STAR][1].mean() > 0.55
    assert found.layers_mln[0].mean(1)[BLOCKS.index(LOOKING)] == 1
    assert found.scores[OTHERS][0].mean() < 0.6
    assert found.scores[RANDOM][0].mean() < 0.6


def test_each_condition_reads_the_rows_that_it_names(opened, found):
    for sample in range(opened.samples.height):
        row, cells = opened.samples.row(sample, named=True), cells_of(opened, sample)
        rows = plain_rows(opened, sample, 0)
        top_lt = rows[:, 1:3].mean(1)
        text = opened.attention.text_to_text[sample].values[:, : row["n_query"], : row["n_text"]].astype(np.float32)
        slots = np.arange(row["n_query"]) + 2
        rolled = rollout(rows[None].astype(np.float32), text[None], slots[None])[0, :, 1:3].mean(1)
        wanted = {
            STAR: top_lt[1],
            LAST: top_lt[-1],
            ALL: rows[1].mean(0),
            CONTRAST: top_lt[1] / rows[1].mean(0),
            ROLLOUT: rolled[-1],
            ROLLOUT_STAR: rolled[1],
        }
        for name, map_t in wanted.items():
            np.testing.assert_allclose(
                found.scores[name][:, sample], plain_scores(row, cells, map_t), atol=1e-4, err_msg=name
            )
        others = np.mean([plain_scores(row, cells, top_lt[layer]) for layer in (0, 2)], axis=0)
        np.testing.assert_allclose(found.scores[OTHERS][:, sample], others, atol=1e-5)


def test_random_tokens_are_as_many_others_of_the_instruction(tmp_path):
    opened = Looking(queries="prompt").write(tmp_path / "s.zarr")
    for rows in rows_module.read_rows(opened, np.arange(12)):
        own_sq, _ = maps_module.top_queries(rows, top_words(opened), 2)
        drawn_sq = maps_module.other_queries(rows, own_sq, seed=0)
        assert not (drawn_sq & own_sq).any()
        assert not (drawn_sq & ~rows.instruction_sq).any()
        assert (drawn_sq.sum(1) == 2).all()


def test_a_uniform_map_scores_what_is_called_chance(opened, found):
    for sample in range(opened.samples.height):
        row, cells = opened.samples.row(sample, named=True), cells_of(opened, sample)
        np.testing.assert_allclose(found.chance_mn[:, sample], plain_scores(row, cells, np.ones(len(cells))), atol=1e-6)


def test_strongest_tokens_that_tie_share_the_point():
    cells = np.array([[[0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10], [30, 0, 40, 10.0]]])
    boxes = Boxes(cells, np.array([[0, 0, 20, 10.0]]))
    np.testing.assert_allclose(boxes.scores(np.array([[[0.4, 0.1, 0.4, 0.1]]]))[:, 0, 0], [0.5, 0.5])
    np.testing.assert_allclose(boxes.scores(np.array([[[0.2, 0.2, 0.2, 0.2]]]))[:, 0, 0], [0.5, 0.5])


def test_energy_counts_the_share_of_a_token_that_the_box_covers():
    boxes = Boxes(np.array([[[0, 0, 10, 10], [10, 0, 20, 10.0]]]), np.array([[5, 0, 12, 5.0]]))
    assert boxes.scores(np.array([[[0.6, 0.4]]]))[1, 0, 0] == pytest.approx(0.6 * 0.25 + 0.4 * 0.1)


def test_a_map_without_mass_is_unknown_and_not_a_miss():
    boxes = Boxes(np.array([[[0, 0, 10, 10], [10, 0, 20, 10.0]]]), np.array([[0, 0, 10, 10.0]]))
    assert np.isnan(boxes.scores(np.zeros((1, 1, 2)))).all()


def test_the_map_is_that_of_l_star_and_sums_to_one(opened, found):
    rows = plain_rows(opened, 5, 0)
    wanted = rows[1, 1:3].mean(0)
    np.testing.assert_allclose(found.map_nt[5, : len(wanted)], wanted / wanted.sum(), atol=1e-6)
    assert np.isnan(found.map_nt[5, len(wanted) :]).all()


def test_words_are_told_by_rank_and_boxes_of_tokens_are_in_pixels(opened, found):
    assert found.samples["words"].to_list() == [["w1", "w2"]] * 12
    np.testing.assert_allclose(found.pixels_nt4[7, : len(cells_of(opened, 7))], cells_of(opened, 7))


def test_a_peak_on_any_object_by_lot_is_one_over_their_number(tmp_path):
    class Counted(Looking):
        def table(self):
            return super().table().with_columns(n_objects=pl.Series([4, None] * 6, dtype=pl.Int64))

    found = mapped(Counted().write(tmp_path / "s.zarr"))
    np.testing.assert_array_equal(found.scores[OBJECT][0], [0.25, np.nan] * 6)
    row = comparisons(found).filter(pl.col("condition") == OBJECT, pl.col("metric") == "pointing")
    assert row["pairs"][0] == 6
    assert row["difference"][0] == pytest.approx(0.75)


# What is left out, and said


def test_what_cannot_be_scored_is_left_out_and_counted(tmp_path):
    opened = Looking(boxless=(1,), aside=(2,)).write(tmp_path / "s.zarr")
    votes = votes_for(opened).with_columns(
        l_star=pl.when(pl.col("sample") == 3).then(None).when(pl.col("sample") == 4).then(pl.lit("final"))
        .otherwise("l_star")
    )  # fmt: skip
    top = top_words(opened).filter(pl.col("sample") != 5)
    found = mapped(opened, votes=votes, top=top)
    assert found.samples["sample"].to_list() == [0, 6, 7, 8, 9, 10, 11]
    assert found.left_out == {
        "not valid": 1,
        "no true box": 1,
        "no vote for a layer": 1,
        "no rows at the layer voted for": 1,
        "no dominant tokens": 1,
    }
    assert "no true box (1)" in " ".join(finding(found, opened.samples).caveats)


def test_a_template_token_has_a_row_only_where_the_prompts_are_kept_else_the_next_takes_its_place(tmp_path):
    for queries, skipped, words in (("instruction", 12, ["w1", "w2"]), ("prompt", 0, ["w-1", "w1"])):
        opened = Looking(queries=queries).write(tmp_path / queries)
        found = mapped(opened, top=top_words(opened, (-1, 1, 2, 0)))
        assert found.skipped == skipped
        assert found.samples["words"].to_list() == [words] * 12


def test_a_sample_whose_dominant_tokens_all_lack_rows_is_left_out(opened):
    top = top_words(opened).with_columns(slot=pl.when(pl.col("sample") == 0).then(0).otherwise("slot"))
    found = mapped(opened, top=top)
    assert found.left_out == {"no dominant token with a row": 1}
    assert found.samples["sample"].to_list() == list(range(1, 12))


def test_blocks_that_were_added_for_some_samples_are_unknown_for_the_others(tmp_path):
    made = Looking(blocks=("0", "1"))
    made.write(tmp_path / "s.zarr")
    more = dataclasses.replace(made, blocks=BLOCKS)
    store.grow(tmp_path / "s.zarr", more.plan)
    more.fill(tmp_path / "s.zarr", part=1, blocks=[0, 2])
    opened = store.open(tmp_path / "s.zarr")
    found = mapped(opened)
    assert found.layers == BLOCKS
    np.testing.assert_array_equal(np.isnan(found.scores[LAST][0]), [False] * 4 + [True] * 4 + [False] * 4)
    row = comparisons(found).filter(pl.col("condition") == LAST).row(0, named=True)
    assert (row["n"], row["pairs"]) == (8, 8)
    rows = plain_rows(opened, 9, 0)
    wanted = plain_scores(opened.samples.row(9, named=True), cells_of(opened, 9), rows[2, 1:3].mean(0))
    np.testing.assert_allclose(found.scores[LAST][:, 9], wanted, atol=1e-6)
    late = mapped(opened, votes=votes_for(opened, "2"))
    assert late.left_out == {"no rows, no mass or no token boxes at l*": 4}


def test_a_store_with_one_block_has_no_other_block_and_still_an_answer(tmp_path):
    opened = Looking(blocks=("1",)).write(tmp_path / "s.zarr")
    found = mapped(opened)
    assert np.isnan(found.scores[OTHERS]).all()
    assert OTHERS not in comparisons(found)["condition"]
    told = finding(found, opened.samples)
    assert "100.0%" in told.answer
    assert any("No rollout" in caveat for caveat in told.caveats)


def test_a_store_without_the_texts_rows_has_no_rollout(tmp_path):
    assert ROLLOUT not in mapped(Looking(text_rows=False).write(tmp_path / "s.zarr")).scores


def test_one_sample_is_answered(opened):
    told = finding(mapped(opened, samples=np.array([3])), opened.samples)
    assert "of 1 pictures" in told.answer


def test_nothing_to_score_is_refused_with_the_reasons(opened):
    with pytest.raises(Refusal, match=r"no vote for a layer \(12\)"):
        mapped(opened, votes=votes_for(opened).with_columns(l_star=pl.lit(None, pl.String)))


def test_a_store_without_rows_is_refused(tmp_path):
    opened = store.open(synthetic_store(tmp_path / "s.zarr", synthetic_plan(8)))
    with pytest.raises(Refusal, match="keeps no attention rows"):
        maps(opened, votes_for(opened, "0"), top_words(opened), samples=np.arange(8))


# Reading


def test_batches_do_not_matter(opened, found, monkeypatch):
    monkeypatch.setattr(rows_module, "BATCH_BYTES", 1)
    again = mapped(opened)
    for name, values_mn in found.scores.items():
        np.testing.assert_allclose(again.scores[name], values_mn, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(again.map_nt, found.map_nt, atol=1e-6)


def test_the_same_call_gives_the_same_bits(opened, found):
    again = mapped(opened)
    for name, values_mn in found.scores.items():
        np.testing.assert_array_equal(again.scores[name], values_mn)
    assert comparisons(again).equals(comparisons(found))


def test_too_many_samples_are_drawn_by_the_seed_and_said(opened, monkeypatch):
    monkeypatch.setattr(maps_module, "MOST", 5)
    few = mapped(opened, seed=1)
    assert few.samples.height == 5
    assert few.samples["sample"].to_list() == mapped(opened, seed=1).samples["sample"].to_list()
    assert few.samples["sample"].to_list() != mapped(opened, seed=2).samples["sample"].to_list()
    assert "5 of 12 samples were drawn by seed 1." in finding(few, opened.samples).caveats


# Statistics


def test_comparisons_are_paired_means_with_intervals_and_holm(found):
    rows = comparisons(found)
    star_n, last_n = found.scores[STAR][1], found.scores[LAST][1]
    row = rows.filter(pl.col("condition") == LAST, pl.col("metric") == "energy").row(0, named=True)
    np.testing.assert_allclose([row[name] for name in ("value", "low", "high")], interval(last_n), atol=1e-6)
    apart = [row[name] for name in ("difference", "difference_low", "difference_high")]
    np.testing.assert_allclose(apart, interval(star_n - last_n), atol=1e-6)
    assert row["p"] == sign_flip((star_n - last_n)[None])[0]
    assert row["ratio"] == pytest.approx(last_n.mean() / found.chance_mn[1].mean())
    others = rows.filter(pl.col("p").is_not_null())
    assert set(others["condition"]) == {*found.scores, CHANCE} - {STAR}
    np.testing.assert_allclose(others["p_holm"], holm(others["p"].to_numpy()))


def test_samples_of_one_picture_are_drawn_together(found):
    twins = found.samples.with_columns(image=pl.Series([f"p{i // 2}" for i in range(12)]))
    rows = comparisons(dataclasses.replace(found, samples=twins))
    wanted = interval(found.scores[LAST][1], np.arange(12) // 2)
    row = rows.filter(pl.col("condition") == LAST, pl.col("metric") == "energy").row(0, named=True)
    np.testing.assert_allclose([row[name] for name in ("value", "low", "high")], wanted, atol=1e-6)


def test_blocks_stand_in_order_with_their_scores(found):
    rows = by_layer(found).filter(pl.col("metric") == "pointing")
    assert rows["layer"].to_list() == list(BLOCKS)
    np.testing.assert_allclose(rows["value"], found.layers_mln[0].mean(1))
    assert rows["difference"][BLOCKS.index(LOOKING)] == 0


def test_strata_are_those_of_twenty_pictures_or_more(tmp_path):
    opened = Looking(n=66).write(tmp_path / "s.zarr")
    found = mapped(opened)
    rows = by_stratum(found, opened.samples)
    swap = rows.filter(pl.col("stratum") == "task: swap", pl.col("metric") == "energy").row(0, named=True)
    assert swap["n"] == 33
    assert swap["value"] == pytest.approx(found.scores[STAR][1][::2].mean())
    assert swap["chance"] == pytest.approx(found.chance_mn[1][::2].mean())
    assert rows.filter(pl.col("stratum").str.starts_with("area: "))["n"].sum() == 2 * 66


def test_the_answer_says_what_did_not_hold(opened, found):
    told = finding(found, opened.samples)
    assert "100.0% [100.0%, 100.0%] of 12 pictures" in told.answer
    swapped = dataclasses.replace(found, scores={**found.scores, STAR: found.scores[LAST], LAST: found.scores[STAR]})
    assert "behind the last block" in finding(swapped, opened.samples).answer


# The figure


def test_examples_are_hits_and_misses_in_their_proportion(found):
    pointing_n = np.array([1.0] * 9 + [0.0] * 3)
    half = dataclasses.replace(found, scores={STAR: np.stack([pointing_n, pointing_n])})
    picked = chosen(half, 8, seed=0)
    assert (pointing_n[picked] == 1).sum() == 6
    assert len(set(picked)) == 8
    assert picked == chosen(half, 8, seed=0)
    assert len(chosen(half, 100, seed=0)) == 12
    rare = dataclasses.replace(found, scores={STAR: np.repeat([[0.0] * 10 + [1.0] * 2], 2, axis=0)})
    assert sorted(chosen(rare, 4, seed=0))[-2:] == [10, 11]


def test_the_figure_is_drawn_without_pictures_and_says_so(opened, found, tmp_path):
    told = finding(found, opened.samples)
    paths, drawn = draw(found, told.tables, None, tmp_path, {"store": "s"}, examples=3)
    assert [path.suffix for path in paths] == [".png", ".svg", ".csv", ".json"]
    assert all(path.stat().st_size for path in paths)
    assert "no pictures at hand" in drawn.caption
