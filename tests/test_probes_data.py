"""What a sweep reads: splits, shares, control stores, tokens of a kind, matched keys, batches."""

import numpy as np
import polars as pl
import pytest
import torch
from planted_store import LAYERS, PLANTED, Planted

import store
from probes import data
from probes.config import SweepConfig, TrainConfig
from probes.data import Feed, Split, Views
from probes.specs import CELLS, PORTIONS, SHARES, Spec, middle_third, one, specs
from store.errors import Refusal


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return store.open(Planted().write(tmp_path_factory.mktemp("planted") / "store"))


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """The same samples in another order, some missing."""
    samples = [i for i in reversed(range(96)) if i not in (4, 5, 6)]
    return store.open(
        Planted(planted=None, seed=1, samples=samples).write(tmp_path_factory.mktemp("control") / "store")
    )


def split_of(table, usable=None, **changes):
    settings = {"watch": 16, "order_seed": 0} | changes
    return data.split(table, np.ones(table.height, bool) if usable is None else usable, **settings)


# -- splits ------------------------------------------------------------------------------------------------------------


def test_watched_and_other_test_samples_are_apart_and_train_samples_elsewhere(opened):
    found = split_of(opened.samples)
    assert (len(found.train), len(found.watch), len(found.rest)) == (64, 16, 16)
    assert not set(found.watch) & set(found.rest)
    assert not set(found.test) & set(found.train)
    assert {sample % 3 for sample in found.test} == {0}


def test_at_most_half_of_the_test_split_is_watched(opened):
    assert len(split_of(opened.samples, watch=1000).watch) == 16
    two = opened.samples.with_columns(split=pl.Series(["test"] * 2 + ["train"] * 94))
    assert [len(part) for part in (split_of(two).watch, split_of(two).rest)] == [1, 1]


def test_another_order_of_the_samples_is_of_the_same_samples(opened):
    first, second = split_of(opened.samples), split_of(opened.samples, order_seed=1)
    assert sorted(first.train) == sorted(second.train)
    assert list(first.train) != list(second.train)
    assert list(first.watch) == list(second.watch)


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_split_that_is_empty_is_refused_by_name(opened, name):
    only = opened.samples.with_columns(split=pl.lit({"train": "test", "test": "train"}[name]))
    with pytest.raises(Refusal, match=f"0 samples of .* are in split '{name}'"):
        split_of(only)


def test_samples_without_a_split_are_in_none(opened):
    some = opened.samples.with_columns(split=pl.Series([None, *opened.samples["split"][1:]]))
    assert 0 not in split_of(some).test


def test_shares_grow_and_portions_that_are_coded_follow_each_other_to_the_end():
    found = Split(np.arange(200), np.arange(0), np.arange(0))
    for small, large in zip((*SHARES, 1.0)[:-1], (*SHARES, 1.0)[1:], strict=True):
        assert set(found.shared(small)) < set(found.shared(large))
    ends = len(found.shared(PORTIONS[0]))
    for portion in PORTIONS:
        coded = found.coded(portion)
        assert coded[0] == ends
        assert list(coded) == list(range(coded[0], coded[-1] + 1))
        ends = coded[-1] + 1
    assert ends == 200


def test_the_type_of_an_input_is_the_last_word_of_its_instruction():
    texts = ["Remove the ball.", "make it a BALL!", "remove the cube", None, "…"]
    types = data.input_types(pl.DataFrame({"sample_id": list("abcde"), "instruction": texts}))
    assert types[0] == types[1] != types[2]
    assert types[3] == types[4]
    assert len(set(data.input_types(pl.DataFrame({"sample_id": list("abc")})))) == 3


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_control_store_is_matched_by_the_names_of_the_samples(opened, control):
    source = data.sources_of(opened, {"random-weights": control})["random-weights"]
    assert np.flatnonzero(~source.usable_s).tolist() == [4, 5, 6]
    for place in (0, 50, 95):
        assert control.samples["sample_id"][int(source.position_s[place])] == opened.samples["sample_id"][place]


def test_batches_of_all_sources_are_of_the_same_samples(opened, control):
    sources = data.sources_of(opened, {"random-weights": control})
    feed = Feed(sources, {name: ["0", "1"] for name in sources}, "text")
    samples = np.array([i for i in range(96) if i not in (4, 5, 6)])
    for read in feed.batches(samples, 8, steps=3, seed=1):
        for name, source in sources.items():
            expected, mask = source.store.read(source.position_s[read.samples], ["0", "1"], "text")
            torch.testing.assert_close(read.states[name], expected)
            assert mask.shape[1] == read.states[name].shape[2]


def test_the_order_of_batches_is_the_same_from_any_step_on(opened):
    feed = Feed(data.sources_of(opened, {}), {"ordinary": ["1"]}, "text")
    samples = np.arange(50)
    whole = [read.samples.tolist() for read in feed.batches(samples, 16, steps=9, seed=3)]
    assert [read.samples.tolist() for read in feed.batches(samples, 16, steps=9, seed=3, start=4)] == whole[4:]
    assert all(len(set(batch)) == 16 for batch in whole)
    assert list(feed.batches(samples, 16, steps=9, start=9)) == []


def test_a_source_of_another_width_is_refused(opened, tmp_path):
    narrow = store.open(Planted(width=8).write(tmp_path / "store"))
    with pytest.raises(Refusal, match=r"are 8 wide, of .* 16"):
        data.sources_of(opened, {"random-weights": narrow})


# -- views -------------------------------------------------------------------------------------------------------------


def views_of(opened, tokens, samples, layers=LAYERS):
    feed = Feed(data.sources_of(opened, {}), {"ordinary": list(layers)}, tokens)
    (read,) = feed.batches(np.asarray(samples), len(samples))
    return Views(feed, read, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("read", "tokens"),
    [
        ("all", "all"),
        ("all", "image"),
        ("all", "text"),
        ("all", "instruction"),
        ("text", "text"),
        ("text", "instruction"),
    ],
)
def test_a_view_holds_the_tokens_of_its_kind_normalised_and_closes_the_rest(opened, read, tokens):
    samples = [3, 70, 21]
    view = views_of(opened, read, samples).view("ordinary", tokens, [("1",), ("final",)], None)
    assert view.states_glbtw.shape[:3] == (2, 1, 3)
    for g, layer in enumerate(("1", "final")):
        states, mask = opened.read(samples, [layer], tokens)
        expected = torch.nn.functional.layer_norm(states[:, 0].float(), states.shape[-1:])
        for b in range(3):
            inside = view.open_glbt[g, 0, b].bool()
            torch.testing.assert_close(view.states_glbtw[g, 0, b][inside], expected[b][mask[b]])


def test_layers_of_a_group_are_read_together_in_its_order(opened):
    views = views_of(opened, "text", [1, 2])
    joint = views.view("ordinary", "text", [("2", "0")], None)
    for place, layer in enumerate(("2", "0")):
        single = views.view("ordinary", "text", [(layer,)], None)
        torch.testing.assert_close(joint.states_glbtw[0, place], single.states_glbtw[0, 0])


def test_matched_keys_are_as_many_tokens_of_every_layer_and_always_the_same(opened):
    samples = [1, 2, 7]
    whole = views_of(opened, "all", samples).view("ordinary", "all", [("0", "1")], None)
    drawn = views_of(opened, "all", samples).view("ordinary", "all", [("0", "1")], 4)
    assert drawn.states_glbtw.shape == (1, 2, 3, 2, 16)
    assert drawn.closed_glbt is None
    for place in range(2):
        for b in range(3):
            rows = {tuple(row) for row in whole.states_glbtw[0, place, b].tolist()}
            picked = {tuple(row) for row in drawn.states_glbtw[0, place, b].tolist()}
            assert len(picked) == 2
            assert picked <= rows
    again = views_of(opened, "all", samples[::-1]).view("ordinary", "all", [("0", "1")], 4)
    torch.testing.assert_close(again.states_glbtw.flip(2), drawn.states_glbtw)


def test_a_kind_that_no_token_is_of_is_refused_with_those_there_are(opened):
    with pytest.raises(Refusal, match=r"--tokens verbs: no token of .*; give one of all, image, instruction, template"):
        data.sources_of(opened, {})["ordinary"].slots("verbs")


# -- specs -------------------------------------------------------------------------------------------------------------


def names(config, **changes):
    settings = {"layers": LAYERS, "controls": (), "text_tokens": 8} | changes
    return [spec.name for spec in specs(config, *settings.values())]


def test_a_sweep_has_a_probe_of_every_part_for_every_layer():
    config = SweepConfig("unused", prompt_layers=("0", "1"))
    found = names(config, controls=("random-weights",))
    assert len(found) == len(set(found)) == 5 + 1 + 2 + 2 + 5 + 5 + 5 + 4 + 20 + 30
    assert {"layer-embed", "mid-prompt", "floor-text-only", "permuted-1", "control-final", "random-0"} <= set(found)
    assert {"joint-0+1+2-text", "permuted-0+1+2-text"} <= set(found)  # as `probes train` names them
    assert {"matched-all-1", "matched-prompt-n", "layer-2-1-of-16", "codelength-2-1-of-64"} <= set(found)


def test_codelengths_of_boxes_are_of_cells_and_of_classes_are_their_own():
    for target, coded in (("box", CELLS), ("object_kind", "object_kind")):
        config = SweepConfig("unused", parts=("codelength",), target=target)
        assert {spec.target for spec in specs(config, LAYERS, (), 8)} == {coded}


def test_matched_probes_have_as_many_keys_of_every_layer():
    config = SweepConfig("unused", parts=("matched",), prompt_layers=("0", "1", "2"))
    found = specs(config, LAYERS, (), 8)
    assert {spec.keys for spec in found} == {6}
    assert sorted(len(spec.layers) for spec in found) == [1, 1, 3, 3]
    assert specs(config, LAYERS, (), 2) == []


def test_the_middle_third_counts_blocks_only():
    assert middle_third(("embed", *map(str, range(12)), "final")) == ("4", "5", "6", "7")
    assert middle_third(LAYERS) == (PLANTED,)


def test_a_run_of_blocks_is_told_from_a_choice_of_layers():
    choices = (("3",), ("4", "5", "6"), ("2", "9"), ("embed", "0"))
    assert [Spec("any", "prompt", layers).layer for layers in choices] == ["3", "4–6", "2,9", "embed,0"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (("77",), "--layers names 77; the store holds embed, 0"),
        ((), "names none"),
        (("1", "1"), "name each layer once"),
    ],
)
def test_layers_that_are_not_there_none_or_twice_are_refused(layers, words):
    with pytest.raises(Refusal, match=words):
        one(TrainConfig("unused", layers=layers), LAYERS)
    if layers:
        with pytest.raises(Refusal, match=words):
            names(SweepConfig("unused", layers=layers))
        with pytest.raises(Refusal, match=words.replace("--layers", "--prompt-layers")):
            names(SweepConfig("unused", prompt_layers=layers))
