"""Damage: whatever byte of whatever file changes, `verify` says where, and `repair` and the same command mend it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import store
from store.commits import Commit
from store.places import locate
from store.repair import repair
from store.shards import DamagedShard
from store.synthetic import synthetic_plan, synthetic_sample

PLAN = {"seed": 3, "samples_per_block": 4, "image": (3, 12), "text": (5, 20), "attention": ("text_to_image",)}
FIRST = {"n_samples": 9, "layers": ("embed", "final"), "attention_layers": ("0",)}
GROWN = {"n_samples": 14, "layers": ("embed", "0", "final"), "attention_layers": ("0", "1")}
ASIDE = {2, 13}
ONE_BYTE, HALF, ALL, MORE = "a byte is flipped", "the end is cut off", "it is gone", "a byte is added"


def fill(path):
    """Do all that is left, by two workers in turn."""
    for part in range(len(store.load_parts(path))):
        for number, b in enumerate(store.pending(path, part)):
            with store.Writer(path, f"w{number % 2}", part) as writer, writer.block(b) as block:
                for sample in block.samples:
                    if sample in ASIDE:
                        block.set_aside(sample, "it does not open")
                    else:
                        block.add(sample, **synthetic_sample(writer.plan, sample))


def derive(path):
    n = store.load_plan(path).n_samples
    with store.derive(path, "mass", ("sample", "head"), (n, 2), coordinates={"head": ["left", "right"]}) as out:
        out.write(np.arange(2 * n).reshape(n, 2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with two generations, added layers, a derived array, samples set aside and the logs of two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.plan.SHARD_BYTES", 2500)
        path = store.create(tmp_path_factory.mktemp("whole") / "store", synthetic_plan(**PLAN, **FIRST))
        fill(path)
        store.grow(path, synthetic_plan(**PLAN, **GROWN))
        fill(path)
        derive(path)
        yield path


@pytest.fixture(scope="module")
def names(whole):
    return locate(whole).names()


def change(file, damage, place):
    """Damage a file; ``place`` is from 0 to 1."""
    data = bytearray(file.read_bytes())
    if damage == ALL:
        file.unlink()
    elif damage == HALF:
        file.write_bytes(data[: int(place * len(data))])
    elif damage == MORE:
        file.write_bytes(data + bytes([int(place * 255)]))
    else:
        data[int(place * len(data))] ^= 1 << int(place * 977) % 8
        file.write_bytes(data)


def blocks_of(path, name):
    """The (part, block) pairs whose commits name a file; those in a log, if it is one."""
    if name.startswith("record/commits/"):
        return {(one.part, one.block) for one in map(Commit.parse, (path / name).read_bytes().splitlines())}
    commits = store.open(path).commits
    return {(part, b) for part, by_block in enumerate(commits) for b, one in by_block.items() if name in one.files}


def check(whole, folder, damages):
    """Damage a copy by (file, damage, place); it must be found, named and mended, with nothing else done again."""
    path = Path(shutil.copytree(whole, folder / "damaged"))
    before = store.verify(path)
    assert before.ok, before.problems
    blocks = {name: blocks_of(path, name) for name, *_ in damages}
    concerned = set().union(*blocks.values())
    in_logs = set().union(*(blocks[name] for name in blocks if name.startswith("record/commits/")))
    for name, damage, place in damages:
        change(path / name, damage, place)
    report = store.verify(path)
    assert not report.ok, damages
    said = "\n".join(report.problems)
    # Without a plan or a root nothing else can be told, and without its commit nothing of a block.
    rootless = [name for name, damage, _ in damages if name == "zarr.json" and damage == "it is gone"]
    told = [name for name in blocks if name == "record/plan.json"] or [
        name for name in blocks if name.startswith("record/commits/") or not blocks[name] or blocks[name] - in_logs
    ]
    if any(name.startswith("record/derived/") for name in blocks):  # it has the checksums of its array's chunks
        told = [name for name in told if not (name.startswith("derived/") and "/c/" in name)]
    told = rootless or told
    for name in told:
        # Of a log that lost whole lines, its blocks are named: there is nothing else that could be.
        log = name.startswith("record/commits/") and "not committed" in said
        derived = name.startswith("record/derived/") and "derived" in said
        assert name in said or log or derived, (damages, said)
    assert set(report.damaged_blocks) <= concerned, damages
    repair(path)
    left = {(part, b) for part in range(2) for b in store.pending(path, part)}
    assert left <= concerned, damages
    fill(path)
    if "mass" not in store.open(path).derived:
        assert any("derived/" in name for name, *_ in damages)
        derive(path)
    after = store.verify(path)
    assert after.ok, (damages, after.problems)
    assert after.content_hash == before.content_hash
    assert set(locate(path).names()) == set(locate(whole).names())
    for name in locate(path).names():
        if not name.startswith(("record/commits/", "record/results/", "record/tokens/")):
            assert (path / name).read_bytes() == (whole / name).read_bytes(), (damages, name)
    shutil.rmtree(path)


def noticed(name, damage):
    """A piece of a line at the end of a log is what a kill leaves: it is no damage."""
    return not (name.startswith("record/commits/") and damage == MORE)


@pytest.mark.parametrize("damage", [ONE_BYTE, HALF, ALL, MORE])
@pytest.mark.parametrize("part", range(2))
def test_damage_to_any_file_is_found_named_and_mended(whole, names, tmp_path, damage, part):
    rng = np.random.default_rng(part)
    for name in names[part::16]:
        if noticed(name, damage):
            check(whole, tmp_path, [(name, damage, rng.random())])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [ONE_BYTE, HALF, ALL, MORE])
def test_damage_to_every_file_in_many_places_is_found_named_and_mended(whole, names, tmp_path, damage):
    for name in filter(lambda name: noticed(name, damage), names):
        for place in [0.0] if damage == ALL else np.linspace(0, 0.999, 4):
            check(whole, tmp_path, [(name, damage, float(place))])


def test_every_byte_of_the_record_counts(whole, names, tmp_path):
    """What is not states: each byte of each file, flipped, is found."""
    path = Path(shutil.copytree(whole, tmp_path / "flipped"))
    small = [name for name in names if name.startswith("record/") and not name.endswith(".parquet")]
    rng = np.random.default_rng(0)
    for name in small:
        data = (path / name).read_bytes()
        for at in rng.choice(len(data), min(len(data), 6), replace=False).tolist():
            (path / name).write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
            assert not store.verify(path).ok, (name, at)
        (path / name).write_bytes(data)
    assert store.verify(path).ok


@given(st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_damage_to_several_files_at_once_is_found_named_and_mended(whole, names, tmp_path, data):
    damages = data.draw(
        st.lists(
            st.tuples(st.sampled_from(names), st.sampled_from([ONE_BYTE, HALF, ALL, MORE]), st.floats(0, 0.999)),
            min_size=2,
            max_size=5,
            unique_by=lambda one: one[0].replace("/twins/", "/"),  # of a file and its copy, one is whole
        ).filter(lambda drawn: all(noticed(name, damage) for name, damage, _ in drawn))
    )
    shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
    check(whole, tmp_path, damages)


@pytest.mark.parametrize("damage", [ONE_BYTE, HALF, ALL])
@pytest.mark.parametrize("kind", ["samples", "set_aside"])
def test_a_damaged_table_of_the_plan_hides_no_other_damage(whole, names, tmp_path, kind, damage):
    table = next(name for name in names if name.startswith(f"record/{kind}-"))
    check(whole, tmp_path, [("attention/layer/c/0", ONE_BYTE, 0.0), (table, damage, 0.4)])


@pytest.mark.parametrize("damage", [ONE_BYTE, HALF, ALL])
def test_a_damaged_list_of_what_was_laid_out_hides_no_other_damage(whole, names, tmp_path, damage):
    coordinate, array = "attention/layer/c/0", "hidden_1/image/zarr.json"
    check(whole, tmp_path, [(coordinate, ONE_BYTE, 0.0), (array, HALF, 0.5), ("record/layout.json", damage, 0.4)])


@pytest.mark.parametrize("name", ["plan.json", "samples", "set_aside"])
def test_a_file_whose_copy_is_damaged_too_cannot_be_mended_and_that_is_said(whole, names, tmp_path, name):
    path = Path(shutil.copytree(whole, tmp_path / "damaged"))
    both = [one for one in names if one.startswith((f"record/{name}", f"record/twins/{name}"))]
    assert len(both) == 2
    for one in both:
        change(path / one, ONE_BYTE, 0.5)
    report = store.verify(path)
    assert not report.ok and all(one in "\n".join(report.problems) for one in both)
    with pytest.raises(store.Refusal, match=r"and its second copy are both damaged: make the store again"):
        repair(path)


def test_two_files_that_changed_places_are_found(whole, names, tmp_path):
    shards = [name for name in names if name.startswith("hidden/image/c/")]
    sizes = {}
    for name in shards:
        sizes.setdefault((whole / name).stat().st_size, []).append(name)
    path = Path(shutil.copytree(whole, tmp_path / "damaged"))
    first, second = next((two[:2] for two in sizes.values() if len(two) > 1), shards[:2])
    (path / first).rename(path / "aside")
    (path / second).rename(path / first)
    (path / "aside").rename(path / second)
    said = "\n".join(store.verify(path).problems)
    assert first in said and second in said


def test_damage_never_reads_as_values(whole, names, tmp_path):
    """Compressed or not, a reader that meets damage to an index says so; what it cannot know, `verify` does."""
    path = Path(shutil.copytree(whole, tmp_path / "damaged"))
    name = next(name for name in names if name.startswith("hidden/text/c/"))
    change(path / name, HALF, 0.5)
    with pytest.raises((store.Refusal, DamagedShard), match="hidden/text"):
        store.open(path).read(range(2), "final")
