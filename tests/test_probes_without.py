"""Probes that are trained without marked tokens, and masks that differ between layers."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from planted_store import LAYERS, QUICK, Planted, alone, quick, weights_of

import probes
import store
from probes import marked
from probes.config import TrainConfig
from probes.data import Feed, Source, Views
from probes.learn import Job
from probes.specs import one
from probes.sweep import sweep, train
from store.errors import Refusal

BOTH = ("1", "2")


def mark(place, values_st, name="gone", **attributes):
    """Write marks (s, t) into a store."""
    with store.derive(place, name, ("sample", "token"), values_st.shape, attributes=attributes) as out:
        out.write(values_st)
    return name


def last_tokens(place):
    """Marks of the last prompt token of every sample, with NaN past its last."""
    counts = store.open(place).plan.samples["n_text"].to_numpy()
    slots = np.arange(counts.max())
    return np.where(slots < counts[:, None], slots == counts[:, None] - 1, np.nan).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store with an array that marks the last prompt token of every sample."""
    folder = Planted(n=60).write(tmp_path_factory.mktemp("store") / "s.zarr")
    mark(folder, last_tokens(folder), why="the last of each")
    return folder


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """The folder of a run with a probe that does without the marked tokens."""
    out = tmp_path_factory.mktemp("runs") / "without"
    train(alone(place, out, *BOTH, tokens="text", without="gone"))
    return out


@pytest.mark.parametrize("tokens", ["all", "text", "image", "instruction"])
def test_marked_tokens_are_left_out_of_what_a_probe_sees(place, tokens):
    opened = store.open(place)
    source = Source(opened, opened)
    places_st, counts_s = source.slots(tokens, "gone")
    whole_st, whole_s = source.slots(tokens)
    for s, (n_image, n_text) in enumerate(opened.plan.samples.select("n_image", "n_text").iter_rows()):
        expected = [p for p in whole_st[s, : whole_s[s]] if p != n_image + n_text - 1]
        assert places_st[s, : counts_s[s]].tolist() == expected
    read = next(Feed({"ordinary": source}, {"ordinary": ["1"]}, "all").batches(np.arange(4), 4))
    states, closed = Views(Feed({"ordinary": source}, {"ordinary": ["1"]}, "all"), read, "cpu", torch.float32).chosen(
        "ordinary", tokens, "gone"
    )
    for b in range(4):
        kept = places_st[b, : counts_s[b]]
        normal = torch.nn.functional.layer_norm(read.states["ordinary"][b, 0, kept].float(), (16,))
        torch.testing.assert_close(states[0, b, : counts_s[b]], normal)
        assert closed is None or (closed[b] == 0).sum() == counts_s[b]


def test_a_probe_without_tokens_answers_as_if_they_were_masked(place, trained):
    """Its predictions are those of ``predict_states`` where the mask closes the marked tokens."""
    opened = store.open(place)
    probe = probes.load(next((trained / "proxies").iterdir()))
    told = pl.read_parquet(probe.folder / "predictions.parquet")
    states, mask = opened.read(told["sample"].to_list(), probe.spec.layers, "text")
    gone = torch.from_numpy(opened.derived["gone"].values[told["sample"].to_numpy()] == 1)
    boxes = probe.predict_states(states, mask & ~gone[:, : mask.shape[1]])
    torch.testing.assert_close(boxes, told.select("x1", "y1", "x2", "y2").to_torch(), atol=1e-5, rtol=0)
    assert (boxes - probe.predict_states(states, mask)).abs().max() > 1e-4


def test_what_was_left_out_is_told_of_the_probe(trained):
    probe = probes.load(next((trained / "proxies").iterdir()))
    assert probe.folder.name == f"joint-1+2-text-without-gone-seed{probe.seed}"
    assert (probe.spec.without, probe.spec.role) == ("gone", "other")
    assert probe.making["without"]["attributes"]["why"] == "the last of each"
    assert len(probe.making["without"]["hash"]) == 64
    about = pl.read_parquet(trained / "about.parquet")
    assert about.filter(kind="qformer")["without"].to_list() == ["gone"]


def test_marks_that_mark_nothing_change_no_bit(place, tmp_path):
    mark(place, np.zeros_like(last_tokens(place)), "none")
    train(alone(place, tmp_path / "none", *BOTH, tokens="text", without="none"))
    train(alone(place, tmp_path / "whole", *BOTH, tokens="text"))
    assert list(weights_of(tmp_path / "none").values()) == list(weights_of(tmp_path / "whole").values())


def test_probes_with_and_without_share_a_folder_and_a_wave(place, trained, tmp_path):
    """Neither changes the other's bits, and the one layer's own probe is still what tables take it for."""
    sweep(quick(place, tmp_path, parts=("layers",), layers=("1",)))
    before = weights_of(tmp_path)
    train(alone(place, tmp_path, "1", without="gone"))
    after = weights_of(tmp_path)
    assert {name: after[name] for name in before} == before and len(after) == 4
    assert pl.read_parquet(tmp_path / "about.parquet").filter(role="layer")["probe"].to_list() == ["layer-1"]


def test_an_interrupted_training_goes_on_to_the_same_bits(place, trained, tmp_path, monkeypatch):
    from probes.wave import Wave

    config = alone(place, tmp_path, *BOTH, tokens="text", without="gone", checkpoint=0.0)
    saved = Wave.save
    monkeypatch.setattr(Wave, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not weights_of(tmp_path)
    monkeypatch.setattr(Wave, "save", saved)
    monkeypatch.setattr("probes.learn.Stack.train", lambda *_: pytest.fail("it was trained again"))
    train(config)
    assert weights_of(tmp_path) == weights_of(trained)


def test_samples_of_which_nothing_is_known_or_nothing_is_left_are_left_out(place, tmp_path, capsys):
    values_st = last_tokens(place)
    values_st[7] = np.nan
    values_st[9] = np.where(np.isnan(values_st[9]), np.nan, 1)
    mark(place, values_st, "unknown")
    opened = store.open(place)
    counts_s = Source(opened, opened).slots("text", "unknown")[1]
    assert np.flatnonzero(counts_s == 0).tolist() == [7, 9]
    # Of all tokens, pictures are left of a sample without prompt, but not of one of which nothing is known.
    assert np.flatnonzero(Source(opened, opened).slots("all", "unknown")[1] == 0).tolist() == [7]
    train(alone(place, tmp_path, "1", tokens="text", without="unknown"))
    assert "2 samples are left out" in capsys.readouterr().out


def test_marks_that_changed_since_are_refused(tmp_path):
    folder = Planted(n=60).write(tmp_path / "s.zarr")
    mark(folder, last_tokens(folder))
    train(alone(folder, tmp_path / "out", "1", tokens="text", without="gone"))
    store.drop(folder, "derived/gone")
    mark(folder, np.roll(np.nan_to_num(last_tokens(folder)), -1, axis=1))
    with pytest.raises(Refusal, match=r"was trained without other tokens than derived/gone marks now: .* --out"):
        train(alone(folder, tmp_path / "out", "1", tokens="text", without="gone"))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"without": "nothing"}, r"--without nothing: .* no derived array of that name; .* it has .*gone"),
        ({"without": "narrow"}, r"derived/narrow .* is over \(sample 60, token 2\), .* with 6 tokens or more"),
        ({"without": "flat"}, r"derived/flat .* is over \(sample 60\)"),
        ({"without": "gone", "tokens": "image"}, "--without gone leaves out prompt tokens, and --tokens image reads"),
    ],
)
def test_what_marks_no_prompt_tokens_is_refused(place, tmp_path, wanted, said):
    there = store.open(place).derived
    if "narrow" not in there:
        mark(place, np.zeros((60, 2), np.float32), "narrow")
        with store.derive(place, "flat", ("sample",), (60,)) as out:
            out.write(np.zeros(60, np.float32))
    with pytest.raises(Refusal, match=said):
        train(alone(place, tmp_path / "out", "1", **wanted))
    assert not (tmp_path / "out").exists()


def test_a_probe_without_tokens_answers_for_no_picture(trained):
    probe = probes.load(next((trained / "proxies").iterdir()))
    with pytest.raises(Refusal, match=r"without the tokens that derived/gone marks .* cannot answer for a picture"):
        probe.predict("picture.png", "Remove it.")


def test_it_is_asked_about_another_store_only_with_its_marks(place, trained, tmp_path):
    from probes.config import EvaluateConfig
    from probes.evaluate import evaluate

    other = Planted(n=30, ids="other", seed=3).write(tmp_path / "other.zarr")
    with pytest.raises(Refusal, match=r"--without gone: .* no derived array of that name"):
        evaluate(EvaluateConfig(trained, on=(f"other={other}",)))
    mark(other, last_tokens(other))
    evaluate(EvaluateConfig(trained, on=(f"other={other}",)))
    assert set(pl.read_parquet(trained / "predictions.parquet")["data"]) == {"held-out", "other"}


def test_probes_of_before_there_were_marks_are_read(trained, place, tmp_path):
    train(alone(place, tmp_path, "1"))
    path = tmp_path / "proxies" / "layer-1-seed0" / "probe.json"
    told = json.loads(path.read_text())
    assert told["spec"].pop("without") is None
    path.write_text(json.dumps(told))
    assert probes.load(path.parent).spec.without is None
    train(alone(place, tmp_path, "1"))


def test_without_belongs_to_the_name_of_a_probe(place):
    config = TrainConfig(place, layers=("1",), tokens="text", labels="permuted", without="gone", **QUICK)
    spec = one(config, LAYERS)
    assert (spec.name, spec.role, spec.labels) == ("permuted-1-text-without-gone", "other", "permuted")
    assert "without" not in config.settings
    assert Job(spec, 0).shape != Job(one(TrainConfig(place, layers=("1",), tokens="text", **QUICK), LAYERS), 0).shape


@pytest.fixture(scope="module", params=["qformer", "attention", "mlp"])
def reader(place, tmp_path_factory, request):
    """A probe of two layers of each kind."""
    out = tmp_path_factory.mktemp("runs") / request.param
    train(alone(place, out, *BOTH, tokens="text", probe=request.param, seeds=(0,)))
    return probes.load(next((out / "proxies").iterdir()))


def test_a_mask_may_differ_between_layers(place, reader):
    """What is closed at a layer has no part in the answer, and the rest has."""
    states, mask = store.open(place).read([0, 1, 2, 5], BOTH, "text")
    mask_slt = mask[:, None].repeat(1, 2, 1)
    same = reader.predict_states(states, mask)
    torch.testing.assert_close(reader.predict_states(states, mask_slt), same, atol=0, rtol=0)
    mask_slt[:, 1] = False
    without = reader.predict_states(states, mask_slt)
    assert (without - same).abs().max() > 1e-5
    noisy = states.float().clone()
    noisy[:, 1] = torch.randn(noisy[:, 1].shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reader.predict_states(noisy, mask_slt), without, atol=1e-6, rtol=0)


def test_closed_keys_get_no_attention_and_the_rest_gets_all(place, trained):
    probe = probes.load(next((trained / "proxies").iterdir()))
    states, mask = store.open(place).read([0, 1, 2], BOTH, "text")
    mask_slt = mask[:, None].repeat(1, 2, 1)
    mask_slt[0, 0], mask_slt[1, 1, 1], mask_slt[2, :, 0] = False, False, False
    attention = probe.predict_states(states, mask_slt, attention=True)[1]
    assert (attention.permute(0, 3, 4, 1, 2)[~mask_slt] == 0).all()
    torch.testing.assert_close(attention.sum((-1, -2)), torch.ones(attention.shape[:3]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda mask: mask[:, :, :-1], r"a mask of \(3, 2, \d\) is none of states \(3, 2, \d\)"),
        (lambda mask: mask[:, :1], r"a mask of \(3, 1, \d\) is none of states"),
        (lambda mask: mask & (torch.arange(3) != 1)[:, None, None], "sample 1 has no token of kind 'text'"),
    ],
)
def test_masks_that_fit_no_states_are_refused(place, trained, change, said):
    probe = probes.load(next((trained / "proxies").iterdir()))
    states, mask = store.open(place).read([0, 1, 2], BOTH, "text")
    with pytest.raises(Refusal, match=said):
        probe.predict_states(states, change(mask[:, None].repeat(1, 2, 1)))


def test_nothing_known_is_not_nothing_marked():
    """NaN at a token of a sample leaves the sample out; past its last token it means nothing."""
    places, counts = np.arange(3)[None].repeat(2, 0), np.array([3, 2])
    marks = np.array([[0, np.nan, 0], [0, 0, np.nan]])
    found, left = marked.unmarked(places, counts, marks, np.array([0, 0]), np.array([3, 2]))
    assert left.tolist() == [0, 2] and found[1, :2].tolist() == [0, 1]
