"""Blocks of a lazy array: every sample once, in order, few at a time; a failure is told at once."""

import threading

import dask.array as da
import numpy as np
import pytest
import xarray as xr

import store
from analysis.blocks import AHEAD, over_blocks
from analysis.census import census
from store.errors import Refusal
from store.scheduler import connect
from store.synthetic import synthetic_plan


@pytest.fixture(scope="module")
def cluster():
    """Address of a Dask cluster of two processes."""
    with connect("local:2") as client:
        yield client.scheduler.address


def sums(values, samples):
    return values.sum(), samples


def refuse(values, samples):
    raise Refusal(f"sample {samples.start} is not to my taste")


def array(n=20, chunk=6):
    return xr.DataArray(np.arange(n * 3.0).reshape(n, 3), dims=("sample", "x")).chunk(sample=chunk, x=2)


@pytest.mark.parametrize("workers", [1, 3, "cluster"])
def test_blocks_are_chunks_of_samples_whole_and_in_order(workers, request):
    given, address = array(), request.getfixturevalue(workers) if workers == "cluster" else None
    found = list(over_blocks(sums, given, dask=address, threads=None if address else workers))
    cuts = [slice(0, 6), slice(6, 12), slice(12, 18), slice(18, 20)]
    assert [samples for samples, _ in found] == cuts
    assert [result for _, result in found] == [(given.values[cut].sum(), cut) for cut in cuts]


def test_an_array_in_memory_is_cut_by_size(monkeypatch):
    monkeypatch.setattr("analysis.blocks.BLOCK_BYTES", 8 * 24)
    found = list(over_blocks(sums, array().compute()))
    assert [samples for samples, _ in found] == [slice(0, 8), slice(8, 16), slice(16, 20)]


def test_a_census_of_a_store_on_a_cluster_of_processes_has_the_same_bytes(cluster, tmp_path):
    n, dims = 40, ("sample", "head", "query", "layer")
    random = np.random.default_rng(0)
    mass, parts_s = random.dirichlet(np.ones(6), (n, 3, 5)), random.integers(-1, 2, n).astype(np.int8)
    mass[[4, 11]] = np.nan
    store.create(tmp_path / "s.zarr", synthetic_plan(n))
    with store.derive(tmp_path / "s.zarr", "mass", dims, mass.shape, "float16") as out:
        out.write(mass)
    lazy = store.open(tmp_path / "s.zarr").derived["mass"].chunk(sample=8)
    here, there = census(lazy, parts_s, threads=2), census(lazy, parts_s, dask=cluster)
    assert here.count_p.sum() > 0
    for name, found in vars(here).items():
        same = found.tobytes() == getattr(there, name).tobytes() if isinstance(found, np.ndarray) else True
        assert same, name


def test_only_a_few_blocks_are_in_hand():
    made, most, lock, taken = set(), 0, threading.Lock(), 0

    def make(block, block_info=None):
        nonlocal most
        with lock:
            made.add(block_info[0]["chunk-location"][0])
            most = max(most, len(made) - taken)
        return block

    lazy = da.zeros((40, 2), chunks=(1, 2)).map_blocks(make, meta=np.empty((0, 0)))
    for _ in over_blocks(sums, xr.DataArray(lazy, dims=("sample", "x")), threads=2):
        taken += 1
    assert len(made) == 40 and most <= 2 * AHEAD + 1


def test_a_refusal_of_the_work_comes_as_it_is(cluster):
    for address in (None, cluster):
        with pytest.raises(Refusal, match=r"^sample 0 is not to my taste$"):
            list(over_blocks(refuse, array(), dask=address))


def test_no_scheduler_is_a_refusal(monkeypatch):
    monkeypatch.setattr("store.scheduler.PATIENCE", "1s")
    with pytest.raises(Refusal, match=r"--dask tcp://127.0.0.1:1: no scheduler answers"):
        list(over_blocks(sums, array(), dask="tcp://127.0.0.1:1"))


def test_nothing_is_left_running_when_the_reader_stops_early():
    before = threading.active_count()
    for _ in over_blocks(sums, array(), threads=2):
        break
    assert threading.active_count() <= before + 1
