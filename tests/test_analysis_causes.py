"""Is attention cause? Masks on planted stores, against loops, and what is said of them."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from planted_store import QUICK, Planted, alone

import probes
import store
from analysis.causes import words as causes_words
from analysis.causes.masking import LABELS, askable, finding, masking, mean_box
from analysis.causes.masks import CONTROLS, CROSSED, KEPT, LAYER, NOTHING, TOKEN, WORD, Prompt, masks_of, overlaps
from analysis.causes.paired import corrected, differences, summary
from analysis.causes.retrained import (
    FULL,
    OTHER,
    OTHERS,
    RANDOM,
    TOKENS,
    TOP,
    VOTED,
    modal,
    others_of,
    retrain,
    retrained,
    role_of,
    write_masks,
)
from analysis.config import CausesConfig
from analysis.proxies import proxy_of
from probes.boxes import iou
from probes.sweep import train
from probes.targets import unit_boxes
from store.errors import Refusal

READ = ("0", "1", "2")
LEARNED = dict(QUICK, width=32, heads=4, lr=1e-2, steps=140, warm_up=20, l1_steps=50, batch=32, watch_every=140)


def spoken(place, samples=None, rank=(1, 2, 0)):
    """Votes for layer 1 and a ranking of the slots of every sample."""
    counts = store.open(place).plan.samples["n_text"].to_list()
    rows = range(len(counts)) if samples is None else samples
    votes = pl.DataFrame({"sample": list(rows), "l_star": "1"})
    top = [{"sample": s, "rank": r, "slot": slot} for s in rows for r, slot in enumerate(rank) if slot < counts[s]]
    return votes, pl.DataFrame(top)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store that spells the box at layer 1 only, in every token of the instruction."""
    return Planted(n=240).write(tmp_path_factory.mktemp("store") / "s.zarr")


@pytest.fixture(scope="module")
def proxies(place, tmp_path_factory):
    """Two seeds of a proxy of three layers' prompt tokens that finds the box."""
    out = tmp_path_factory.mktemp("runs") / "joint"
    train(dataclasses.replace(alone(place, out, *READ, tokens="text"), **LEARNED))
    return [probes.load(out / "proxies" / f"joint-0+1+2-text-seed{seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def found(place, proxies):
    opened = store.open(place)
    votes, top = spoken(place)
    return masking(opened, proxies, votes, top, askable(opened, proxies[0], "test", 60, 0), draws=4)


def said(tables, name, **more):
    return tables["values"].filter(masked=name, metric="iou", **more).row(0, named=True)


def test_masking_the_layer_that_holds_the_box_destroys_it_and_another_does_not(found):
    whole, floor = said(found, NOTHING)["value"], said(found, "floor")["value"]
    assert whole > floor + 0.15
    assert said(found, LAYER)["value"] < floor + 0.1
    assert said(found, "another layer")["value"] > whole - 0.05
    against = found["comparisons"].filter(treatment=LAYER, against="another layer", metric="iou").row(0, named=True)
    assert against["high"] < 0 and against["p_holm"] < 0.05
    curve = found["layers"].filter(metric="iou")
    assert curve["layer"].to_list() == list(READ) and curve["votes"].to_list() == [0, 1, 0]
    assert curve["difference"].arg_min() == 1


def test_the_layer_that_holds_the_box_is_enough_and_another_is_not(found):
    whole, floor = said(found, NOTHING)["value"], said(found, "floor")["value"]
    assert said(found, KEPT)["value"] > whole - 0.1
    assert said(found, "all but another layer")["value"] < floor + 0.1


def test_one_token_of_many_that_say_the_same_is_not_needed(found):
    assert said(found, TOKEN)["value"] > said(found, NOTHING)["value"] - 0.1
    assert said(found, CROSSED)["n"] == 60


def test_masks_close_what_their_names_say(place, proxies):
    """Every mask against loops over samples, layers and tokens."""
    opened, (votes, top) = store.open(place), spoken(place, rank=(0, 2, 1))
    samples = np.array([3, 8, 17, 30])
    prompt = Prompt.of(opened, "text", samples)
    counts = opened.plan.samples["n_text"].to_numpy()[samples]
    by_name = {}
    for mask in masks_of(proxies[0], prompt, votes, top, [0, 1], 0):
        by_name.setdefault(mask.name, []).append(mask.layers_nl[:, :, None] & mask.tokens_nt[:, None])
    assert {name: len(own) for name, own in by_name.items() if len(own) > 1} == {
        name: 2 for name in (*CONTROLS.values(),) if name != CONTROLS[LAYER]
    }
    for n, count in enumerate(counts):
        closed = {name: [m[n, :, :count] for m in own] for name, own in by_name.items()}
        assert not closed[NOTHING][0].any()
        for k, layer in enumerate(READ):
            assert np.argwhere(closed[f"layer {layer}"][0].all(1)).ravel().tolist() == [k]
        assert closed[KEPT][0].all(1).tolist() == [True, False, True]
        token = np.zeros((3, count), bool)
        token[:, 0] = True  # slot 0 is a token of the template
        assert (closed[TOKEN][0] == token).all()
        token[[0, 2]] = False
        assert (closed[CROSSED][0] == token).all()
        for draw in (0, 1):
            kept = np.flatnonzero(~closed[CONTROLS[KEPT]][draw].any(1))
            assert kept.size == 1 and kept[0] != 1
            other = closed[CONTROLS[TOKEN]][draw]
            assert (other == other[0]).all() and other[0].sum() == 1 and not other[0, 0]
            assert (closed[CONTROLS[CROSSED]][draw][1] == other[0]).all()


def test_a_word_is_all_its_tokens_and_others_are_as_many(tmp_path):
    """The top word is the instruction's first by rank, whatever stands before it; each draw differs."""
    slot = np.arange(6)[None].repeat(2, 0)
    word = np.array([[-1, 0, 1, 1, 2, 3], [-1, 0, 1, 1, 1, 2]])
    prompt = Prompt(np.array([5, 9]), slot, word, word >= 0)
    top = pl.DataFrame({"sample": [5, 5, 5, 9, 9], "rank": [1, 2, 3, 1, 2], "slot": [0, 3, 1, 4, 2]})
    token, words = prompt.top(top)
    assert [np.flatnonzero(row).tolist() for row in token] == [[0], [4]]
    assert [np.flatnonzero(row).tolist() for row in words] == [[2, 3], [2, 3, 4]]
    draws = [prompt.others(words, 0, draw) for draw in range(20)]
    assert all(np.flatnonzero(draw[1]).size == 0 for draw in draws)  # two are left, and three are asked for
    assert all(draw[0].sum() == 2 and not (draw & words).any() and not draw[0, 0] for draw in draws)
    assert len({draw[0].tobytes() for draw in draws}) == 3
    assert (prompt.others(words, 0, 1) == draws[1]).all()


@pytest.mark.parametrize("tokens", ["text", "all", "instruction"])
def test_slots_are_those_of_the_prompt_whatever_the_proxy_reads(place, tokens):
    opened, samples = store.open(place), np.array([4, 1, 7])
    prompt = Prompt.of(opened, tokens, samples)
    states, mask = opened.read(samples, "1", tokens)
    text, _ = opened.read(samples, "1", "text")
    for n in range(3):
        for t in range(int(mask[n].sum())):
            slot = prompt.slot_nt[n, t]
            assert (slot < 0) == (tokens == "all" and t < opened.plan.samples["n_image"][int(samples[n])])
            assert slot < 0 or torch.equal(states[n, 0, t], text[n, 0, slot])
            assert prompt.instruction_nt[n, t] == (slot > 0)


def test_overlaps_are_those_of_a_loop_over_samples(place, proxies):
    opened, (votes, top) = store.open(place), spoken(place)
    samples = np.arange(0, 210, 3)  # more than a batch
    prompt = Prompt.of(opened, "text", samples)
    wanted = [list(masks_of(probe, prompt, votes, top, [p], 7)) for p, probe in enumerate(proxies)]
    values = overlaps(opened, proxies, wanted, samples)
    true = torch.from_numpy(unit_boxes(opened.samples)[0])
    for p, probe in enumerate(proxies):
        for k, mask in enumerate(wanted[p]):
            for n in (0, 13, 69):
                states, inside = opened.read([samples[n]], READ, "text")
                closed = mask.layers_nl[n][:, None] & mask.tokens_nt[n][None, : inside.shape[1]]
                if mask.name != NOTHING and not closed.any():  # no token of the planted store is of a word
                    assert mask.name in (WORD, CONTROLS[WORD]) and np.isnan(values[p][k, n])
                    continue
                box = probe.predict_states(states, (inside[0] & ~torch.from_numpy(closed))[None])
                assert values[p][k, n] == pytest.approx(float(iou(box[0], true[samples[n]])), abs=2e-4)


def test_the_same_call_gives_the_same_bits(place, proxies, found):
    opened, (votes, top) = store.open(place), spoken(place)
    again = masking(opened, proxies, votes, top, askable(opened, proxies[0], "test", 60, 0), draws=4)
    assert all(again[name].equals(found[name]) for name in found)


def test_samples_without_a_vote_or_a_top_token_are_asked_only_what_is_known(place, proxies):
    opened, (votes, top) = store.open(place), spoken(place)
    samples = np.arange(0, 60, 3)
    votes = votes.with_columns(l_star=pl.when(pl.col("sample") == 3).then(None).otherwise(pl.lit("1")))
    found = masking(opened, proxies[:1], votes, top.filter(pl.col("sample") != 6), samples, draws=1)
    counts = {name: said(found, name)["n"] for name in LABELS}
    assert counts[NOTHING] == 20 and counts[LAYER] == counts[KEPT] == counts["all but another layer"] == 19
    assert counts[WORD] == 0  # no token of the planted store is of a word
    assert counts[TOKEN] == 19 and counts[CROSSED] == 18


def test_a_proxy_of_one_layer_has_no_other_to_be_held_against(place, tmp_path):
    train(alone(place, tmp_path, "1", tokens="text", seeds=(0,)))
    opened, (votes, top) = store.open(place), spoken(place)
    probe = probes.load(tmp_path / "proxies" / "layer-1-text-seed0")
    found = finding(opened, [probe], votes, top, CausesConfig(place, tmp_path / "out", images=5, draws=1))
    assert "another beside it" in found.answer
    assert said(found.tables, NOTHING)["n"] == 5 and said(found.tables, LAYER)["n"] == 0


def test_one_sample_is_enough_to_be_told(place, proxies):
    opened, (votes, top) = store.open(place), spoken(place)
    found = masking(opened, proxies, votes, top, [3], draws=1)
    assert said(found, NOTHING)["n"] == 1
    assert causes_words.told(found).answer


def test_each_proxy_is_masked_where_its_own_attention_is(place, proxies):
    """Tables that tell seeds apart are read by seed; a proxy that they lack is refused."""
    opened, (votes, top) = store.open(place), spoken(place)
    by_seed = pl.concat([votes.with_columns(seed=s, l_star=pl.lit(name)) for s, name in ((0, "1"), (1, "0"))])
    found = masking(opened, proxies, by_seed, top, np.arange(0, 60, 3), draws=1)
    assert found["layers"].filter(metric="iou")["votes"].to_list() == [0.5, 0.5, 0]
    with pytest.raises(Refusal, match=r"there are no votes of joint-0\+1\+2-text-seed1"):
        masking(opened, proxies, by_seed.filter(seed=0), top, [0, 3], draws=1)


def test_the_mean_box_is_that_of_the_train_split(place):
    opened = store.open(place)
    boxes_s4, train_s = unit_boxes(opened.samples)[0], (opened.samples["split"] == "train").to_numpy()
    mean = torch.from_numpy(boxes_s4[train_s].mean(0))
    expected = [float(iou(mean, torch.from_numpy(boxes_s4[n]))) for n in (0, 3, 6)]
    assert mean_box(opened, np.array([0, 3, 6]))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_differences_are_of_the_images_that_both_know():
    values = {"a": np.array([[0.5, 0.1, np.nan, 0.7]]), "b": np.array([[0.1, np.nan, 0.3, 0.2]])}
    (row,) = differences(values, [("a", "b")], "iou")
    assert (row["n"], row["seeds"]) == (2, 1)
    assert row["difference"] == pytest.approx(0.45) and row["value"] == pytest.approx(0.6)
    assert row["value_against"] == pytest.approx(0.15)


def test_intervals_and_corrections_are_those_of_plain_loops():
    rng = np.random.default_rng(3)
    values = rng.normal(0.1, 1, (1, 1, 80))
    (row,) = summary(values)
    draws = [rng.choice(values[0, 0], 80).mean() for _ in range(4000)]
    assert (row["low"], row["high"]) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    table = corrected([{"metric": "m", "p": p} for p in (0.01, None, 0.04, 0.03)] + [{"metric": "o", "p": 0.02}])
    assert table["p_holm"].to_list() == pytest.approx([0.03, None, 0.06, 0.06, 0.02])


def test_the_finding_says_what_the_numbers_say(place, proxies, tmp_path):
    votes, top = spoken(place)
    config = CausesConfig(place, tmp_path, images=60, draws=2)
    one = finding(store.open(place), proxies, votes, top, config)
    assert one.question == "Is attention cause?" and one.answer.startswith("Yes: without the layer")
    value = said(one.tables, NOTHING)["value"]
    for words in (f"from {value:.3f} (mean box", "n = 60 held-out images, 2 seeds", "p by Holm over all 10"):
        assert words in one.answer
    assert (tmp_path / "figure-8-causes.png").stat().st_size > 20_000
    assert set(pl.read_csv(tmp_path / "figure-8-causes.csv", infer_schema_length=None)["table"]) == {"values", "layers"}
    assert causes_words.told(one.tables).title.startswith("Attention is where it matters")


def test_attention_at_a_layer_that_does_not_matter_is_said_to_be_no_cause(place, proxies):
    opened, (votes, top) = store.open(place), spoken(place)
    found = masking(opened, proxies, votes.with_columns(l_star=pl.lit("0")), top, np.arange(0, 180, 3), draws=1)
    told = causes_words.told(found)
    assert told.answer.startswith("It is not shown") and told.title.startswith("Not shown to be a cause")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"report": "dev"}, "no sample of split 'dev'"), ({"images": 0}, "--images 0 is too small")],
)
def test_settings_that_leave_nothing_to_ask_are_refused(place, proxies, tmp_path, change, said):
    with pytest.raises(Refusal, match=said):
        finding(store.open(place), proxies, *spoken(place), CausesConfig(place, tmp_path, **change))


def test_proxies_that_are_not_seeds_of_one_are_refused(place, proxies, tmp_path):
    train(alone(place, tmp_path, "1", tokens="text", seeds=(0,)))
    train(alone(place, tmp_path / "cells", *READ, tokens="text", seeds=(0,), target="cell-3x3"))
    other = probes.load(tmp_path / "proxies" / "layer-1-text-seed0")
    cells = probes.load(next((tmp_path / "cells" / "proxies").iterdir()))
    for wrong, words in ((other, "reads other layers or tokens"), (cells, "no Q-Former that says boxes")):
        with pytest.raises(Refusal, match=words):
            masking(store.open(place), [proxies[0], wrong], *spoken(place), [0, 3])


def test_the_proxy_of_an_array_is_found_where_it_was_trained_or_where_it_was_moved(proxies, tmp_path):
    run, probe = proxies[0].folder.parent.parent, proxies[0]
    attributes = {"proxy": probe.hash, "spec": dataclasses.asdict(probe.spec), "seed": 0, "run": str(run)}
    assert proxy_of(attributes, tmp_path).hash == probe.hash
    assert proxy_of(attributes | {"run": "gone"}, run).hash == probe.hash
    for wrong in ({"run": "gone"}, {"proxy": "0" * 64}):
        with pytest.raises(Refusal, match=r"is neither in .* nor in .*: give --probes"):
            proxy_of(attributes | wrong, tmp_path)


@pytest.fixture(scope="module")
def again(proxies, tmp_path_factory):
    """A store with masks, and proxies that were trained again without what they mark."""
    folder = tmp_path_factory.mktemp("again")
    place = Planted(n=240).write(folder / "s.zarr")
    retrain(store.open(place), proxies[0], *spoken(place), folder / "out", seeds=(0,))
    return place, folder / "out"


def test_masks_of_tokens_mark_the_top_one_and_another_of_the_instruction(again, proxies):
    opened = store.open(again[0])
    top, random = (opened.derived[name] for name in (TOP, RANDOM))
    counts = opened.plan.samples["n_text"].to_numpy()
    assert top.attrs["proxy"] == random.attrs["proxy"] == proxies[0].hash
    assert (top.values.sum(1) == 1).all() and (top.values[:, 1] == 1).all()
    for n, row in enumerate(random.values):
        (slot,) = np.flatnonzero(row)
        assert 2 <= slot < counts[n]
    write_masks(opened, proxies[0], *spoken(again[0]))  # the same again is no error
    with pytest.raises(Refusal, match=r"derived/top-tokens .* marks other tokens: first `python -m store drop"):
        write_masks(opened, proxies[0], *spoken(again[0], rank=(2, 1)))


def test_samples_whose_tokens_are_not_known_are_marked_so_in_both(proxies, tmp_path):
    place = Planted(n=30).write(tmp_path / "s.zarr")
    votes, top = spoken(place, samples=[n for n in range(30) if n != 4])
    write_masks(store.open(place), proxies[0], votes.filter(pl.col("sample") != 9), top)
    for name in (TOP, RANDOM):
        unknown = np.isnan(store.open(place).derived[name].values).all(1)
        assert np.flatnonzero(unknown).tolist() == [4, 9]


def test_trained_again_without_the_layer_that_holds_the_box_nothing_is_left(again, proxies):
    table = retrained(again[1], proxies, spoken(again[0])[0])["retrained"]
    rows = {(row["treatment"], row["against"]): row for row in table.iter_rows(named=True)}
    assert set(rows) == {(r, FULL) for r in (VOTED, OTHER, TOKENS, OTHERS)} | {(VOTED, OTHER), (TOKENS, OTHERS)}
    assert rows[VOTED, FULL]["difference"] < -0.15 and rows[VOTED, FULL]["left_out"] == "1"
    assert rows[OTHER, FULL]["difference"] > -0.08 and rows[OTHER, FULL]["left_out"] in ("0", "2")
    assert rows[TOKENS, FULL]["difference"] > -0.1
    assert rows[VOTED, OTHER]["n"] == 80 and rows[VOTED, OTHER]["seeds"] == 1


def test_what_retraining_reached_is_that_of_its_predictions(again, proxies):
    table = retrained(again[1], proxies, spoken(again[0])[0])["retrained"]
    row = table.filter(treatment=TOKENS, against=FULL).row(0, named=True)
    told = []
    folder = again[1] / "proxies" / "joint-0+1+2-text-without-top-tokens-seed0"
    for line in pl.read_parquet(folder / "predictions.parquet").iter_rows(named=True):
        a, b = ([line[f"{prefix}{side}"] for side in ("x1", "y1", "x2", "y2")] for prefix in ("", "true_"))
        wide = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        told.append(wide / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide))
    assert row["value"] == pytest.approx(np.mean(told), abs=1e-5)


def test_a_finding_with_retraining_says_so_and_trains_nothing_twice(again, proxies, tmp_path, monkeypatch):
    monkeypatch.setattr("probes.learn.Stack.train", lambda *_: pytest.fail("it was trained again"))
    config = CausesConfig(again[0], tmp_path, images=40, draws=1, retrain=True, retrained=again[1])
    one = finding(store.open(again[0]), proxies[:1], *spoken(again[0]), config)
    assert "Trained again without the most voted layer (1) it" in one.answer and "retrained" in one.tables
    assert "so not all of it is found elsewhere" in one.answer


def test_a_folder_without_such_proxies_is_refused(place, proxies, tmp_path):
    with pytest.raises(Refusal, match="holds no proxy that was trained again without a layer or token"):
        retrained(tmp_path, proxies, spoken(place)[0])


def test_the_modal_layer_and_the_drawn_others_are_always_the_same(proxies):
    votes = pl.DataFrame({"sample": range(5), "l_star": ["2", "0", "2", "0", None]})
    assert modal(votes, proxies[0]) == "0"  # of as many, the first
    assert others_of(proxies[0], "1", 1, 0) == others_of(proxies[0], "1", 1, 0)
    assert others_of(proxies[0], "1", 5, 0) == ["0", "2"]
    with pytest.raises(Refusal, match="no sample has a layer"):
        modal(votes.with_columns(l_star=pl.lit(None, pl.String)), proxies[0])


def test_probes_that_were_trained_otherwise_are_no_part_of_it(proxies):
    full = proxies[0].spec
    changed = dataclasses.replace
    assert role_of(changed(full, layers=("0", "2")), full, "1") == (VOTED, "1")
    assert role_of(changed(full, layers=("0", "1")), full, "1") == (OTHER, "2")
    assert role_of(changed(full, without=TOP), full, "1") == (TOKENS, TOP)
    for other in ({}, {"layers": ("1",)}, {"layers": ("0", "2"), "labels": "permuted"}, {"without": "mine"}):
        assert role_of(changed(full, **other), full, "1")[0] is None
