"""The proxy's attention written back into the store: whose it is, for which tokens, whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from commands import run_here
from planted import SMALL, planted_store

import probes
import store
from probes.attend import attend
from probes.config import AttendConfig, TrainConfig
from probes.sweep import train
from probes.trained import MAKING, WEIGHTS
from store.errors import Refusal

ASIDE, SILENT, N = (0, 7, 8, 47), (3, 20), 48
ROUNDING = 2**-11 + 60 * 2**-25
"""Half a unit in the last place of float16 and what its smallest step takes from 60 keys."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("planted") / "store", N, aside=ASIDE, silent=SILENT)


@pytest.fixture(scope="module")
def proxies(planted, tmp_path_factory):
    """Folders of briefly trained probes, by name."""
    out, found = tmp_path_factory.mktemp("runs"), {}
    for name, layers, tokens, kind in (
        ("layer", ("1",), "all", "qformer"),
        ("joint", ("0", "1", "final"), "text", "qformer"),
        ("words", ("1",), "instruction", "qformer"),
        ("linear", ("1",), "all", "linear"),
    ):
        asked = {"layers": layers, "tokens": tokens, "probe": kind, "seeds": (0,)} | SMALL
        train(TrainConfig(str(planted), out / name, **asked))
        (found[name],) = (out / name / "proxies").iterdir()
    return found


@pytest.fixture
def place(planted, tmp_path):
    return shutil.copytree(planted, tmp_path / "store.zarr")


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def changed(proxy, folder, **spec):
    """A copy of a probe with another spec."""
    shutil.copytree(proxy, folder)
    told = json.loads((folder / MAKING).read_text())
    told["spec"] |= spec
    (folder / MAKING).write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("which", ["layer", "joint", "words"])
def test_what_is_written_is_what_the_proxy_attends_to_in_the_order_of_read_and_nan_elsewhere(proxies, place, which):
    attend(AttendConfig((proxies[which],), str(place), batch=5))
    opened, proxy = store.open(place), probes.load(proxies[which])
    (found,) = opened.derived.values()
    assert found.dims == ("sample", "head", "query", "layer", "token") and found.dtype == np.float16
    without = {*ASIDE, *(SILENT if which == "words" else ())}
    for sample in range(N):
        here = found[sample].values
        if sample in without:
            assert np.isnan(here).all()
            continue
        states, mask = opened.read([sample], proxy.spec.layers, proxy.spec.tokens)
        _, expected = proxy.predict_states(states, mask, attention=True)
        count = int(mask.sum())
        np.testing.assert_allclose(here[..., :count], expected[0, ..., :count].numpy(), rtol=2**-10, atol=1e-6)
        assert np.isnan(here[..., count:]).all() and not np.isnan(here[..., :count]).any()
        assert (abs(here[..., :count].astype(np.float32).sum((-1, -2)) - 1) <= ROUNDING).all()
    assert found.shape[1:4] == (4, 3, len(proxy.spec.layers))
    longest = max(int(opened.read([s], "1", proxy.spec.tokens)[1].sum()) for s in range(N) if s not in without)
    assert found.sizes["token"] == longest
    assert found["head"].values.tolist() == ["0.0", "0.1", "1.0", "1.1"]
    assert found.sel(layer="1").sum("token").dims == ("sample", "head", "query")
    assert store.verify(place).ok


def test_the_mass_of_several_proxies_is_their_attention_summed_over_tokens(proxies, place):
    both = (proxies["layer"], proxies["joint"])
    attend(AttendConfig(both, str(place)))
    attend(AttendConfig(both, str(place), keep="mass", batch=5))
    derived = store.open(place).derived
    assert len(derived) == 4
    for name in [name for name in derived if name.startswith("mass-")]:
        mass, whole = derived[name], derived[name.replace("mass-", "attention-")]
        assert mass.dims == ("sample", "head", "query", "layer") and mass.dtype == np.float16
        summed = whole.astype(np.float32).sum("token", skipna=True, min_count=1).values
        np.testing.assert_allclose(mass.values, summed, rtol=2**-10, atol=60 * 2**-25)
        assert np.isnan(mass.values[list(ASIDE)]).all() and mass.attrs["proxy"] == whole.attrs["proxy"]
        assert "summed over the tokens" in mass.attrs["mass"] and "token" not in mass.attrs
    assert store.verify(place).ok


def test_no_proxy_and_one_name_for_several_are_refused(proxies, place):
    with pytest.raises(Refusal, match="--proxy names no proxy"):
        AttendConfig((), str(place))
    with pytest.raises(Refusal, match="--name eyes is one name for 2 proxies"):
        AttendConfig((proxies["layer"], proxies["joint"]), str(place), name="eyes")


def test_the_array_says_whose_it_is_and_what_lies_along_its_tokens(proxies, place):
    attend(AttendConfig((proxies["joint"],), str(place)))
    proxy = probes.load(proxies["joint"])
    ((name, found),) = store.open(place).derived.items()
    assert name == f"attention-joint-0-1-final-text-seed0-{proxy.hash[:8]}"
    told = found.attrs
    assert (told["proxy"], told["seed"], told["samples"]) == (proxy.hash, 0, N - len(ASIDE))
    assert told["spec"]["layers"] == ["0", "1", "final"] and told["spec"]["tokens"] == "text"
    assert told["run"] == str(proxies["joint"].parent.parent) and {"version", "sources"} == set(told["code"])
    assert "Store.read(samples, layers, 'text')" in told["token"]


def test_proxies_of_other_sizes_lie_side_by_side_in_one_store(proxies, place):
    for which in ("layer", "joint", "words"):
        attend(AttendConfig((proxies[which],), str(place)))
    opened, tree = store.open(place), xr.open_datatree(place)
    assert len({tuple(found.sizes.values()) for found in opened.derived.values()}) == 3
    for name, found in opened.derived.items():
        stock = xr.open_zarr(place, group=f"derived/{name}")[name]
        np.testing.assert_array_equal(stock.values[opened.plan.rows], found.values)
        assert tree[f"derived/{name}"]["layer"].values.tolist() == found["layer"].values.tolist()
    assert store.verify(place).ok


def test_asked_again_it_says_that_it_is_there_and_changes_nothing(proxies, place, capsys):
    attend(AttendConfig((proxies["layer"],), str(place)))
    before = files(place)
    capsys.readouterr()
    attend(AttendConfig((proxies["layer"],), str(place)))
    assert "already, of this proxy" in capsys.readouterr().out
    assert files(place) == before


def test_a_name_of_another_proxys_attention_or_of_another_array_is_refused(proxies, place):
    attend(AttendConfig((proxies["layer"],), str(place), name="eyes"))
    with store.derive(place, "norms", ("sample",), (N,)) as out:
        out.write(np.ones(N))
    before = files(place)
    hashes = [probes.load(proxies[which]).hash[:8] for which in ("layer", "joint")]
    with pytest.raises(
        store.Refusal, match=f"of proxy {hashes[0]}, not of {hashes[1]}: give another --name, or .*drop"
    ):
        attend(AttendConfig((proxies["joint"],), str(place), name="eyes"))
    with pytest.raises(store.Refusal, match="no proxy's attention"):
        attend(AttendConfig((proxies["joint"],), str(place), name="norms"))
    assert files(place) == before


def test_after_the_store_grew_it_says_how_many_samples_lack_it(proxies, place, capsys):
    attend(AttendConfig((proxies["layer"],), str(place)))
    planted_store(place, N + 12, grow=True)
    capsys.readouterr()
    attend(AttendConfig((proxies["layer"],), str(place)))
    said = capsys.readouterr().out
    assert "44 of 56 samples" in said and "store drop" in said
    ((name, found),) = store.open(place).derived.items()
    assert found.sizes["sample"] == N + 12 and np.isnan(found.values[N:]).all()
    store.drop(place, f"derived/{name}")
    attend(AttendConfig((proxies["layer"],), str(place)))
    assert not np.isnan(store.open(place).derived[name].values[N:, ..., :4]).all((1, 2, 3, 4)).any()


KILLED = """
import os, signal, sys, store.growth
from probes.attend import attend
from probes.config import AttendConfig
store.growth.CHUNK_BYTES = store.growth.SHARD_BYTES = 1
whole, left = store.growth.Deriving._write, [int(sys.argv[3])]
def write(self, *given):
    whole(self, *given)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
store.growth.Deriving._write = write
attend(AttendConfig((sys.argv[1],), sys.argv[2], batch=4))
"""


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_seen_and_the_same_command_completes_it(proxies, place):
    before = xr.open_datatree(place)
    given = [sys.executable, "-c", KILLED, proxies["layer"], place, "17"]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # A file a sample; 0, 7 and 8 have no states, and so no file.
    assert len([name for name in files(place) if name.startswith("derived/")]) == 17 - 3
    assert not store.open(place).derived and store.verify(place).ok
    assert xr.open_datatree(place).groups == before.groups
    attend(AttendConfig((proxies["layer"],), str(place)))
    ((name, found),) = store.open(place).derived.items()
    unhurt = shutil.copytree(place, place.parent / "other.zarr")
    store.drop(unhurt, f"derived/{name}")
    attend(AttendConfig((proxies["layer"],), str(unhurt)))
    np.testing.assert_array_equal(found.values, store.open(unhurt).derived[name].values)
    assert store.verify(place).ok and files(place).keys() == files(unhurt).keys()


def test_a_store_on_s3_gets_the_same(proxies, place, s3):
    remote = planted_store(s3, N, aside=ASIDE, silent=SILENT)
    for path in (place, remote):
        attend(AttendConfig((proxies["joint"],), str(path)))
    one, other = (store.open(path).derived for path in (place, remote))
    assert list(one) == list(other)
    np.testing.assert_array_equal(*(next(iter(found.values())).values for found in (one, other)))


def test_probes_without_cross_attention_and_of_drawn_keys_are_refused(proxies, place, tmp_path):
    drawn = changed(proxies["joint"], tmp_path / "drawn", keys=6)
    before = files(place)
    with pytest.raises(store.Refusal, match="of kind linear: only a qformer"):
        attend(AttendConfig((proxies["linear"],), str(place)))
    with pytest.raises(store.Refusal, match=r"reads 6 keys drawn .* cannot attend to all tokens"):
        attend(AttendConfig((drawn,), str(place)))
    assert files(place) == before


def test_a_control_stores_probe_attends_in_that_store_only(proxies, planted, place, tmp_path):
    control = {"name": "random-weights", "seed": 0}
    other = planted_store(tmp_path / "control", N, identity={"planted": "1", "control": control})
    trained = changed(proxies["layer"], tmp_path / "random-1-seed0", source="random-weights")
    told = json.loads((trained / MAKING).read_text())
    told["store"] |= {"identity": dict(store.open(other).identity), "path": str(other)}
    (trained / MAKING).write_text(json.dumps(told))
    with pytest.raises(store.Refusal, match=rf"control is null here and .*random-weights.* there; give {other}"):
        attend(AttendConfig((trained,), str(place)))
    with pytest.raises(store.Refusal, match=r"control is .*random-weights.* here and null there"):
        attend(AttendConfig((proxies["layer"],), str(other)))
    attend(AttendConfig((trained,), str(other)))
    (found,) = store.open(other).derived.values()
    assert found.attrs["spec"]["source"] == "random-weights"


def test_layers_that_a_store_lacks_are_refused_by_name(proxies, place, tmp_path):
    lacking = changed(proxies["layer"], tmp_path / "lacking", layers=["17"])
    with pytest.raises(store.Refusal, match="layer 17 is not in"):
        attend(AttendConfig((lacking,), str(place)))
    wider = store.create(tmp_path / "wide", store.Plan(("1",), 32, store.open(place).plan.samples, {"planted": "1"}))
    with pytest.raises(store.Refusal, match="32 wide, and probe layer-1 reads 16"):
        attend(AttendConfig((proxies["layer"],), str(wider)))
    empty = store.create(tmp_path / "empty", store.open(place).plan)
    with pytest.raises(store.Refusal, match="no sample of"):
        attend(AttendConfig((proxies["layer"],), str(empty)))


def test_its_weights_are_read_by_their_hash(proxies):
    proxy = probes.load(proxies["layer"])
    assert proxy.hash == json.loads((proxies["layer"] / MAKING).read_text())["weights"]
    assert len(proxy.hash) == 64 and (proxies["layer"] / WEIGHTS).is_file()


def test_the_command_answers_with_codes_and_a_bar(proxies, place):
    given = ["probes", "attend", "--proxy", proxies["layer"], "--store", place]
    first, again, wrong = (run_here(*given, *more) for more in ([], [], ["--batch", "0"]))
    assert first.returncode == 0 and "44/44" in first.stderr and "sample/s" in first.stderr
    assert "in float16 the sum over layers and tokens is 1 within" in first.stdout
    assert again.returncode == 0 and "already" in again.stdout
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --batch 0")
