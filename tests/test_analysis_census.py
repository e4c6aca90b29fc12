"""One pass over attention mass says what plain NumPy says of each sample, whoever works and however much there is."""

from collections import Counter

import numpy as np
import pytest
import xarray as xr

from analysis import census as module
from analysis.census import NONE, census, votes
from store.errors import Refusal

DIMS = ("sample", "head", "query", "layer")
FIELDS = ("ranked_phqk", "layered_phql", "count_p", "favourite_sh", "drop_sh", "summed_shl")


def made(n=23, heads=3, queries=5, layers=6, seed=0, dtype=np.float16, missing=(4, 11)):
    """Masses: shares of layers, peaked for even heads; NaN for samples that are missing."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, heads, queries, layers))
    for head in range(0, heads, 2):
        scores[:, head, :, rng.integers(layers)] += 3
    mass = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mass[list(missing)] = np.nan
    return mass.astype(dtype)


def parts(n=23, seed=1):
    return np.random.default_rng(seed).integers(-1, 2, n).astype(np.int8)


def lazy(mass, chunk=4, **coordinates):
    return xr.DataArray(mass, dims=DIMS, coords=coordinates).chunk(sample=chunk)


def bits(found):
    return {name: np.ascontiguousarray(getattr(found, name)).tobytes() for name in FIELDS}


def by_hand(mass, parts_s):
    """The same by loops over samples, heads and queries, in float64."""
    n, heads, queries, layers = mass.shape
    ranked, layered = np.zeros((2, 2, heads, queries, layers))
    count, favourite = [0, 0], np.full((n, heads), NONE)
    drop, summed = np.full((n, heads), np.nan), np.full((n, heads, layers), np.nan)
    for s in range(n):
        one = mass[s].astype(np.float64)
        if np.isnan(one).any():
            continue
        for h in range(heads):
            summed[s, h] = one[h].sum(0)
            favourite[s, h] = list(summed[s, h]).index(max(summed[s, h]))
            falls = [sorted(one[h, q])[-1] - sorted(one[h, q])[-2] for q in range(queries)]
            drop[s, h] = sum(falls) / queries
        if parts_s[s] >= 0:
            count[parts_s[s]] += 1
            layered[parts_s[s]] += one
            for h in range(heads):
                for q in range(queries):
                    ranked[parts_s[s], h, q] += sorted(one[h, q], reverse=True)
    for p in (0, 1):
        ranked[p] /= count[p]
        layered[p] /= count[p]
    return dict(zip(FIELDS, (ranked, layered, count, favourite, drop, summed), strict=True))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("queries", [1, 2, 5, 8])
def test_it_is_what_loops_over_samples_find(dtype, queries):
    mass, parts_s = made(queries=queries, dtype=dtype), parts()
    found = census(lazy(mass), parts_s)
    for name, expected in by_hand(mass, parts_s).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=2e-6, atol=1e-7, err_msg=name)
    assert found.ranked_phqk.dtype == found.layered_phql.dtype == np.float64
    assert (found.favourite_sh.dtype, found.drop_sh.dtype, found.summed_shl.dtype) == ("uint8", "float32", "float32")


def test_float16_is_decoded_exactly():
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(module._as_float32(every), every.astype(np.float32))


def test_ranks_fall_and_keep_all_mass():
    found = census(lazy(made()), parts())
    assert (np.diff(found.ranked_phqk, axis=-1) <= 0).all()
    np.testing.assert_allclose(found.ranked_phqk.sum(-1), found.layered_phql.sum(-1), rtol=1e-6)


def test_mean_drop_of_a_part_is_its_first_rank_less_its_second():
    parts_s = parts()
    found = census(lazy(made()), parts_s)
    for p in (0, 1):
        ranks = found.ranked_phqk[p].mean(1)
        expected = ranks[:, 0] - ranks[:, 1]
        np.testing.assert_allclose(np.nanmean(found.drop_sh[parts_s == p], axis=0), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_any_number_of_threads_gives_the_same_bytes(dtype):
    mass, parts_s = lazy(made(200, dtype=dtype), 7), parts(200)
    assert bits(census(mass, parts_s, threads=1)) == bits(census(mass, parts_s, threads=2))
    assert bits(census(mass, parts_s, threads=1)) == bits(census(mass, parts_s, threads=5))


def test_a_mass_that_is_summed_over_tokens_on_the_way_is_read_alike():
    rng = np.random.default_rng(0)
    tokens = rng.dirichlet(np.ones(24), size=(20, 2, 3)).reshape(20, 2, 3, 6, 4).astype(np.float16)
    tokens[7] = np.nan
    tokens[3, ..., 2:] = np.nan  # tokens that a sample does not have
    attention = xr.DataArray(tokens, dims=(*DIMS, "token")).chunk(sample=6)
    found = census(attention.astype("float32").sum("token", min_count=1), parts(20))
    tokens[3, ..., 2:] = 0
    assert found.favourite_sh[7].tolist() == [NONE] * 2
    expected = by_hand(tokens.astype(np.float32).sum(-1), parts(20))
    np.testing.assert_allclose(found.ranked_phqk, expected["ranked_phqk"], rtol=2e-6)
    np.testing.assert_array_equal(found.favourite_sh, expected["favourite_sh"])


def test_a_sample_without_attention_or_with_some_of_it_missing_counts_nowhere():
    mass, parts_s = made(missing=()), np.zeros(23, np.int8)
    mass[3], mass[7, 1, 2, 0], mass[8, 0, 0, 0] = np.nan, np.nan, np.inf
    found = census(lazy(mass), parts_s)
    gone = [3, 7, 8]
    assert found.count_p.tolist() == [20, 0]
    assert (found.favourite_sh[gone] == NONE).all() and np.isnan(found.drop_sh[gone]).all()
    assert np.isnan(found.summed_shl[gone]).all()
    left = np.delete(mass, gone, 0)
    np.testing.assert_allclose(found.layered_phql[0], left.astype(float).mean(0), rtol=1e-6)


def test_a_part_without_samples_is_nan_not_zero():
    found = census(lazy(made()), np.full(23, -1, np.int8))
    assert found.count_p.tolist() == [0, 0] and np.isnan(found.ranked_phqk).all() and np.isnan(found.layered_phql).all()
    assert (found.favourite_sh != NONE).sum() == 21 * 3, "samples of neither part vote all the same"


def test_one_sample_and_an_array_in_memory_will_do():
    mass = xr.DataArray(made(1, missing=()), dims=DIMS)
    found = census(mass, np.ones(1, np.int8))
    np.testing.assert_allclose(found.ranked_phqk[1], np.sort(mass.values[0].astype(float))[..., ::-1])
    assert (found.heads, found.layers) == (("0", "1", "2"), tuple("012345"))


def test_heads_and_layers_keep_their_labels():
    found = census(lazy(made(), head=["0.1", "0.2", "1.0"], layer=list("456789")), parts())
    assert found.heads == ("0.1", "0.2", "1.0") and found.layers == tuple("456789")


def test_the_lowest_of_layers_with_as_much_mass_is_the_favourite():
    mass = np.full((2, 1, 2, 4), 0.25, np.float16)
    mass[1] = [0.125, 0.375, 0.125, 0.375]
    assert census(lazy(mass), np.zeros(2, np.int8)).favourite_sh.tolist() == [[0], [1]]


def test_negative_zeros_are_zeros():
    mass = np.zeros((1, 1, 1, 3), np.float16)
    mass[...] = [-0.0, 1, -0.0]
    found = census(lazy(mass), np.zeros(1, np.int8))
    assert found.ranked_phqk[0].tolist() == [[[1, 0, 0]]] and found.drop_sh.item() == 1


def test_what_is_no_mass_is_refused():
    negative = made()
    negative[6, 1, 1, 1] = -0.125
    with pytest.raises(Refusal, match=r"a mass is -0\.125"):
        census(lazy(negative), parts())
    with pytest.raises(Refusal, match="of 1 layers"):
        census(lazy(made(layers=1)), parts())
    with pytest.raises(ValueError, match=r"give .* parts"):
        census(lazy(made()).transpose("head", ...), parts())
    with pytest.raises(ValueError, match="parts"):
        census(lazy(made()), parts(22))


def test_large_sums_lie_in_a_file_and_are_the_same(monkeypatch):
    in_memory = census(lazy(made()), parts())
    monkeypatch.setattr(module, "MEMORY_BYTES", 0)
    in_file = census(lazy(made()), parts())
    assert isinstance(in_file.summed_shl, np.memmap) and bits(in_file) == bits(in_memory)
    decisive_h = np.array([True, False, True])
    for name, ours in vars(votes(in_file, decisive_h)).items():
        np.testing.assert_array_equal(ours, getattr(votes(in_memory, decisive_h), name))


@pytest.mark.parametrize("vote_bytes", [1, 400, 2**26])
def test_votes_are_what_loops_over_samples_count(monkeypatch, vote_bytes):
    monkeypatch.setattr(module, "VOTE_BYTES", vote_bytes)
    mass, decisive_h = made(60, heads=7, layers=4), np.array([True, True, False, True, True, False, True])
    found = census(lazy(mass), parts(60))
    got = votes(found, decisive_h)
    ties = 0
    for s in range(60):
        if np.isnan(mass[s]).any():
            assert (got.l_star_s[s], got.votes_s[s], got.tied_s[s]) == (-1, 0, False)
            assert np.isnan(got.entropy_s[s]) and not got.counts_sl[s].any()
            continue
        counted = Counter(int(found.favourite_sh[s, h]) for h in range(7) if decisive_h[h])
        most = max(counted.values())
        leading = [layer for layer in range(4) if counted[layer] == most]
        total = {
            layer: sum(float(found.summed_shl[s, h, layer]) for h in range(7) if decisive_h[h]) for layer in leading
        }
        assert got.l_star_s[s] == max(leading, key=lambda layer: (total[layer], -layer))
        assert got.votes_s[s] == most and got.tied_s[s] == (len(leading) > 1)
        shares = [count / 5 for count in counted.values()]
        assert got.entropy_s[s] == pytest.approx(-sum(p * np.log2(p) for p in shares), abs=1e-12)
        assert got.counts_sl[s].tolist() == [counted[layer] for layer in range(4)]
        ties += len(leading) > 1
    assert 0 < ties < 58, "both kinds of samples are in it"


def test_a_tie_of_votes_and_mass_goes_to_the_lower_layer():
    mass = np.zeros((1, 2, 1, 3), np.float16)
    mass[0, 0, 0], mass[0, 1, 0] = [0, 0.75, 0.25], [0, 0.25, 0.75]
    got = votes(census(lazy(mass), np.zeros(1, np.int8)), np.ones(2, bool))
    assert got.l_star_s.tolist() == [1] and got.tied_s.all() and got.entropy_s.tolist() == [1.0]


def test_a_tie_of_votes_goes_to_the_layer_with_more_mass():
    mass = np.zeros((1, 2, 1, 3), np.float16)
    mass[0, 0, 0], mass[0, 1, 0] = [0, 0.625, 0.375], [0, 0.25, 0.75]
    got = votes(census(lazy(mass), np.zeros(1, np.int8)), np.ones(2, bool))
    assert got.l_star_s.tolist() == [2] and got.votes_s.tolist() == [1]


def test_without_decisive_heads_nobody_votes():
    got = votes(census(lazy(made()), parts()), np.zeros(3, bool))
    assert (got.l_star_s == -1).all() and np.isnan(got.entropy_s).all() and not got.votes_s.any()


def test_decisive_heads_are_given_as_bool():
    found = census(lazy(made()), parts())
    with pytest.raises(ValueError, match=r"give bool \[3\]"):
        votes(found, np.array([0, 2]))
