"""Rows of shards are had by place, in any order, as a walk over all gives them, and without reading the rest."""

import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileOpener
from hostile_shards import damage
from hypothesis import given, settings
from hypothesis import strategies as st
from test_extract_omniedit import row as good_row

from extract.omniedit import Checks, Sample, judged, read
from extract.rows import Place, SetAside, Shards
from store.errors import Refusal


def row(number, size=100):
    return {
        "omni_edit_id": f"id{number}",
        "task": "swap",
        "src_img": {"bytes": np.random.default_rng(number).bytes(size), "path": None},
        "edited_img": {"bytes": bytes(size), "path": None},
        "edited_prompt_list": [f"first {number}"],
        "o_score": number / 2,
    }


def write(path, rows, **given):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **given)
    return path


def walked(shards, seed=None):
    """What a walk gives, by place."""
    items = list(shards.walk(seed))
    return {item.place if isinstance(item, SetAside) else item[0]: item for item in items}


def without_place(item):
    return item if isinstance(item, SetAside) else item[1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_by_place_are_the_rows_of_a_walk_in_any_order_and_memory(data):
    counts = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=3).filter(any))
    group_size = data.draw(st.integers(1, 100))
    memory = data.draw(st.sampled_from([0, 5_000, 1 << 20]))
    with tempfile.TemporaryDirectory() as folder:
        for shard, count in enumerate(counts):
            rows = [row(1000 * shard + number) for number in range(count)]
            table = pa.Table.from_pylist(rows, schema=pa.Table.from_pylist([row(0)]).schema)
            pq.write_table(table, f"{folder}/{shard}.parquet", row_group_size=group_size, use_dictionary=False)
        if data.draw(st.booleans()):
            damage(Path(folder) / f"{np.argmax(counts)}.parquet", 0)
        expected = walked(Shards(folder))
        assert len(expected) == sum(counts)
        assert walked(Shards(folder, memory=memory), seed=data.draw(st.integers(0, 9))) == expected
        places = data.draw(st.lists(st.sampled_from(sorted(expected)), max_size=120))
        shards = Shards(folder, memory=memory)
        for first in range(0, len(places), 50):  # blocks, one object
            block = places[first : first + 50]
            assert list(shards.rows(block)) == [without_place(expected[place]) for place in block]


def test_a_place_holds_where_the_folder_is_moved(tmp_path):
    write(tmp_path / "here" / "deep" / "a.parquet", [row(0), row(1)])
    places = [place for place, _ in Shards(tmp_path / "here").walk()]
    assert places == [("deep/a.parquet", 0), ("deep/a.parquet", 1)]
    fingerprint = Shards(tmp_path / "here").fingerprint()
    (tmp_path / "here").rename(tmp_path / "there")
    moved = Shards(tmp_path / "there")
    assert [found["omni_edit_id"] for found in moved.rows(places[::-1])] == ["id1", "id0"]
    assert moved.fingerprint() == fingerprint


def test_one_shard_alone_is_a_data_set(tmp_path):
    write(tmp_path / "b.parquet", [row(9)])
    shards = Shards(write(tmp_path / "a.parquet", [row(0), row(1)]))
    assert [place for place, _ in shards.walk()] == [("a.parquet", 0), ("a.parquet", 1)]
    assert [found["omni_edit_id"] for found in shards.rows([Place("a.parquet", 1)])] == ["id1"]


def test_the_fingerprint_tells_data_that_changed(tmp_path):
    path = write(tmp_path / "a.parquet", [row(0), row(1)])
    seen = {Shards(tmp_path).fingerprint()}
    for change in (
        lambda: write(path, [row(0), row(1, size=101)]),
        lambda: write(tmp_path / "b.parquet", [row(2)]),
        lambda: (tmp_path / "b.parquet").rename(tmp_path / "c.parquet"),
        lambda: (tmp_path / "c.parquet").write_bytes(b"no longer one"),
    ):
        change()
        assert Shards(tmp_path).fingerprint() not in seen
        seen.add(Shards(tmp_path).fingerprint())


def vanish(path):
    path.unlink()


def shrink(path):
    write(path, [row(0)])


def break_off(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("decay", "says"), [(vanish, "a.parquet"), (shrink, "it has 1 rows"), (break_off, "magic bytes")]
)
def test_what_decayed_since_planning_is_set_aside_with_the_reason_and_the_rest_goes_on(tmp_path, decay, says):
    path = write(tmp_path / "a.parquet", [row(0), row(1)])
    write(tmp_path / "b.parquet", [row(2)])
    opened = Shards(tmp_path)  # it has listed the shards and read nothing yet
    decay(path)
    for shards in (opened, Shards(tmp_path)):
        lost, kept = shards.rows([Place("a.parquet", 1), Place("b.parquet", 0)])
        assert (lost.reason, lost.place, lost.rows) == ("shard cannot be read", ("a.parquet", 1), 1)
        assert says in lost.detail
        assert str(tmp_path) not in lost.detail
        assert kept["omni_edit_id"] == "id2"


@pytest.mark.parametrize("decay", [vanish, shrink, break_off])
def test_what_decays_after_its_footer_was_read_is_set_aside_too(tmp_path, decay):
    path = write(tmp_path / "a.parquet", [row(number) for number in range(9)], row_group_size=3)
    shards = Shards(tmp_path)
    list(shards.rows([Place("a.parquet", 0)]))
    decay(path)
    (lost,) = shards.rows([Place("a.parquet", 8)])
    assert (lost.reason, lost.place) == ("shard cannot be read", ("a.parquet", 8))


def test_text_that_is_no_utf8_sets_its_row_aside_and_no_other(tmp_path):
    rows = pa.Table.from_pylist([row(number) for number in range(3)])
    tasks = pa.array([b"swap", b"sw\xffap", b"swap"]).view(pa.string())
    pq.write_table(rows.set_column(1, "task", tasks), tmp_path / "a.parquet")
    first, bad, last = Shards(tmp_path).rows([Place("a.parquet", number) for number in range(3)])
    assert (first["omni_edit_id"], last["omni_edit_id"]) == ("id0", "id2")
    assert (bad.sample_id, bad.reason) == ("id1", "row cannot be read")
    assert "column 'task'" in bad.detail


def test_a_link_that_leads_nowhere_is_set_aside_and_a_folder_is_only_a_folder(tmp_path):
    write(tmp_path / "all.parquet" / "part-0.parquet", [row(0)])
    (tmp_path / "lost.parquet").symlink_to(tmp_path / "nowhere.parquet")
    lost, (place, _) = Shards(tmp_path).walk()
    assert (lost.place, lost.reason) == (("lost.parquet", None), "shard cannot be read")
    assert place == ("all.parquet/part-0.parquet", 0)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(Refusal, match="no parquet shard"):
        Shards(tmp_path)


def test_a_worker_reads_the_row_groups_of_its_blocks_only_and_each_once(tmp_path):
    """Two workers together read what one pass over the data reads, give or take the group they share."""
    io = Path("/proc/self/io")
    if not io.exists():
        pytest.skip("this system does not count a process's reads")

    def bytes_read(work):
        before = int(io.read_text().split()[1])
        work()
        return int(io.read_text().split()[1]) - before

    for shard in range(4):
        rows = [row(100 * shard + number, size=20_000) for number in range(100)]
        write(tmp_path / f"{shard}.parquet", rows, row_group_size=25)
    places = [place for place, _ in Shards(tmp_path).walk()]
    blocks = [places[first : first + 16] for first in range(0, len(places), 16)]

    def worker(mine):
        shards = Shards(tmp_path)
        for block in mine:
            assert all(isinstance(item, dict) for item in shards.rows(block))

    whole = bytes_read(lambda: list(Shards(tmp_path).walk()))
    halves = [bytes_read(lambda mine=mine: worker(mine)) for mine in (blocks[:12], blocks[12:])]
    group = whole / 16
    assert whole > 400 * 20_000
    assert max(halves) < whole / 2 + 2 * group
    assert sum(halves) < whole + 2 * group


def test_few_files_are_open_at_a_time_whatever_the_order(tmp_path):
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("this system does not list a process's files")
    for shard in range(40):
        write(tmp_path / f"{shard}.parquet", [row(number) for number in range(64)])
    before = len(list(opened.iterdir()))
    shards = Shards(tmp_path)
    for number in (0, 40):  # the first rows leave each shard half read
        list(shards.rows([Place(f"{shard}.parquet", number) for shard in range(40)]))
        assert len(list(opened.iterdir())) <= before + 10


def test_a_huge_row_group_is_not_held_whole(tmp_path):
    """Where the writer made pages of few rows; a page, and a dictionary, is the least that can be read."""
    rows = [row(number, size=200_000) for number in range(300)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, use_dictionary=False, write_batch_size=8)
    del rows
    idle = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - idle for _ in Shards(path, memory=10_000_000).walk()]
    assert len(held) == 300
    assert max(held) < 30_000_000


def test_samples_by_place_pass_the_checks_of_the_read(tmp_path):
    write(tmp_path / "a.parquet", [good_row(0), good_row(1, edited_prompt_list=[]), good_row(2)])
    places = [Place("a.parquet", number) for number in (2, 1, 0)]
    by_place = [judged(row, place, Checks()) for place, row in zip(places, Shards(tmp_path).rows(places), strict=True)]
    assert [item.sample_id for item in by_place] == ["id2", "id1", "id0"]
    in_order = list(read(tmp_path))
    assert by_place[1] == in_order[1]
    assert all(isinstance(item, Sample) for item in (by_place[0], by_place[2]))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose one data set lies in a folder here and is read through fsspec, as the hub's own are."""
    real = datasets.load_dataset_builder

    def served(name):
        if name != "TIGER-Lab/OmniEdit-Filtered-1.2M":
            raise ConnectionError("Couldn't reach it\nsecond line")
        files = {"train": [str(file) for file in (tmp_path / "data").glob("*.parquet")]}
        return real("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", served)
    return "TIGER-Lab/OmniEdit-Filtered-1.2M"


def test_the_hub_gives_the_rows_that_the_same_shards_give_here(tmp_path, hub):
    for shard in range(4):
        write(tmp_path / f"data/{shard}.parquet", [row(10 * shard + n) for n in range(10)], row_group_size=4)
    damage(tmp_path / "data/1.parquet", 0)
    (tmp_path / "data/3.parquet").write_bytes(b"no parquet")
    here, there = Shards(tmp_path / "data"), Shards(hub)
    assert len(walked(here)) == 31
    assert walked(there) == walked(here) == walked(Shards(hub), seed=3)
    assert list(Shards(hub).walk(3)) == list(Shards(hub).walk(3)) != list(Shards(hub).walk(4))
    places = [Place("2.parquet", 7), Place("1.parquet", 1), Place("0.parquet", 9), Place("9.parquet", 0)]
    assert list(there.rows(places)) == list(here.rows(places))
    assert Shards(hub).fingerprint() == there.fingerprint()
    (tmp_path / "data/0.parquet").unlink()
    assert Shards(hub).fingerprint() != there.fingerprint()


def test_samples_of_the_hub_pass_the_same_checks(tmp_path, hub):
    write(tmp_path / "data/a.parquet", [good_row(0), good_row(1, edited_prompt_list=[]), good_row(2)])
    there, here = list(read(hub)), list(read(tmp_path / "data"))
    assert [vars(item) for item in there] == [vars(item) for item in here]
    assert len(there) == 3


def test_a_connection_that_breaks_off_is_a_refusal_and_sets_no_row_aside(tmp_path, hub, monkeypatch):
    write(tmp_path / "data/a.parquet", [row(n) for n in range(10)], row_group_size=5)
    shards = Shards(hub)
    rows = shards.walk()
    next(rows)

    def fails(self, size=-1):
        raise TimeoutError("gave up")

    monkeypatch.setattr(LocalFileOpener, "read", fails, raising=False)
    with pytest.raises(Refusal, match=r"a\.parquet broke off: gave up; the same command goes on"):
        list(rows)


def test_what_the_hub_does_not_give_is_a_refusal(tmp_path, hub):
    (tmp_path / "data").mkdir()
    with pytest.raises(Refusal, match=r"some/where is neither a folder here nor .*Couldn't reach it$"):
        Shards("some/where")
    write(tmp_path / "data/a.parquet", [{"omni_edit_id": "a"}])
    with pytest.raises(Refusal, match=r"no usable parquet shard.*src_img"):
        Shards(hub).walk()
    with pytest.raises(Refusal, match=r"is neither a folder here nor .*dev"):
        Shards(hub, split="dev")
