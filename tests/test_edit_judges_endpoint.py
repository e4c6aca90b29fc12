"""Judges behind endpoints, against a real local server that plays them well and badly."""

import base64
import io
import json
import os
import threading
import time
from email.utils import formatdate

import httpx2
import polars as pl
import pytest
from judging import GRADES, KEY, Endpoint, cut, flood, hang, picture, reply, said, slam, trickle
from PIL import Image

from edit.endpoints import endpoint
from edit.endpoints.endpoint import checked_url, key_from, retry_after
from edit.judges.cache import AnswerCache
from edit.judges.config import JudgeEndpoint
from edit.judges.endpoint import EndpointJudge
from edit.judges.judge import Item, judge_all
from edit.judges.questions import ANSWER_SCHEMA, Cost, Failure, Verdict, prompt_for
from store.errors import Refusal

VERDICT = Verdict(4, 3, 2, "the cube is blue", Cost(1000, 50))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.002)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def judge_at(server, kind="openai", cache=None, model="judge-1", max_tokens=2048, **settings):
    made = JudgeEndpoint(url=server.url, **{"timeout": 20.0} | settings)
    return EndpointJudge(kind, model, made, cache, max_tokens)


def ask(server, instruction="make it blue", box=None, kind="openai", **settings):
    with judge_at(server, kind, **settings) as judge:
        return judge.judge(picture(0), picture(1), instruction, box)


def items(count, first=0):
    return [Item(f"s{n}", "ours", f"edit {n}", picture(0), picture(n)) for n in range(first, first + count)]


def test_an_openai_endpoint_is_asked_as_it_expects_and_its_verdict_read():
    with Endpoint() as server:
        assert ask(server, key_env="JUDGE_KEY", sampling_seed=7, max_tokens=99) == VERDICT
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions"
    assert asked["headers"]["Authorization"] == f"Bearer {KEY}"
    assert asked["headers"]["Content-Type"] == "application/json"
    body = asked["body"]
    assert {name: body[name] for name in ("model", "temperature", "seed", "max_completion_tokens")} == {
        "model": "judge-1",
        "temperature": 0.0,
        "seed": 7,
        "max_completion_tokens": 99,
    }
    assert body["response_format"]["json_schema"]["schema"] == ANSWER_SCHEMA
    (message,) = body["messages"]
    *pictures, text = message["content"]
    assert text == {"type": "text", "text": prompt_for("make it blue")}
    for number, part in enumerate(pictures):
        kind, data = part["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == picture(number).tobytes()


def test_a_gemini_endpoint_is_asked_as_it_expects_and_its_verdict_read():
    answer = said(kind="gemini")
    answer["candidates"][0]["content"]["parts"].insert(0, {"text": '{"edit": 0}', "thought": True})
    answer["usageMetadata"]["thoughtsTokenCount"] = 30
    with Endpoint(reply(answer)) as server:
        settings = {"key_env": "JUDGE_KEY", "model": "models/gem/ini", "temperature": None}
        verdict = ask(server, kind="gemini", box=(0, 0, 28, 28), **settings)
    assert verdict == Verdict(4, 3, 2, "the cube is blue", Cost(1000, 80))
    (asked,) = server.asked
    assert asked["path"] == "/v1/models/gem%2Fini:generateContent"
    assert asked["headers"]["x-goog-api-key"] == KEY
    assert "Authorization" not in asked["headers"]
    assert asked["body"]["generationConfig"] == {
        "responseMimeType": "application/json",
        "responseJsonSchema": ANSWER_SCHEMA,
        "maxOutputTokens": 2048,
    }
    *pictures, text = asked["body"]["contents"][0]["parts"]
    assert text == {"text": prompt_for("make it blue", (0, 0, 28, 28), (56, 56))}
    for number, part in enumerate(pictures):
        assert part["inline_data"]["mime_type"] == "image/png"
        shown = Image.open(io.BytesIO(base64.b64decode(part["inline_data"]["data"])))
        assert shown.tobytes() == picture(number).tobytes()


def test_without_a_named_variable_no_key_is_sent():
    with Endpoint() as server:
        ask(server)
    assert not {"authorization", "x-goog-api-key"} & {name.lower() for name in server.asked[0]["headers"]}


def test_the_content_of_an_answer_may_come_in_parts():
    parts = [{"type": "text", "text": text} for text in ('{"edit": 4, "subject"', ': 3, "leakage": 2}')]
    with Endpoint(reply(said(text=parts))) as server:
        assert ask(server) == Verdict(4, 3, 2, "", Cost(1000, 50))


@pytest.mark.parametrize(
    "step",
    [
        reply({"error": {"message": "slow down"}}, 429, Retry_After="0"),
        reply({"error": {"message": "oh"}}, 500),
        reply("<html><body>Bad gateway</body></html>", 502, Content_Type="text/html"),
        reply("<html><body>Please wait</body></html>", 200, Content_Type="text/html"),
        reply('{"choices": [{"mess', 200),
        reply(b"\xff\xfe\x00", 200),
        reply("", 200),
        reply("null", 200),
        reply("[1]", 200),
        reply({"choices": []}, 200),
        reply({"choices": [{"message": {"content": 7}}]}, 200),
        reply({"error": {"message": "overloaded", "code": 502}}, 200),
        reply(said(kind="gemini"), 200),
        reply("not gzip at all", 200, Content_Encoding="gzip"),
        cut,
        slam,
    ],
)
def test_what_passes_is_tried_again(step):
    with Endpoint(step, step) as server:
        assert ask(server, attempts=3) == VERDICT
    assert len(server.asked) == 3


def test_a_server_that_hangs_is_left_and_asked_again():
    with Endpoint(hang) as server:
        assert ask(server, timeout=0.5) == VERDICT
    assert len(server.asked) >= 2


def test_a_server_that_trickles_is_left_though_no_read_is_slow():
    with Endpoint(usual=trickle) as server:
        began = time.monotonic()
        failure = ask(server, timeout=0.3, attempts=2)
        assert time.monotonic() - began < 15
    assert failure == Failure("no answer in 2 attempts, at last: nothing came within 0.3 s")


def test_an_endless_answer_is_not_read_to_its_end():
    with Endpoint(usual=flood) as server:
        failure = ask(server)
    assert "more than 1048576 bytes" in failure.reason
    assert len(server.asked) == 1


def test_a_long_text_is_set_aside():
    with Endpoint(reply(said(text="very " * 10_000 + json.dumps(GRADES)))) as server:
        failure = ask(server)
    assert "characters, more than" in failure.reason
    assert failure.cost == Cost(1000, 50)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (reply({"error": {"message": "quota\nexceeded " + "x" * 5000}}, 429), "HTTP 429: quota exceeded xxx"),
        (reply("<h1>down</h1>", 503), "HTTP 503: <h1>down</h1>"),
        (reply("{", 200), "its answer is no JSON: {"),
        (reply({"object": "list"}, 200), "its answer is not of the kind openai"),
        (reply({"error": {"message": "upstream died"}}, 200), "upstream died"),
        (slam, "RemoteProtocolError"),
        (cut, "RemoteProtocolError"),
    ],
)
def test_attempts_have_an_end_that_says_why(step, why):
    with Endpoint(usual=step) as server:
        failure = ask(server, attempts=3)
    assert failure.reason.startswith("no answer in 3 attempts, at last: ")
    assert why in failure.reason
    assert len(failure.reason) < 300
    assert "\n" not in failure.reason
    assert len(server.asked) == 3


def test_nobody_at_the_port_is_a_failure():
    with Endpoint() as server:
        gone = server.url
    with EndpointJudge("openai", "m", JudgeEndpoint(url=gone, attempts=2)) as judge:
        failure = judge.judge(picture(0), picture(1), "x")
    assert "ConnectError" in failure.reason


def test_the_endpoint_is_waited_for_as_long_as_it_asks():
    with Endpoint(reply({}, 429, Retry_After="0.4")) as server:
        assert ask(server) == VERDICT
    assert 0.38 < server.times[1] - server.times[0] < 10


def test_no_endpoint_is_waited_for_longer_than_the_longest_wait():
    with Endpoint(reply({}, 503, Retry_After="86400")) as server:
        assert ask(server, longest_wait=0.2) == VERDICT
    assert 0.18 < server.times[1] - server.times[0] < 10


def test_retry_after_is_read_as_seconds_or_as_a_date():
    now = 1_800_000_000.0
    assert retry_after("12", now) == 12
    assert retry_after("0.5", now) == 0.5
    assert retry_after(formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after(formatdate(now - 90, usegmt=True), now) == 0
    assert retry_after("-5", now) == 0
    for nothing in (None, "", "soon", "nan", "inf", "Sat, 99 Foo 2026 00:00:00 GMT", "9" * 400):
        assert retry_after(nothing, now) is None


def test_waits_grow_are_bounded_and_out_of_step():
    with Endpoint() as server, judge_at(server, longest_wait=0.015) as judge:
        waits = [[judge._wait(attempt, None) for _ in range(50)] for attempt in (1, 2, 3, 9)]
    for drawn, longest in zip(waits, (0.002, 0.004, 0.008, 0.015), strict=True):
        assert longest / 2 <= min(drawn) <= max(drawn) <= longest
    assert len(set(waits[0])) > 40
    assert set(waits[3]) == {0.015}


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_picture_that_is_refused_is_set_aside_at_once(status):
    refusal = reply({"error": {"message": "the picture\nis not allowed " + "!" * 1000}}, status)
    with Endpoint(refusal) as server, judge_at(server, concurrency=1) as judge:
        rows = judge_all(judge, items(2), quiet=True)
    assert rows["failed"][0].startswith(
        f"the endpoint refuses this question: HTTP {status}: the picture is not allowed"
    )
    assert len(rows["failed"][0]) < 250
    assert rows["edit"].to_list() == [None, 4]
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 301, 307])
def test_what_every_picture_would_be_refused_for_ends_the_run(status):
    answer = reply([{"error": {"message": f"bad key {KEY}"}}], status, Location="http://127.0.0.1:9/elsewhere")
    with (
        Endpoint(usual=answer) as server,
        judge_at(server, key_env="JUDGE_KEY", concurrency=1) as judge,
        pytest.raises(Refusal, match=rf"HTTP {status}: bad key \[key\]"),
    ):
        judge_all(judge, items(5), quiet=True)
    assert len(server.asked) <= 2


def test_an_endpoint_that_is_gone_ends_the_run_and_what_it_gave_is_kept():
    with Endpoint(reply(said()), usual=reply({}, 500)) as server, judge_at(server, attempts=2, concurrency=1) as judge:
        rows = judge_all(judge, items(20), quiet=True)
    failed = rows["failed"].to_list()
    assert failed[0] is None
    assert all("no answer in 2 attempts" in why for why in failed[1:5])
    assert all("5 questions in a row" in why for why in failed[5:])
    assert len(server.asked) <= 1 + 6 * 2


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        ("openai", said(text="", finish="length"), "the model stopped (length)"),
        ("openai", said(text=None, grades={}, refusal="I will not"), "the model stopped (refusal: I will not)"),
        ("openai", said(text="", finish="content_filter"), "the model stopped (content_filter)"),
        ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 9}}, "SAFETY"),
        ("gemini", said(text='{"edit": 4, ', kind="gemini", finish="MAX_TOKENS"), "the model stopped (MAX_TOKENS)"),
        ("gemini", said(text="No.", kind="gemini"), "no JSON object with grades: No."),
    ],
)
def test_a_model_that_refuses_or_breaks_off_is_set_aside_and_not_asked_again(tmp_path, kind, body, why):
    cache = AnswerCache(tmp_path)
    with Endpoint(usual=reply(body)) as server:
        failures = [ask(server, kind=kind, cache=cache) for _ in range(2)]
    assert isinstance(failures[0], Failure)
    assert failures[0] == failures[1]
    assert why in failures[0].reason
    assert len(server.asked) == 1


def test_a_second_run_asks_nothing_and_spends_nothing(tmp_path):
    prices = {"price_in": 2.0, "price_out": 10.0, "cache": AnswerCache(tmp_path)}
    with Endpoint() as server:
        with judge_at(server, **prices) as judge:
            first = judge_all(judge, items(5), quiet=True)
            assert judge.spent == pytest.approx(5 * (1000 * 2 + 50 * 10) / 1e6)
        with judge_at(server, **prices) as judge:
            assert judge.estimate(items(7))[:2] == (7, 5)
            assert judge_all(judge, items(5), quiet=True).equals(first)
            assert judge.spent == 0
        assert len(server.asked) == 5
        for other in ({"model": "judge-2"}, {"sampling_seed": 1}, {"temperature": 1.0}, {"max_tokens": 5}):
            with judge_at(server, **prices | other) as judge:
                judge_all(judge, items(1), quiet=True)
        assert len(server.asked) == 9


def test_what_did_not_come_is_not_kept(tmp_path):
    cache = AnswerCache(tmp_path)
    with Endpoint(reply({}, 500), reply("{", 200), reply({}, 400)) as server:
        assert [isinstance(ask(server, cache=cache, attempts=1), Failure) for _ in range(4)] == [
            True,
            True,
            True,
            False,
        ]
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_a_damaged_answer_is_asked_again(tmp_path):
    cache = AnswerCache(tmp_path)
    with Endpoint() as server:
        ask(server, cache=cache)
        (kept,) = tmp_path.rglob("*.json")
        kept.write_bytes(kept.read_bytes()[:40])
        with pytest.warns(UserWarning, match="damaged"):
            assert ask(server, cache=cache) == VERDICT
        assert ask(server, cache=cache) == VERDICT
    assert len(server.asked) == 2


def test_the_key_is_nowhere_but_in_the_header(tmp_path, capfd):
    echo = json.dumps(GRADES | {"reason": f"your key is {KEY}"})
    steps = [reply({"error": {"message": f"no {KEY}"}}, 500), reply(f"{KEY} is no JSON"), reply(said(text=echo))]
    with (
        Endpoint(*steps, usual=reply({"error": f"never {KEY}"}, 400)) as server,
        judge_at(server, key_env="JUDGE_KEY", cache=AnswerCache(tmp_path), concurrency=1) as judge,
    ):
        rows = judge_all(judge, items(3))
        assert KEY not in repr(judge) + repr(judge.settings) + repr(judge.wire)
    assert len(server.asked) == 5
    assert all(KEY in asked["headers"]["Authorization"] for asked in server.asked)
    assert "[key]" in rows["reason"][0]
    assert "[key]" in rows["failed"][1]
    assert KEY not in rows.write_json()
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY not in "".join(capfd.readouterr())
    assert not any(KEY in json.dumps(asked["body"]) for asked in server.asked)


def test_the_budget_is_not_exceeded_by_what_is_on_its_way(tmp_path):
    def later(handler):
        time.sleep(0.1 * len(handler.server.asked))  # the first is answered while others are on their way
        reply(said())(handler)

    each = (1000 * 100 + 50 * 200) / 1e6
    settings = {"price_in": 100.0, "price_out": 200.0, "cache": AnswerCache(tmp_path), "concurrency": 4}
    with Endpoint(usual=later) as server, judge_at(server, budget=4.5 * each, **settings) as judge:
        judge_all(judge, items(12), quiet=True)
        assert judge.spent == pytest.approx(len(server.asked) * each)
    assert len(server.asked) == 4


def test_the_budget_is_not_exceeded_and_a_larger_one_goes_on(tmp_path):
    each = (1000 * 100 + 50 * 200) / 1e6  # 0.11
    settings = {"price_in": 100.0, "price_out": 200.0, "cache": AnswerCache(tmp_path), "concurrency": 4}
    with Endpoint() as server:
        with judge_at(server, budget=4.5 * each, **settings) as judge:
            rows = judge_all(judge, items(12), quiet=True)
            assert judge.spent == pytest.approx(4 * each)
        done = rows.filter(pl.col("failed").is_null())
        assert len(server.asked) == len(done) == 4
        assert all("--budget 0.495" in why for why in rows["failed"].drop_nulls())
        with judge_at(server, budget=20 * each, **settings) as judge:
            rows = judge_all(judge, items(12), quiet=True)
            assert judge.spent == pytest.approx(8 * each)
    assert rows["failed"].null_count() == 12
    assert rows["money"].sum() == pytest.approx(12 * each)
    assert len(server.asked) == 12


def test_what_is_on_its_way_is_waited_for_before_the_budget_is_said_to_be_spent(tmp_path):
    each = (1000 * 100 + 50 * 200) / 1e6
    settings = {"price_in": 100.0, "price_out": 200.0, "cache": AnswerCache(tmp_path), "concurrency": 2}
    with Endpoint() as server, judge_at(server, budget=3.5 * each, **settings) as judge:
        first = judge._reserve(0.0)
        judge._reserve(3 * each)  # the next does not fit, for now
        told = []
        waiting = threading.Thread(target=lambda: told.append(judge._reserve(each)))
        waiting.start()
        time.sleep(0.5)
        assert not told and waiting.is_alive()
        with judge._lock:  # it costs a third of what was set aside
            judge._asking, judge._pending, judge.spent, judge._answers = 1, first, each, 1
            judge._lock.notify_all()
        waiting.join(5)
        assert told == [each]


def test_a_budget_that_pays_for_nothing_is_a_refusal_before_anything_is_asked():
    with (
        Endpoint() as server,
        judge_at(server, price_out=100.0, budget=0.001) as judge,
        pytest.raises(Refusal, match=r"--budget 0\.001"),
    ):
        judge_all(judge, items(3), quiet=True)
    assert server.asked == []


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": "many"}, {"prompt_tokens": -5, "completion_tokens": 1}])
def test_tokens_that_an_answer_does_not_count_are_estimated(usage):
    body = said(tokens=None) | ({"usage": usage} if usage else {})
    with Endpoint(reply(body)) as server, judge_at(server, price_in=1.0, price_out=1.0) as judge:
        verdict = judge.judge(picture(0), picture(1), "make it blue")
        assert judge.uncounted == 1
        assert judge.spent == verdict.cost.money > 0
    letters = len(prompt_for("make it blue"))
    assert verdict.cost.tokens_in == 2 * 4 + -(-letters // 4)
    assert verdict.cost.tokens_out == -(-len(json.dumps(GRADES)) // 4)


def test_the_estimate_asks_nothing_and_leaves_out_what_cannot_be_read(tmp_path):
    asked = [*items(3), Item("s", "m", "x", tmp_path / "none.png", picture(0))]
    with Endpoint() as server, judge_at(server, price_in=3.0, price_out=5.0) as judge:
        estimate = judge.estimate(asked)
        assert judge.spent == 0
    assert (estimate.pictures, estimate.cached, estimate.tokens_out) == (3, 0, 300)
    assert estimate.money == pytest.approx((estimate.tokens_in * 3 + 300 * 5) / 1e6)
    assert server.asked == []


def test_no_more_requests_run_at_a_time_than_allowed():
    def slow(handler):
        time.sleep(0.05)
        reply(said())(handler)

    with Endpoint(usual=slow) as server, judge_at(server, concurrency=3) as judge:
        assert judge.concurrency == 3
        judge_all(judge, items(12), quiet=True)
    assert server.most == 3


def test_who_is_waiting_stops_when_the_run_does():
    with Endpoint(reply({}, 429, Retry_After="50")) as server, judge_at(server, concurrency=2) as judge:
        began = time.monotonic()
        server.steps.append(reply({"error": "no"}, 401))
        with pytest.raises(Refusal, match="401"):
            judge_all(judge, items(2), quiet=True)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/v1",
        "http://10.0.0.1/v1",
        "http://127.0.0.1.example.org/v1",
        "http://0.0.0.0/v1",
        "http://localhost.example.org/v1",
    ],
)
def test_plain_http_to_another_machine_is_refused_unless_asked_for(url):
    with pytest.raises(Refusal, match="--plain-http"):
        checked_url(url, False)
    assert checked_url(url, True) == (url, False)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1/", "http://localhost/v1", "http://[::1]:1/v1"])
def test_this_machine_needs_no_tls(url):
    assert checked_url(url, False) == (url.rstrip("/"), True)


@pytest.mark.parametrize(
    "url", ["", "api.openai.com/v1", "ftp://a/b", "https://", "https://a b/v1", "https://a:99999/", "http://[::1/v1"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(Refusal, match="--url"):
        checked_url(url, True)


@pytest.mark.parametrize(
    "url", [f"https://user:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"https://host/v1#{KEY}", f"x://{KEY}@h"]
)
def test_a_url_with_a_secret_in_it_is_refused_without_repeating_it(url):
    with pytest.raises(Refusal) as refusal:
        checked_url(url, True)
    assert KEY not in str(refusal.value)


@pytest.mark.parametrize("value", ["", "  ", "two words", "ключ", "a\nb", "a\x00b"])
def test_a_variable_without_a_usable_key_is_refused_without_showing_it(monkeypatch, value):
    monkeypatch.setattr(os, "environ", {"SOME_KEY": value})
    with pytest.raises(Refusal, match="--key-env SOME_KEY") as refusal:
        key_from("SOME_KEY")
    assert not value.strip() or value not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"concurrency": 0}, "--concurrency"),
        ({"attempts": 0}, "--attempts"),
        ({"timeout": 0.0}, "--timeout"),
        ({"timeout": float("nan")}, "--timeout"),
        ({"price_in": -1.0}, "--price-in"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"budget": 0.0, "price_in": 1.0}, "--budget"),
        ({"budget": 1.0}, "without prices"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, word):
    with pytest.raises(Refusal, match=word):
        JudgeEndpoint(**settings)


def test_a_proxy_of_the_environment_does_not_see_what_stays_on_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Endpoint() as server:
        assert ask(server, attempts=1) == VERDICT
    assert httpx2.Client().trust_env
