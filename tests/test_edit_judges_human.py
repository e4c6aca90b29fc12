"""A person as a judge: the order tells nothing, every answer is on the disk at once, nobody else can give one."""

import contextlib
import io
import json
import re
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from judging import picture
from PIL import Image, PngImagePlugin
from serving import Client, Serving

from edit.judges.agreement import agreement, kappa, read_verdicts
from edit.judges.cache import AnswerCache
from edit.judges.command import judge, print_summary, read_items
from edit.judges.config import HumanSettings, JudgeConfig
from edit.judges.human import Desk
from edit.judges.human_page import Handler, Server, judge_by_hand
from edit.judges.judge import SCHEMA, Item, table_of
from edit.judges.questions import QUESTIONS, RUBRIC, Failure, Verdict
from extract.local_page import Unfit
from store.errors import Busy, Refusal

METHODS = ("ours_secret", "plain_secret")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Four samples by two methods: files, folders and texts name them; two of the edited files cannot be read."""
    folder = tmp_path_factory.mktemp("made")
    rows = []
    for n in range(4):
        picture(n).save(folder / f"source{n}.png")
        for m, method in enumerate(METHODS):
            (folder / method).mkdir(exist_ok=True)
            about = PngImagePlugin.PngInfo()
            about.add_text("method", method)
            exif = Image.Exif()
            exif[0x010E] = method
            picture(10 + 2 * n + m, (40, 56)).save(folder / method / f"{n}.png", pnginfo=about, exif=exif)
            files = {"source": f"source{n}.png", "edited": f"{method}/{n}.png"}
            box = {"x1": 14.0, "y1": 0.0, "x2": 28.0, "y2": 56.0}
            rows.append({"sample": f"s{n}", "method": method, "instruction": f"make it {n}"} | files | box)
    (folder / METHODS[0] / "1.png").unlink()
    (folder / METHODS[1] / "2.png").write_bytes(b"no picture")
    pl.DataFrame(rows).write_parquet(folder / "items.parquet")
    return folder / "items.parquet"


@pytest.fixture
def open_desk(table, tmp_path):
    """A function that opens the desk of a person, with the same answers each time; the one before is closed."""
    with contextlib.ExitStack() as opened:

        def make(rater="Ada", seed=0, items=None, show_box=False):
            opened.close()
            items = read_items(table, show_box) if items is None else items
            return opened.enter_context(contextlib.closing(Desk(items, rater, seed, AnswerCache(tmp_path / "cache"))))

        yield make


def answer(desk, place, *grades):
    for question, grade in zip(QUESTIONS, grades, strict=False):
        told = desk.keep({"place": place, "question": question, "grade": grade})
    return told


def methods(desk):
    return [(pair.item.sample, pair.item.method) for pair in desk.pairs]


# ---- the order ---------------------------------------------------------------------------------------------------


def test_the_order_follows_from_rater_seed_and_pictures_and_not_from_the_table(open_desk, table):
    items = read_items(table, False)
    order = methods(open_desk())
    assert sorted(order) == sorted((item.sample, item.method) for item in items)
    assert methods(open_desk()) == order
    assert methods(open_desk(items=items[::-1])) == order
    assert methods(open_desk("Bob")) != order != methods(open_desk(seed=1))
    known = [pair for pair in order if pair not in (("s1", METHODS[0]), ("s2", METHODS[1]))]
    swapped = [Item(i.sample, METHODS[i.method == METHODS[0]], i.instruction, i.source, i.edited) for i in items]
    names = {(item.sample, item.method): other.method for item, other in zip(items, swapped, strict=True)}
    renamed = [
        pair for pair in methods(open_desk(items=swapped)) if pair not in (("s1", METHODS[1]), ("s2", METHODS[0]))
    ]
    assert renamed == [(sample, names[sample, method]) for sample, method in known]


def test_over_many_raters_each_method_comes_first_as_often(open_desk):
    items = [Item("s", method, "x", picture(0), picture(1 + m)) for m, method in enumerate(METHODS)]
    firsts = sum(open_desk(f"rater {n}", items=items).pairs[0].item.method == METHODS[0] for n in range(60))
    assert 15 <= firsts <= 45


def test_pairs_that_are_alike_are_asked_once_and_answered_for_each_method(open_desk):
    alike = [Item("s", method, "x", picture(0), picture(1)) for method in METHODS]
    desk = open_desk(items=[*alike, Item("s", "third", "another instruction", picture(0), picture(1))])
    assert desk.progress() == {"total": 2, "judged": 0, "aside": 0}
    place = next(n for n, pair in enumerate(desk.pairs) if pair.item.instruction == "x")
    answer(desk, place, 4, 3, 2)
    assert desk.outcomes() == [Verdict(4, 3, 2)] * 2 + [Failure("not judged: Ada answered 0 of 3 questions")]


# ---- answers -----------------------------------------------------------------------------------------------------


def test_every_answer_is_there_for_the_same_rater_and_for_no_other(open_desk):
    desk = open_desk()
    place = desk.next_left()
    answer(desk, place, 4, 0)
    again = open_desk(seed=5)
    assert sum(answered["grades"] == {"edit": 4, "subject": 0} for answered in map(again.pair, range(8))) == 1
    assert open_desk("Bob").pair(place)["grades"] == {}


def test_what_is_shown_anew_is_asked_anew(open_desk):
    item = Item("s", "m", "x", picture(0), picture(1))
    answer(open_desk(items=[item]), 0, 4, 4, 4)
    assert open_desk(items=[item]).progress()["judged"] == 1
    for changed in (
        Item("s", "m", "y", picture(0), picture(1)),
        Item("s", "m", "x", picture(0), picture(2)),
        Item("s", "m", "x", picture(0), picture(1), (0, 0, 5, 5)),
    ):
        assert open_desk(items=[changed]).progress()["judged"] == 0


def test_an_answer_is_changed_and_taken_back(open_desk):
    desk = open_desk()
    place = desk.next_left()
    told = answer(desk, place, 4, 3, 2)
    assert told["grades"] == {"edit": 4, "subject": 3, "leakage": 2}
    assert told["progress"] == {"total": 8, "judged": 1, "aside": 2}
    assert told["next_left"] not in (None, place)
    assert answer(desk, place, 1)["grades"]["edit"] == 1
    told = answer(desk, place, None)
    assert told["grades"] == {"subject": 3, "leakage": 2}
    assert told["progress"]["judged"] == 0
    assert open_desk().pair(place)["grades"] == {"subject": 3, "leakage": 2}


def test_what_is_left_comes_in_turn_then_from_the_beginning_and_what_cannot_be_shown_never(open_desk):
    desk = open_desk()
    fine = [place for place in range(8) if desk.pair(place)["trouble"] is None]
    assert [desk.next_left(place) for place in (-1, *fine)] == [*fine, fine[0]]
    for place in fine:
        told = answer(desk, place, 1, 1, 1)
    assert told["next_left"] is None


@pytest.mark.parametrize(
    ("sent", "status", "why"),
    [
        ([], 400, "fields place, question, grade"),
        ({"place": 0, "question": "edit"}, 400, "fields place"),
        ({"place": 0, "question": "edit", "grade": 1, "method": "ours"}, 400, "fields place"),
        ({"place": 8}, 404, "there are 8"),
        ({"place": -1}, 404, "no pair -1"),
        ({"place": True}, 404, "no pair True"),
        ({"place": "0"}, 404, "no pair '0'"),
        ({"place": 0.0}, 404, "no pair 0.0"),
        ({"question": "beauty"}, 422, "not one of edit, subject, leakage"),
        ({"question": ["edit"]}, 422, "not one of"),
        ({"grade": 5}, 422, "from 0 to 4"),
        ({"grade": -1}, 422, "from 0 to 4"),
        ({"grade": 2.0}, 422, "no whole number"),
        ({"grade": True}, 422, "no whole number"),
        ({"grade": "4"}, 422, "no whole number"),
        ({"grade": float("nan")}, 422, "no whole number"),
        ({"grade": 10**400}, 422, "from 0 to 4"),
        ({"grade": [4]}, 422, "no whole number"),
    ],
)
def test_what_is_no_answer_is_refused_and_not_kept(open_desk, tmp_path, sent, status, why):
    desk = open_desk()
    whole = isinstance(sent, list) or len(sent) != 1
    with pytest.raises(Unfit, match=why) as refused:
        desk.keep(sent if whole else {"place": desk.next_left(), "question": "edit", "grade": 1} | sent)
    assert refused.value.status == status
    assert not list(tmp_path.rglob("*.json"))


def test_an_answer_that_the_disk_cannot_take_is_not_counted(open_desk, tmp_path):
    desk = open_desk()
    place = desk.next_left()
    (tmp_path / "cache" / desk.pairs[place].key[:2]).write_text("in the way")
    with pytest.raises(Unfit, match="cannot be written") as refused:
        answer(desk, place, 4)
    assert refused.value.status == 507
    assert desk.pair(place)["grades"] == {}


def test_a_damaged_answer_is_warned_of_and_asked_again(open_desk, tmp_path):
    desk = open_desk()
    answer(desk, desk.next_left(), 4)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(path.read_text().replace("4}", "3}"))
    with pytest.warns(UserWarning, match="is damaged"):
        desk = open_desk()
    assert all(desk.pair(place)["grades"] == {} for place in range(8))


def test_one_person_judges_once_at_a_time(table, tmp_path):
    items, cache = read_items(table, False), AnswerCache(tmp_path)
    with contextlib.closing(Desk(items, "Ada", 0, cache)):
        with pytest.raises(Busy, match=r"--rater Ada judges into .* already"):
            Desk(items, "Ada", 1, cache)
        Desk(items, "Bob", 0, cache).close()
    Desk(items, "Ada", 0, cache).close()


# ---- what the page can get ---------------------------------------------------------------------------------------


def everything(desk):
    """All that the page can get of a desk, with the status of each answer."""
    found = []
    for place in range(-1, len(desk.pairs) + 1):
        for get in (desk.pair, lambda at: desk.picture(at, "source"), lambda at: desk.picture(at, "edited")):
            try:
                found.append(get(place))
            except Unfit as unfit:
                found.append(str(unfit))
    return found


def test_no_method_is_named_in_anything_that_the_page_can_get(open_desk, table):
    assert METHODS[0].encode() in (table.parent / METHODS[0] / "0.png").read_bytes()
    desk = open_desk()
    found = everything(desk)
    (table.parent / METHODS[0] / "0.png").rename(table.parent / "away.png")
    try:
        found += everything(open_desk())  # known to be broken
        found += [str(pair.trouble) for pair in open_desk().pairs]
        desk._shown.cache_clear()
        found += everything(desk)  # broken since the start
    finally:
        (table.parent / "away.png").rename(table.parent / METHODS[0] / "0.png")
    told = b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in found)
    assert b"changed or removed" in told and b"No such file" in told
    for word in (b"secret", b"source0", str(table.parent).encode(), b'"s0"', b".png", b"tEXt", b"eXIf"):
        assert word not in told, word


def test_the_pictures_are_the_files_pixels(open_desk):
    desk = open_desk()
    place = desk.next_left()
    item = desk.pairs[place].item
    for side, path in (("source", item.source), ("edited", item.edited)):
        shown = Image.open(io.BytesIO(desk.picture(place, side)))
        assert (np.asarray(shown) == np.asarray(Image.open(path))).all()
        assert not shown.info


def test_a_box_is_told_in_shares_of_the_source_where_the_judge_is_to_know(open_desk):
    desk = open_desk(show_box=True)
    assert desk.pair(desk.next_left())["box"] == [0.25, 0, 0.5, 1]
    assert open_desk().pair(0)["box"] is None


def test_a_picture_that_changed_since_the_start_is_not_shown(open_desk, tmp_path):
    for n, name in enumerate(("a.png", "b.png")):
        picture(n).save(tmp_path / name)
    desk = open_desk(items=[Item("s", "m", "x", tmp_path / "a.png", tmp_path / "b.png")])
    picture(7).save(tmp_path / "b.png")
    with pytest.raises(Unfit, match="changed or removed since the command started"):
        desk.picture(0, "edited")


# ---- the server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(table, tmp_path_factory):
    """The command as a process of its own."""
    folder = tmp_path_factory.mktemp("out")
    options = ("--items", table, "--out", folder / "judged.parquet", "--cache", folder / "cache")
    with Serving("edit", "judge", "--judge", "human", "--rater", "Ada", *options) as running:
        running.out = folder / "judged.parquet"
        yield running


def test_the_page_and_what_it_asks_for_are_served_with_strict_headers(served):
    for path, word in (("", b"<!doctype html>"), ("page.css", b"prefers-color-scheme"), ("page.js", b"use strict")):
        status, data = served.ask(path)
        assert status == 200 and word in data
        assert "default-src 'none'" in served.headers["Content-Security-Policy"]
        assert "unsafe" not in served.headers["Content-Security-Policy"]
        assert served.headers["Cache-Control"] == "no-store"
        assert b"http://" not in data and b"https://" not in data
        assert not re.search(rb"<script>|style=|onclick=", data)
    status, told = served.ask("start")
    assert status == 200
    assert {one["name"]: (one["question"], tuple(one["meanings"])) for one in told["rubric"]} == RUBRIC
    assert all(len(one["meanings"]) == 5 for one in told["rubric"])
    assert served.ask(f"pictures/{told['next_left']}/edited")[1].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "sent", "status", "why"),
    [
        ("start", {"token": "wrong"}, 404, "address that the command printed"),
        ("answers", {"token": "", "body": {}}, 404, "address that the command printed"),
        ("pairs/0", {"headers": {"Host": "evil.example"}}, 421, "Host"),
        ("answers", {"body": {}, "headers": {"Host": "evil.example"}}, 421, "Host"),
        ("answers", {"body": {}, "headers": {"Origin": "http://evil.example"}}, 403, "another page"),
        ("finish", {"body": {}, "headers": {"Origin": "http://evil.example"}}, 403, "another page"),
        ("finish", {"body": {}, "headers": {"Content-Type": "text/plain"}}, 415, "application/json"),
        ("finish", {"body": {}}, 409, "is not judged yet"),
        ("answers", {"body": b"{"}, 400, "no JSON"),
        ("answers", {"body": {"place": 0}}, 400, "fields place"),
        ("answers", {"body": b" " * 70000}, 413, "at most"),
        ("pairs/0", {"body": {}}, 404, "only to answers, finish"),
        ("answers", {"method": "PUT"}, 405, "PUT"),
        ("pairs/8", {}, 404, "there are 8"),
        ("pairs/-1", {}, 404, "here"),
        ("pictures/0/method", {}, 404, "here"),
        ("pictures/0", {}, 404, "here"),
        ("pictures/8/source", {}, 404, "there are 8"),
        ("../human.py", {}, 404, "here"),
        ("pictures/0/../../items.parquet", {}, 404, "here"),
    ],
)
def test_a_senseless_or_strange_request_is_answered_with_what_is_wrong(served, path, sent, status, why):
    found, told = served.ask(path, **sent)
    assert found == status, told
    assert why in told["error"]


def test_the_server_listens_on_this_machine_alone(served):
    listening = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"}
    assert f"0100007F:{served.port:04X}" in listening
    assert f"00000000:{served.port:04X}" not in listening


def test_a_kill_loses_no_answer_and_ctrl_c_writes_the_table_of_all_judges(served, table):
    assert "pairs     8: 0 judged before, 2 cannot be shown" in served.said
    place = served.ask("start")[1]["next_left"]
    for question, grade in zip(QUESTIONS, (4, 0, 3), strict=True):
        sent = {"place": place, "question": question, "grade": grade}
        assert served.ask("answers", sent)[0] == 200
    second = served.ask(f"pairs/{place}")[1]["next_left"]
    assert served.ask("answers", {"place": second, "question": "edit", "grade": 2})[0] == 200
    served.kill()
    assert not served.out.exists()
    served.start()
    assert "pairs     8: 1 judged before, 2 cannot be shown" in served.said
    assert served.ask("start")[1]["next_left"] == second
    assert served.ask(f"pairs/{second}")[1]["grades"] == {"edit": 2}
    said = served.stop()
    rows = pl.read_parquet(served.out)
    assert dict(rows.schema) == SCHEMA
    assert rows.select("sample", "method").rows() == pl.read_parquet(table).select("sample", "method").rows()
    assert set(rows["judge"]) == {"Ada"}
    (judged,) = rows.filter(pl.col("failed").is_null()).select(QUESTIONS).rows()
    assert judged == (4, 0, 3)
    reasons = dict(rows["failed"].drop_nulls().value_counts().rows())
    assert reasons.pop("not judged: Ada answered 0 of 3 questions") == 4
    assert reasons.pop("not judged: Ada answered 1 of 3 questions") == 1
    assert all(reason.startswith("a picture cannot be read") for reason in reasons) and len(reasons) == 2
    assert "n = 1, 3 set aside" in said and "spent" not in said
    print_summary(rows, served.out, None)  # reads any judge's table
    assert len(read_verdicts(served.out)) == 1


def test_finishing_ends_the_server_once_nothing_is_left(tmp_path):
    items = [Item(f"s{n}", "m", "x", picture(n), picture(n + 1)) for n in range(3)]
    with contextlib.closing(Desk(items, "Bob", 0, AnswerCache(tmp_path))) as desk, Server(0) as server:
        server.desk = desk
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        client = Client(server.url)
        for place in range(3):
            assert client.ask("finish", {})[0] == 409
            for question in QUESTIONS:
                sent = {"place": place, "question": question, "grade": place}
                assert client.ask("answers", sent)[0] == 200
        assert client.ask("finish", {}) == (200, {})
        serving.join(10)
        assert not serving.is_alive()
        by_sample = {pair.item.sample: place for place, pair in enumerate(desk.pairs)}
        assert desk.outcomes() == [Verdict(*[by_sample[item.sample]] * 3) for item in items]


def test_the_handler_serves_its_own_files():
    assert {path.name for path in Handler.folder.iterdir()} == {"page.html", "page.css", "page.js"}


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"judge": "human"}, "--judge human is named by --rater NAME, and by no --model"),
        ({"judge": "human", "model": "m", "human": {"rater": "Ada"}}, "by no --model"),
        ({"judge": "openai"}, "--judge openai is named by --model NAME, and by no --rater"),
        ({"judge": "local", "model": "m", "human": {"rater": "Ada"}}, "by no --rater"),
        ({"judge": "human", "human": {"rater": " "}}, "printable"),
        ({"judge": "human", "human": {"rater": "\udcff"}}, "printable"),
        ({"judge": "human", "human": {"rater": "Ada", "port": 70000}}, "--port 70000"),
        ({"judge": "human", "human": {"rater": "Ada"}, "estimate": True}, "--estimate is for endpoints"),
        ({"judge": "human", "human": {"rater": "Ada"}, "agreement": (Path("none"),)}, "--agreement none is no parquet"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_shown(table, tmp_path, settings, why):
    with pytest.raises(Refusal, match=why):
        settings = settings | {"human": HumanSettings(**settings.get("human", {}))}
        judge(JudgeConfig(items=table, cache=tmp_path / "cache", out=tmp_path / "out.parquet", **settings))
    assert not (tmp_path / "out.parquet").exists()


def test_a_port_that_is_taken_is_refused(table, tmp_path):
    with Server(0) as server, pytest.raises(Refusal, match="cannot be had"):
        judge_by_hand(read_items(table, False), HumanSettings("Ada", port=server.server_port), AnswerCache(tmp_path))


# ---- agreement ---------------------------------------------------------------------------------------------------


def reference_kappa(a, b):
    """Cohen's κ with quadratic weights by its table of joint frequencies."""
    observed = np.zeros((5, 5))
    for one, other in zip(a, b, strict=True):
        observed[one, other] += 1 / len(a)
    expected = np.outer(observed.sum(1), observed.sum(0))
    weights = np.subtract.outer(np.arange(5), np.arange(5)) ** 2 / 16
    return 1 - (weights * observed).sum() / (weights * expected).sum()


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_the_table_of_joint_frequencies(seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 5, 80)
    b = np.where(rng.random(80) < seed / 5, a, rng.integers(0, 5, 80))
    samples = np.repeat(np.arange(40), 2)
    found, low, high = kappa(a.astype(float), b.astype(float), samples)
    assert found == pytest.approx(reference_kappa(a, b), abs=1e-12)
    picks = rng.integers(0, 40, (1000, 40))
    drawn = [reference_kappa(a.reshape(40, 2)[pick].ravel(), b.reshape(40, 2)[pick].ravel()) for pick in picks]
    np.testing.assert_allclose([low, high], np.quantile(drawn, [0.025, 0.975]), atol=0.05)


def test_kappa_of_one_grade_throughout_is_none_and_of_equals_is_one():
    same = np.full(6, 4.0)
    assert np.isnan(kappa(same, same, np.arange(6))).all()
    assert kappa(np.arange(5.0), np.arange(5.0), np.arange(5))[0] == pytest.approx(1)
    assert kappa(np.arange(5.0), np.arange(5.0)[::-1], np.arange(5))[0] == pytest.approx(-1)


def graded(path, *verdicts, judge="Ada"):
    """A table of verdicts on samples s0, s1 …; null is a failure."""
    items = [Item(f"s{n}", "m", "x", Path("a"), Path("b")) for n in range(len(verdicts))]
    found = [Failure("no") if one is None else Verdict(*one) for one in verdicts]
    table_of(items, found, judge).write_parquet(path)
    return path


def test_agreement_is_of_the_pictures_that_both_have_graded(tmp_path):
    ours = read_verdicts(graded(tmp_path / "a", (4, 0, 4), (2, 1, 4), None, (0, 2, 4), (1, 3, 4)))
    theirs = read_verdicts(graded(tmp_path / "b", (4, 1, 4), (2, 2, 4), (3, 3, 3), (0, 4, 4)))
    found = agreement(ours, theirs)
    assert found["n"].to_list() == [3, 3, 3]
    assert found["question"].to_list() == list(QUESTIONS)
    assert found["same"].to_list() == [1, 0, 1]
    expected = [1, reference_kappa([0, 1, 2], [1, 2, 4]), np.nan]
    np.testing.assert_allclose(found["kappa"], expected, atol=1e-12)
    assert agreement(ours, theirs.head(0)).is_empty()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rows: rows.drop("leakage"), "no column leakage"),
        (lambda rows: pl.concat([rows, rows]), "two verdicts on one picture"),
        (lambda rows: rows.with_columns(edit=pl.lit(5)), "whole numbers from 0 to 4"),
        (lambda rows: rows.with_columns(edit=pl.lit(1.5)), "whole numbers from 0 to 4"),
        (lambda rows: rows.with_columns(edit=pl.lit("4")), "whole numbers from 0 to 4"),
    ],
)
def test_a_table_that_is_no_judges_is_refused(tmp_path, change, why):
    path = graded(tmp_path / "a", (4, 0, 4), (2, 1, 4))
    change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(Refusal, match=why):
        read_verdicts(path)


def test_the_command_says_how_far_two_raters_agree(table, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    rng = np.random.default_rng(0)

    def by_hand(items, settings, kept):
        with contextlib.closing(Desk(items, settings.rater, settings.order_seed, kept)) as desk:
            for place, pair in enumerate(desk.pairs):
                if pair.trouble is None:
                    answer(desk, place, *rng.integers(0, 4, 2).tolist(), 4)
            return desk.outcomes()

    monkeypatch.setattr("edit.judges.command.judge_by_hand", by_hand)
    for rater, others in (("Ada", ()), ("Bob", (tmp_path / "Ada.parquet",))):
        out = tmp_path / f"{rater}.parquet"
        judge(JudgeConfig(table, "human", human=HumanSettings(rater), out=out, cache=cache, agreement=others))
    said = capsys.readouterr().out
    assert f"agreement with {tmp_path / 'Ada.parquet'}: n = 6, Cohen's κ with quadratic weights" in said
    ours, theirs = (
        pl.read_parquet(tmp_path / f"{rater}.parquet").drop_nulls("edit")["edit"] for rater in ("Bob", "Ada")
    )
    assert f"edit     {reference_kappa(ours, theirs):.3f} [" in said
    assert "leakage  none: both give one grade alone; the same grade 100.0%" in said
