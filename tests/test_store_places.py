"""Local folders and a real S3 server keep the same promises: whole files, one writer a log, refusals of one line."""

import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import google_crc32c
import numpy as np
import polars as pl
import pytest
import xarray as xr
import zarr
from s3 import proxy, uploads

from store import objects
from store.errors import Refusal
from store.places import PARTIAL, LocalPlace, Place, check_space, crc32c_of, locate, readable

ROOT = Path(__file__).parents[1]
LOG = "record/commits/0.jsonl"


@pytest.fixture(params=["local", "s3"])
def address(request, tmp_path) -> str:
    """A place that is empty."""
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "a" / "store")


@pytest.fixture
def place(address) -> Place:
    return locate(address)


def in_process(code: str, *arguments: str, **more) -> subprocess.Popen:
    """A Python process of its own; ``place`` is that of its first argument."""
    head = "import os, sys, time, resource\nfrom store.errors import Refusal\nfrom store.places import locate\n"
    command = [sys.executable, "-c", f"{head}place = locate(sys.argv[1], 'w')\n{code}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def visible(place: Place) -> list[str]:
    """All files, those of ``PARTIAL``, too."""
    if isinstance(place, LocalPlace):
        return sorted(p.relative_to(place.path).as_posix() for p in place.path.rglob("*") if p.is_file())
    return sorted(place._list(None))


# Files


def test_what_is_written_is_read_back(place):
    big = np.random.default_rng(0).integers(0, 256, 20_000_000, dtype=np.uint8)
    size, checksum = place.write_whole("a/big", (big[i : i + 3_000_000] for i in range(0, big.size, 3_000_000)))
    assert size == big.size and checksum == f"{google_crc32c.value(big.tobytes()):08x}" == place.checksum("a/big")
    assert place.read("a/big") == big.tobytes()
    assert bytes(place.read_range("a/big", 5, 7)) == big[5:12].tobytes()
    starts, lengths = [19_999_990, 0, 9_000_000, 100], [10, 3, 8_000_000, 1]
    for start, length, got in zip(starts, lengths, place.read_ranges("a/big", starts, lengths), strict=True):
        assert bytes(got) == big[start : start + length].tobytes()
    assert place.read_tail("a/big", 4) == (big[-4:].tobytes(), big.size)
    assert place.size("a/big") == big.size and place.exists("a/big")


def test_a_file_is_replaced_whole(place):
    place.write_whole("a", [b"first, longer"])
    place.write_whole("a", [b"second"])
    assert place.read("a") == b"second" and visible(place) == ["a"]


def test_pieces_are_any_memory(place):
    pieces = [b"", np.arange(3, dtype=np.uint16), bytearray(b"x"), memoryview(np.zeros((0, 3))), np.ones((2, 2))]
    size, checksum = place.write_whole("a", pieces)
    whole = b"".join(bytes(memoryview(piece).tobytes()) for piece in pieces)
    assert place.read("a") == whole
    assert (size, checksum) == (len(whole), f"{google_crc32c.value(whole):08x}")


def test_an_empty_file_is_a_file(place):
    assert place.write_whole("empty", []) == (0, "00000000")
    assert place.size("empty") == 0 and place.read("empty") == b""
    assert place.read_tail("empty", 8) == (b"", 0)
    assert place.read_range("empty", 0, 4) == b"" and place.checksum("empty") == "00000000"


def test_ranges_end_where_the_file_ends(place):
    place.write_whole("a", [b"0123456789"])
    assert bytes(place.read_range("a", 8, 100)) == b"89"
    assert bytes(place.read_range("a", 10, 1)) == bytes(place.read_range("a", 999, 5)) == b""
    assert bytes(place.read_range("a", 3, 0)) == b""
    assert [bytes(b) for b in place.read_ranges("a", [8, 999, 1], [100, 5, 0])] == [b"89", b"", b""]
    assert [bytes(b) for b in place.read_ranges("a", [8, 2_000_000], [100, 5])] == [b"89", b""]
    assert [bytes(b) for b in place.read_ranges("a", [8, 999], [100, 5])] == [b"89", b""]
    assert place.read_ranges("a", [], []) == []
    assert place.read_tail("a", 100) == (b"0123456789", 10)
    assert place.read_tail("a", 0) == (b"", 10)


def test_what_is_not_there_is_said_to_be(place):
    for read in (
        lambda: place.read("no"),
        lambda: place.read_range("no", 0, 1),
        lambda: place.read_ranges("no", [0], [1]),
        lambda: place.read_tail("no", 1),
        lambda: place.checksum("no"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            read()
        assert str(caught.value.filename) == f"{place}/no" and "\n" not in str(caught.value)
    assert place.size("no") is None and not place.exists("no")
    assert place.names() == [] and place.sizes("no") == {}
    place.remove("no")
    place.remove_tree("no")


def test_names_are_all_files_of_a_folder(place):
    for name in ("b/2", "b/1/x", "ba", f"{PARTIAL}/files/w/half", "record/plan.json"):
        place.write_whole(name, [name.encode()])
    assert place.names() == ["b/1/x", "b/2", "ba", "record/plan.json"]
    assert place.names("b") == ["b/1/x", "b/2"]
    assert place.sizes("b") == {"b/1/x": 5, "b/2": 3}
    assert place.names("b/2") == []
    place.remove("ba")
    place.remove_tree("b")
    assert place.names() == ["record/plan.json"]
    place.remove_tree("record")
    assert visible(place) == []


def test_places_beside_each_other_do_not_mix(address):
    place, beside = locate(address), locate(address + "s")
    beside.write_whole("a", [b"a"])
    assert place.names() == []


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "", ".", "a//b", "a/", "..\\a", "a\0b"])
def test_names_do_not_lead_out(place, name):
    for use in (
        lambda: place.read(name),
        lambda: place.read_range(name, 0, 1),
        lambda: place.read_ranges(name, [0], [1]),
        lambda: place.read_tail(name, 1),
        lambda: place.size(name),
        lambda: place.checksum(name),
        lambda: place.write_whole(name, [b"x"]),
        lambda: place.write_new(name, b"x"),
        lambda: place.remove(name),
        lambda: place.remove_tree(name),
        lambda: place.log(name),
        lambda: place.scan_parquet([name]),
        lambda: place.sizes(name or ".."),
    ):
        with pytest.raises(Refusal, match="is not the name of a file"):
            use()


def test_a_worker_has_a_plain_name(address):
    for worker in ("..", "a/b"):
        with pytest.raises(Refusal, match="worker"):
            locate(address, worker)


# Whole files


def test_a_file_appears_when_it_is_committed(place, s3_endpoint):
    with place.open_whole("a/b") as file:
        for _ in range(4):
            file.write(bytes(5_000_000))
        assert not place.exists("a/b")
        assert file.commit()[0] == 20_000_000
        assert place.size("a/b") == 20_000_000
    assert visible(place) == ["a/b"]


def test_what_an_error_leaves_is_nothing(place, s3_endpoint):
    place.write_whole("a", [b"before"])
    with pytest.raises(KeyError), place.open_whole("a") as file:
        for _ in range(4):
            file.write(bytes(5_000_000))
        raise KeyError
    with pytest.raises(KeyError):
        place.write_whole("b", map({}.__getitem__, "x"))
    assert place.read("a") == b"before" and visible(place) == ["a"]
    if not isinstance(place, LocalPlace):
        assert uploads(s3_endpoint, str(place).split("/")[2]) == 0


def test_a_killed_writer_leaves_nothing_to_be_seen(address, place):
    code = (
        "f = place.open_whole('a'); [f.write(bytes(5_000_000)) for _ in range(4)]; print(1, flush=True); time.sleep(60)"
    )
    writer = in_process(code, address)
    assert writer.stdout.readline() == "1\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert place.names() == []
    locate(address, "w").remove_partial()
    assert visible(place) == []


def test_only_the_first_writes_a_new_file(place):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: place.write_new("plan", b"%d" % i), range(8)))
    assert sum(won) == 1 and place.read("plan") == b"%d" % won.index(True)
    assert visible(place) == ["plan"]


def test_workers_write_at_a_time(address):
    code = "[place.write_whole(f'{sys.argv[2]}/{i}', [sys.argv[2].encode() * 100_000]) for i in range(5)]"
    writers = [in_process(code, address, str(n)) for n in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    place = locate(address)
    assert len(place.names()) == 10 and place.read("1/4") == b"1" * 100_000


FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    if sys.argv[2] == "file":
        place.write_whole("a", [bytes(1_500_000)] * 2)
    else:
        log = place.log("record/commits/0.jsonl")
        for n in range(3):
            log.append(bytes([65 + n]) * 999_999 + b"\\n")
except Refusal as refusal:
    sys.exit(f"error: {refusal}")
"""


@pytest.mark.parametrize("kind", ["file", "log"])
def test_a_full_disk_is_a_refusal_and_leaves_what_was(tmp_path, kind):
    writer = in_process(FULL, str(tmp_path), kind)
    _, error = writer.communicate()
    assert writer.returncode == 1 and "no space left to write" in error and error.count("\n") == 1
    place = locate(tmp_path)
    assert visible(place) == ([] if kind == "file" else [LOG])
    assert kind == "file" or place.read(LOG) == b"A" * 999_999 + b"\n" + b"B" * 999_999 + b"\n"


def test_free_space_is_checked(place):
    check_space(place, 1000)
    if isinstance(place, LocalPlace):
        with pytest.raises(Refusal, match=r"needs an estimated 1000000\.0 TB more"):
            check_space(place.path / "new", 10**18)
        assert not place.path.exists()
        place.write_whole("a", [bytes(1000)])
        check_space(place, place.free() + 1000)
    else:
        check_space(place, 10**18)
    assert [readable(n) for n in (999, 1000, 1.5e9)] == ["999 B", "1.0 kB", "1.5 GB"]


def test_checksums_continue():
    data = np.random.default_rng(0).bytes(1000)
    assert crc32c_of(b"123456789") == 0xE3069283
    assert crc32c_of(data[300:], crc32c_of(memoryview(data)[:300])) == google_crc32c.value(data)
    assert crc32c_of(b"") == 0 and crc32c_of(np.zeros((2, 3))) == google_crc32c.value(bytes(48))


# Logs


def test_a_log_keeps_its_lines(address):
    log = locate(address).log(LOG)
    assert log.read() == b""
    log.append(b"one\n")
    log.append(b"two\n")
    log.check()
    assert log.read() == locate(address).read(LOG) == b"one\ntwo\n"
    log.close()
    log = locate(address).log(LOG)
    log.append(b"three\n")
    log.replace([b"one\n", b"three\n"])
    log.append(b"four\n")
    assert log.read() == locate(address).read(LOG) == b"one\nthree\nfour\n"
    log.close()
    assert visible(locate(address)) == [LOG]


def test_a_torn_last_line_is_dropped(place):
    place.write_whole(LOG, [b"one\ntw"])
    log = place.log(LOG)
    assert log.read() == b"one\n"
    log.append(b"three\n")
    assert place.read(LOG) == b"one\nthree\n"
    log.close()


def test_a_second_writer_of_a_log_is_refused(address):
    place = locate(address)
    first = place.log(LOG)
    refused = pytest.raises(Refusal, match=f"a writer named '0' is at work on {address}")
    if isinstance(place, LocalPlace):
        for _ in range(2):
            with refused:
                locate(address).log(LOG)
            first.replace([b"one\n"])
    else:
        # Nothing is held there: whoever appends second is.
        second = locate(address).log(LOG)
        first.append(b"one\n")
        for act, given in ((second.check, ()), (second.append, (b"two\n",)), (second.replace, ([],))):
            with refused:
                act(*given)
    assert place.read(LOG).startswith(b"one\n")
    first.check()
    first.close()


def test_a_log_is_checked_while_it_is_appended_to(address):
    log = locate(address).log(LOG)
    with ThreadPoolExecutor(1) as pool:
        appending = pool.submit(lambda: [log.append(b"%d\n" % n) for n in range(20)])
        while not appending.done():
            log.check()
        appending.result()
    assert log.read().count(b"\n") == 20
    log.close()


def test_a_killed_worker_holds_nothing(address):
    code = (
        f"log = place.log('{LOG}'); log.append(b'one\\n'); c = place.claim('0-1'); print(1, flush=True); time.sleep(60)"
    )
    writer = in_process(code, address)
    assert writer.stdout.readline() == "1\n"
    place = locate(address)
    if isinstance(place, LocalPlace):
        assert place.claim("0-1") is None
    writer.kill()
    writer.communicate()
    place.claim("0-1").close()
    log = place.log(LOG)
    log.append(b"two\n")
    log.close()
    assert visible(place) == [LOG, *([f"{PARTIAL}/claims/0-1"] if place.exists(f"{PARTIAL}/claims/0-1") else [])]
    assert place.read(LOG) == b"one\ntwo\n"


def test_one_holds_a_claim(tmp_path):
    held, tries = [], threading.Barrier(8)

    def work(_):
        place = locate(tmp_path)
        tries.wait()
        for _ in range(50):
            if claim := place.claim("0-3"):
                held.append(1)
                assert sum(held) == 1
                held.append(-1)
                claim.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(held) > 2 and visible(locate(tmp_path)) == []


# Other libraries


def test_tables_are_read_and_scanned(place):
    for i in range(3):
        pl.DataFrame({"a": [i, i + 1], "b": ["x", None]}).write_parquet(sink := io.BytesIO())
        place.write_whole(f"t/{i}.parquet", [sink.getvalue()])
    names = [f"t/{i}.parquet" for i in (2, 0, 1)]
    assert [frame["a"].to_list() for frame in place.read_parquet(names)] == [[2, 3], [0, 1], [1, 2]]
    assert place.scan_parquet(names).filter(pl.col("a") > 1).collect()["a"].to_list() == [2, 3, 2]


def test_a_folder_may_have_any_name(tmp_path):
    place = locate(tmp_path / "a [b] *? ü%20{c}")
    pl.DataFrame({"a": [1]}).write_parquet(sink := io.BytesIO())
    place.write_whole("t.parquet", [sink.getvalue()])
    assert place.scan_parquet(["t.parquet"]).collect().height == 1
    assert place.names() == ["t.parquet"]
    assert locate((tmp_path / "a [b] *? ü%20{c}").as_uri()).names() == ["t.parquet"]


def test_stock_zarr_and_xarray_open_it(place):
    array = xr.Dataset({"v": (("x", "y"), np.arange(6.0).reshape(2, 3))})
    array.to_zarr(place.zarr_store(read_only=False), group="hidden", zarr_format=3, consolidated=False)
    assert "hidden/v/zarr.json" in place.names()
    xr.testing.assert_equal(xr.open_zarr(place.zarr_store(read_only=True), group="hidden", consolidated=False), array)
    with pytest.raises(ValueError, match="read-only"):
        zarr.create_group(place.zarr_store(read_only=True), path="other")


# Processes


def test_a_place_goes_to_another_process(place):
    place.write_whole("a", [b"there"])
    code = "import pickle; print(pickle.loads(bytes.fromhex(sys.argv[2])).read('a').decode())"
    told, _ = in_process(code, str(place), pickle.dumps(place).hex()).communicate()
    assert told == "there\n"


def test_a_pickled_place_has_no_keys(s3):
    assert b"secret" not in pickle.dumps(locate(s3))
    assert str(pickle.loads(pickle.dumps(locate(s3, "w")))) == s3


def test_a_fork_reads_a_local_place_and_never_hangs_on_another(place):
    place.write_whole("a", [b"there"])
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            told = place.read("a")
        except Refusal as refusal:
            told = str(refusal).encode()
        os.write(send, told)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    told = os.read(receive, 10_000).decode()
    assert told == "there" if isinstance(place, LocalPlace) else "spawn" in told


def test_threads_read_at_a_time(s3, s3_endpoint, monkeypatch):
    locate(s3).write_whole("a", [bytes(1000)])

    def slow(*_):
        time.sleep(0.1)

    with proxy(s3_endpoint, slow) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        place, start = locate(s3), time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda i: place.read_ranges("a", [i], [1]), range(32)))
    assert time.monotonic() - start < 1.5


# Where a place can be


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///a",
        "s3://bucket/../a",
        "s3://bucket/a//b",
        "s3://bucket?a=b",
        "s3://key:secret@bucket/a",
        "s3://bucket/a%2F..",
        "s3://bucket/*",
        "https://host/a",
        "memory:///a",
        "ftp://host/a",
        "file://host/a",
    ],
)
def test_other_addresses_are_refused(url):
    with pytest.raises(Refusal, match=r"give a folder|write file:///"):
        locate(url)


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="is a file"):
        locate(tmp_path / "file")


def test_addresses_are_understood(tmp_path, s3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(locate("a")) == str(locate(f"file://{tmp_path}/a")) == str(tmp_path / "a")
    assert str(locate("~/a")) == str(Path.home() / "a")
    # A path object takes one of the slashes.
    assert str(locate(Path(s3))) == str(locate(f"{s3}/")) == s3
    place = locate(s3)
    assert locate(place) is place and locate(place, "w").worker == "w"


def refusal_of(act: Callable) -> str:
    """What it refuses with: one line, soon."""
    start = time.monotonic()
    with pytest.raises(Refusal) as caught:
        act()
    assert time.monotonic() - start < 15 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_bucket_is_named(s3):
    assert "s3://missing/a: there is no such bucket" in refusal_of(lambda: locate("s3://missing/a"))


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("http://127.0.0.1:1", "cannot be reached"),
        ("http://no-such-host.invalid", "cannot be reached"),
        ("localhost:9000", "begins with https://"),
    ],
)
def test_an_endpoint_that_is_not_there_is_named(s3, monkeypatch, endpoint, told):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    refusal = refusal_of(lambda: locate(s3))
    assert told in refusal and endpoint in refusal and s3 in refusal


def test_a_server_that_never_answers_is_named(s3, monkeypatch):
    monkeypatch.setitem(objects._FIRST_CONTACT["client_options"], "timeout", "200ms")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached" in refusal_of(lambda: locate(s3))


@pytest.mark.parametrize("status", [401, 403])
def test_keys_that_are_not_good_are_named(s3, s3_endpoint, monkeypatch, status):
    with proxy(s3_endpoint, lambda *_: status) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert "refuses these keys: check AWS_ACCESS_KEY_ID" in refusal_of(lambda: locate(s3))


# What goes wrong on the way


class Faults:
    """What befalls the next requests: ``coming`` one each, ``always`` all."""

    def __init__(self):
        self.coming, self.always, self.requests = [], None, []

    def befall(self, method: str, path: str, headers: dict) -> int | str | None:
        """What ``proxy`` asks."""
        self.requests.append((method, path))
        if self.always is not None:
            return self.always
        return self.coming.pop(0) if self.coming else None


@pytest.fixture
def faults(s3_endpoint, monkeypatch, s3):
    faults = Faults()
    monkeypatch.setitem(objects._LATER["retry_config"], "backoff", {"init_backoff": timedelta(milliseconds=5)})
    with proxy(s3_endpoint, faults.befall) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield faults


@pytest.mark.parametrize("coming", [["lost"], ["unanswered"], [503, "unanswered"]])
def test_passing_faults_are_not_noticed(s3, faults, coming):
    place = locate(s3)
    log = place.log(LOG)
    for act in (
        lambda: place.write_whole("small", [b"abc"]),
        lambda: log.append(b"one\n"),
        lambda: log.append(b"two\n"),
        lambda: place.read("small"),
        lambda: place.read_tail("small", 1),
        lambda: place.names(),
        lambda: place.remove("other"),
    ):
        faults.coming = list(coming)
        act()
        assert not faults.coming
    assert place.read("small") == b"abc" and place.read(LOG) == b"one\ntwo\n"


@pytest.mark.parametrize("step", [0, 2, 4])
def test_passing_faults_of_an_upload_are_not_noticed(s3, faults, step):
    place = locate(s3)
    # Begin, three parts, complete.
    faults.coming = [*[None] * step, "unanswered"]
    place.write_whole("big", [bytes(9_000_000)] * 2)
    assert not faults.coming
    assert place.checksum("big") == f"{google_crc32c.value(bytes(18_000_000)):08x}"


def test_what_does_not_pass_is_a_refusal(s3, faults, monkeypatch):
    monkeypatch.setitem(objects._LATER["retry_config"], "retry_timeout", timedelta(seconds=0.1))
    place = locate(s3)
    place.write_whole("a", [b"abc"])
    log = place.log(LOG)
    log.append(b"one\n")
    faults.always = 500
    for act in (
        lambda: place.read("a"),
        lambda: place.read_ranges("a", [0], [1]),
        lambda: place.read_tail("a", 1),
        lambda: place.size("a"),
        lambda: place.names(),
        lambda: place.checksum("a"),
        lambda: place.write_whole("b", [b"abc"]),
        lambda: place.write_whole("c", [bytes(18_000_000)]),
        lambda: log.append(b"two\n"),
        log.check,
        lambda: place.remove("a"),
    ):
        assert "500 Internal Server Error; what was committed is kept" in refusal_of(act)
    faults.always = None
    assert visible(place) == ["a", LOG]
    log.append(b"three\n")
    assert place.read(LOG) == b"one\nthree\n"


def test_a_server_without_conditional_puts_is_refused(s3, faults):
    place = locate(s3)
    faults.always = "unconditional"
    for act in (lambda: place.log(LOG), lambda: place.write_new("a", b"x")):
        assert "ignores the conditions of a put" in refusal_of(act)
    assert visible(place) == []


def test_conditions_are_tried_once_a_place(s3, faults):
    place = locate(s3)
    place.log(LOG)
    faults.requests.clear()
    place.log("record/commits/1.jsonl")
    assert [method for method, _ in faults.requests] == ["GET"]
