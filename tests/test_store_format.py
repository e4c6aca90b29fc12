"""The store's bytes: what goes in comes out, for our readers and for stock zarr and xarray, without warnings."""

import tempfile
import warnings
from pathlib import Path

import dask.array
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import store
from store import bits
from store.synthetic import synthetic_plan, synthetic_sample, synthetic_store

ATTENTION = {"attention": ("text_to_image", "text_to_text"), "attention_layers": ("0", "1")}


@pytest.fixture(scope="module")
def plan():
    return synthetic_plan(20, seed=1, **ATTENTION)


@pytest.fixture(scope="module")
def path(plan, tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("format") / "store.zarr", plan)


def expected(plan, name, sample):
    """What was given for one sample: hidden states in bits, attention as kept."""
    values = synthetic_sample(plan, sample)[name.split("/")[1]]
    return values.astype(np.float16) if name.startswith("attention/") else values


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    n_samples=st.integers(1, 11),
    per_block=st.sampled_from([1, 2, 4, 6]),
    image=st.tuples(st.integers(1, 20), st.integers(0, 9)),
    n_text=st.tuples(st.integers(4, 12), st.integers(0, 25)),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    codec=st.sampled_from(["zstd", "none"]),
    heads=st.sampled_from([None, 2]),
)
def test_every_bit_survives_whatever_the_counts_the_dtype_and_the_codec(
    seed, n_samples, per_block, image, n_text, dtype, codec, heads
):
    plan = synthetic_plan(
        n_samples,
        seed,
        image=(image[0], sum(image)),
        text=(n_text[0], sum(n_text)),
        dtype=dtype,
        codec=codec,
        samples_per_block=per_block,
        width=6,
        attention_heads=heads,
        **ATTENTION,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic_store(Path(folder) / "store", plan)
        opened, stock = store.open(path), zarr.open_group(path, mode="r")
        for name, array in plan.arrays.items():
            bits_slr = stock[name][:]
            lazy = (opened.hidden if name.startswith("hidden/") else opened.attention)[name.split("/")[1]]
            assert lazy.shape == bits_slr.shape == array.shape
            np.testing.assert_array_equal(lazy.values, bits.to_float32(bits_slr))
            for sample in range(n_samples):
                values = expected(plan, name, sample)
                real = (sample, *(slice(n) for n in values.shape))
                assert bits_slr[real].tobytes() == values.tobytes()
                rest = bits.to_float32(bits_slr[sample]).copy()
                rest[real[1:]] = np.nan
                assert np.isnan(rest).all()


def test_stock_xarray_opens_both_groups_lazily_with_names_and_coordinates(path, plan):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=ResourceWarning)
        hidden = xr.open_zarr(path, group="hidden", consolidated=False)
        attention = xr.open_zarr(path, group="attention")
        tree = xr.open_datatree(path)
    assert hidden.image.dims == hidden.text.dims == ("sample", "layer", "token", "width")
    assert attention.text_to_image.dims == ("sample", "layer", "query", "token")
    assert isinstance(hidden.image.data, dask.array.Array)
    assert hidden.layer.values.tolist() == list(plan.layers)
    assert hidden.sample.values.tolist() == plan.samples["sample_id"].to_list()
    one = hidden.text.sel(layer="final", sample="made-1-00007").values
    values = expected(plan, "hidden/text", 7)[2]
    np.testing.assert_array_equal(one[: len(values)], values)
    assert tree["hidden/text"].attrs["bits"] == "bfloat16"
    assert tree.attrs["identity_hash"] == plan.identity_hash
    walked = xr.open_datatree(path, engine="zarr", consolidated=False)
    assert walked["attention/text_to_text"].shape == plan.arrays["attention/text_to_text"].shape


def test_creating_and_opening_a_store_warns_of_nothing(tmp_path, plan):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=ResourceWarning)
        synthetic_store(tmp_path / "store", plan, blocks=[0])
        store.open(tmp_path / "store").hidden.text.isel(sample=0).compute()


def test_a_sample_is_one_run_of_bytes_over_all_its_layers(path, plan):
    offsets, lengths = store.open(path).reader("hidden/text").locate(np.arange(8), range(3), (0, 0))
    assert (np.diff(offsets, axis=1) == lengths[:, :-1]).all()


def test_padding_chunks_are_left_out_of_a_shard(tmp_path):
    plan = synthetic_plan(8, text=(5, 200), width=64, codec="none")
    path = synthetic_store(tmp_path / "store", plan)
    on_disk = (path / plan.arrays["hidden/text"].shard_file(0)).stat().st_size
    assert on_disk < 1.3 * plan.bytes_raw()["hidden/text"]
    assert on_disk <= plan.bytes_estimate()["hidden/text"] + 4


def test_lazy_selection_equals_selection_of_all(path):
    lazy = store.open(path).hidden.image
    whole = lazy.values
    for key in [(3,), (slice(2, 15, 3), 1), ([4, 19, 0], slice(1, 3), slice(2, 9)), (7, 2, 3, 5), (slice(0, 0),)]:
        np.testing.assert_array_equal(lazy[key].values, whole[key])


def test_a_layer_is_chosen_by_name_and_reduced_over_real_tokens_only(path, plan):
    mean = store.open(path).hidden.text.sel(layer="0").mean("token").values
    for sample in range(plan.n_samples):
        values = bits.to_float32(expected(plan, "hidden/text", sample)[1])
        np.testing.assert_allclose(mean[sample], values.mean(0), rtol=1e-4, atol=1e-6)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_bfloat16_rounds_as_torch_does(values):
    import torch

    ours = bits.to_float32(bits.from_float32(np.array(values, np.float32)))
    np.testing.assert_array_equal(ours, torch.tensor(values, dtype=torch.float32).bfloat16().float().numpy())


def test_a_lazy_array_survives_the_way_to_another_process(path):
    from distributed.protocol import deserialize, serialize

    image = store.open(path).hidden.image
    again = deserialize(*serialize(image))
    np.testing.assert_array_equal(again.values, image.values)


def test_identity_and_format_version_are_in_the_attributes(path, plan):
    opened = store.open(path)
    assert opened.attrs["format_version"] == 2
    assert dict(opened.identity) == dict(plan.identity) == opened.attrs["identity"]
    assert "final" in opened.attrs["layer_semantics"]
