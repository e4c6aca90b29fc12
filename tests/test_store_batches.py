"""Batches and eager reads: the same values as stock zarr gives, in an order that a seed decides."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zarr

import store
from store.synthetic import synthetic_plan, synthetic_store


@pytest.fixture(scope="module", params=["zstd", "none"])
def path(request, tmp_path_factory):
    plan = synthetic_plan(30, seed=2, codec=request.param, image=(3, 30))
    return synthetic_store(tmp_path_factory.mktemp("batches") / "store", plan)


def stock_tokens(path, sample, layer, tokens):
    """The bits of a sample's tokens by zarr-python and the token table."""
    opened = store.open(path)
    table = opened.tokens.filter(sample=sample).collect()
    parts = []
    for name in ("image", "text"):
        kinds = table.filter((table["kind"] == "image") == (name == "image"))
        if tokens not in ("all", name):
            kinds = kinds.filter(kinds["kind"] == tokens)
        bits_slr = zarr.open_group(path, mode="r")[f"hidden/{name}"]
        parts.append(bits_slr[sample, opened.layers.index(layer)][kinds["slot"].to_list()])
    return np.concatenate(parts)


@pytest.mark.parametrize("tokens", ["all", "image", "text", "instruction", "template"])
def test_batches_hold_exactly_what_stock_zarr_reads(path, tokens):
    layers = ["final", "embed"]
    for batch in store.open(path).batches(layers, tokens, batch_size=7, shuffle=True, seed=3, samples=range(5, 20)):
        assert batch.states.dtype == torch.bfloat16 and batch.states.shape[1] == 2
        assert batch.mask.any(dim=0).all()
        assert (batch.states.float().abs().sum((1, 3)) * ~batch.mask == 0).all()
        for i, sample in enumerate(batch.sample.tolist()):
            for j, layer in enumerate(layers):
                states = batch.states[i, j][batch.mask[i]].view(torch.uint16).numpy()
                np.testing.assert_array_equal(states, stock_tokens(path, sample, layer, tokens))


def test_the_seed_decides_the_order_and_every_epoch_has_its_own(path):
    opened = store.open(path)

    def order(seed):
        return torch.cat([b.sample for b in opened.batches("0", "text", 8, shuffle=True, seed=seed, epochs=2)])

    assert torch.equal(order(5), order(5))
    assert not torch.equal(order(5), order(6))
    first, second = order(5).split(30)
    assert not torch.equal(first, second)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(30))


def test_splits_last_batches_and_dtypes_are_chosen(path):
    opened = store.open(path)
    chosen = [b.sample for b in opened.batches("0", "image", 4, split="test")]
    assert torch.cat(chosen).tolist() == [0, 5, 10, 15, 20, 25] and len(chosen[-1]) == 2
    assert [len(b.sample) for b in opened.batches("0", "image", 4, split="test", drop_last=True)] == [4]
    batch = next(opened.batches("0", "image", 4, dtype="float32"))
    assert batch.states.dtype == torch.float32


def test_read_gives_one_layer_of_many_samples_at_once(path):
    states, mask = store.open(path).read([9, 3, 9], "0", "instruction")
    assert states.shape[:2] == (3, 1) and mask.shape == (3, states.shape[2])
    assert torch.equal(states[0], states[2])
    np.testing.assert_array_equal(
        states[1, 0][mask[1]].view(torch.uint16).numpy(), stock_tokens(path, 3, "0", "instruction")
    )


def test_float32_states_come_back_as_they_were(tmp_path):
    plan = synthetic_plan(5, dtype="float32")
    path = synthetic_store(tmp_path / "store", plan)
    states, mask = store.open(path).read(range(5), ["0", "final"], "text")
    stock = zarr.open_group(path, mode="r")["hidden/text"][:, 1:]
    assert states.dtype == torch.float32
    for sample in range(5):
        n = int(mask[sample].sum())
        np.testing.assert_array_equal(states[sample, :, :n].numpy(), stock[sample, :, :n])


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"layers": ["0", "7"]}, "layer 7"),
        ({"layers": "0", "tokens": "verb"}, "'verb'.*instruction"),
        ({"layers": "0", "split": "dev"}, "'dev'"),
        ({"layers": "0", "samples": [30]}, "sample 30"),
        ({"layers": "0", "dtype": "float16"}, "float16"),
    ],
)
def test_what_is_not_there_is_refused_by_name(path, asked, named):
    with pytest.raises(store.Refusal, match=named):
        next(store.open(path).batches(**asked))


def test_a_reader_leaves_early_without_hanging(path):
    batches = store.open(path).batches("0", "text", 2, epochs=100)
    next(batches)
    batches.close()


def bits_of(tensor):
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize("tokens", ["all", "instruction", "template"])
def test_ragged_batches_hold_the_same_states_one_sample_after_the_other(path, tokens):
    opened = store.open(path)
    asked = {"layers": ["0", "embed"], "tokens": tokens, "batch_size": 7, "shuffle": True, "seed": 1}
    for padded, ragged in zip(opened.batches(**asked), opened.batches(**asked, layout="ragged"), strict=True):
        assert (
            torch.equal(padded.sample, ragged.sample) and ragged.offsets.diff().tolist() == padded.mask.sum(1).tolist()
        )
        assert ragged.values.shape[:2] == (2, int(padded.mask.sum()))
        whole = padded.states.transpose(0, 1)[:, padded.mask]
        assert torch.equal(bits_of(whole), bits_of(ragged.values))


def test_a_run_that_was_stopped_in_mid_epoch_goes_on_with_the_next_batch(path):
    import json

    opened = store.open(path)

    def made(seed=3):
        return opened.batches("0", "text", 7, shuffle=True, seed=seed, epochs=3)

    whole = [batch.sample.tolist() for batch in made()]
    first = made()
    begun = [next(first).sample.tolist() for _ in range(7)]
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = made()
    second.load_state_dict(state)
    assert begun + [batch.sample.tolist() for batch in second] == whole and len(whole) == len(second)
    with pytest.raises(store.Refusal, match="other batches"):
        made(seed=4).load_state_dict(state)


def test_an_iterator_that_came_to_its_end_starts_over(path):
    batches = store.open(path).batches("0", "text", 7, shuffle=True)
    once, twice = ([batch.sample.tolist() for batch in batches] for _ in range(2))
    assert once == twice and len(once) == 5


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_worker_processes_give_the_same_batches_in_the_same_order(path, context):
    batches = store.open(path).batches(["0", "final"], "all", 4, shuffle=True, seed=2, epochs=2)
    alone = [(batch.sample.clone(), bits_of(batch.states).clone()) for batch in batches]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context=context)
    shared = [(batch.sample, bits_of(batch.states)) for batch in loader]
    assert len(alone) == len(shared) == 16
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_memory_is_used_again_only_when_nobody_holds_the_batch(path):
    opened = store.open(path)
    asked = {"layers": "0", "tokens": "all", "batch_size": 3, "shuffle": True, "epochs": 20}
    kept = list(opened.batches(**asked))
    for batch, again in zip(kept, opened.batches(**asked), strict=True):
        assert torch.equal(bits_of(batch.states), bits_of(again.states))
    places = {batch.states.data_ptr() for batch in opened.batches(**asked)}
    assert len(places) < 0.4 * len(kept)
    slices = [batch.states[:, :, :1] for batch in opened.batches(**asked)]
    for batch, part in zip(kept, slices, strict=True):
        assert torch.equal(bits_of(batch.states[:, :, :1]), bits_of(part))


def test_tokens_are_chosen_by_word_and_selected_lazily_with_their_labels(path):
    opened = store.open(path)
    found = opened.select(["final", "0"], "instruction", words=["object", "REMOVE"], samples=range(4, 9))
    assert found.dims == ("token", "layer", "width") and found.dtype == np.float32
    assert set(found.word.values) == {0, 1} and set(found.kind.values) == {"instruction"}
    for n in range(0, found.sizes["token"], 3):
        token = found[n]
        sample, slot = int(token.sample), int(token.slot)
        whole = opened.hidden.text.sel(layer=["final", "0"])[sample, :, slot]
        np.testing.assert_array_equal(token.values, whole.values)
    batch = next(opened.batches("final", "instruction", 5, words=["remove"], layout="ragged", dtype="float32"))
    removed = opened.select("final", "instruction", words=["remove"], samples=range(5))
    np.testing.assert_array_equal(batch.values[0].numpy(), removed.values[:, 0])
    everything = opened.select("embed")
    assert everything.sizes["token"] == opened.tokens.collect().height
    states, mask = opened.read(range(30), "embed", "all", dtype="float32")
    np.testing.assert_array_equal(everything.values[:, 0], states[:, 0][mask].numpy())


def test_a_store_and_its_lazy_arrays_may_be_sent_to_other_processes(path):
    import pickle

    opened = pickle.loads(pickle.dumps(store.open(path)))
    assert opened.layers == ("embed", "0", "final") and opened.valid.all()


@pytest.mark.parametrize("cached", [True, False])
def test_many_threads_read_the_same_whether_cached_or_not_and_with_one_file_open(path, monkeypatch, cached):
    monkeypatch.setattr("store.shards.OPEN_FILES", 1)
    monkeypatch.setattr("store.shards.SHARED_BYTES", (1, 0))
    monkeypatch.setattr("store.shards.CORES", 4)
    expected = store.open(path).read(range(30), ["0", "final"])[0].view(torch.int16)
    opened = store.open(path)
    for kind in ("image", "text"):
        opened.reader(f"hidden/{kind}")._hot = cached

    def read(seed):
        order = np.random.default_rng(seed).permutation(30)
        states, _ = opened.read(order, ["0", "final"])
        return torch.equal(states.view(torch.int16), expected[order])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))
