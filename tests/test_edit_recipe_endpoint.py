"""The recipe's writer behind an endpoint, against a real local server."""

import json

import pytest
from judging import KEY, Endpoint, reply, said, slam

from edit.endpoints import endpoint
from edit.endpoints.config import EndpointSettings
from edit.endpoints.endpoint import Closed
from edit.recipe.config import RecipeConfig
from edit.recipe.run import Passed, Stage, run_stage, stages_of, told
from edit.recipe.stages import Given, Shelf
from edit.recipe.words import NO_ANSWER, NO_PAIR, WRITER_SCHEMA, WRITER_SYSTEM, EndpointText, LanguageWriter
from extract.omniedit import BadSample
from store.errors import Refusal

PAIR = {"scene": "Six cups in a row, one red.", "edit": "Make the red cup white."}
PRICES = {"price_in": 1000.0, "price_out": 10_000.0}  # of a million: an answer of 1000 and 50 tokens costs 1.5


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.002)
    monkeypatch.setenv("WRITER_KEY", KEY)


def writer_at(server, kind="openai", **settings):
    chosen = {"url": server.url, "temperature": 0.9, "timeout": 20.0, **settings}
    return LanguageWriter(EndpointText(kind, "writer-1", EndpointSettings(**chosen)))


def stage_at(server, shelf, samples, **settings):
    from edit.recipe.dataset import Sample

    rows = [Sample(number, str(number)) for number in range(samples)]
    stage = Stage("write", writer_at(server, **settings))
    passed = run_stage(
        0,
        stage,
        rows,
        Shelf(shelf),
        RecipeConfig(writer="openai:writer-1", generator="pocket", harmonizer="pocket", captioner="pocket"),
    )
    return passed, rows


@pytest.mark.parametrize("kind", ["openai", "gemini"])
def test_an_endpoint_is_asked_for_a_pair_of_prompts_as_it_expects(kind):
    with Endpoint(reply(said(PAIR, kind=kind))) as server:
        work = writer_at(server, kind, key_env="WRITER_KEY").load()
        made = work(Given(0, 2**32 - 1, {}, {}))
        work.close()
    assert made.told == PAIR | {"task": "attribute_modification"}
    (asked,) = server.asked
    body = asked["body"]
    if kind == "openai":
        assert asked["headers"]["Authorization"] == f"Bearer {KEY}"
        system, user = body["messages"]
        assert system == {"role": "system", "content": WRITER_SYSTEM}
        assert user["content"][0]["text"].startswith("The scene shows ")
        assert body["response_format"]["json_schema"]["schema"] == WRITER_SCHEMA
        sampling = body
    else:
        assert body["systemInstruction"] == {"parts": [{"text": WRITER_SYSTEM}]}
        assert body["contents"][0]["parts"][0]["text"].startswith("The scene shows ")
        sampling = body["generationConfig"]
        assert sampling["responseJsonSchema"] == WRITER_SCHEMA
    assert (sampling["temperature"], sampling["seed"]) == (0.9, 2**31 - 1)


def test_what_the_answers_cost_is_told_and_what_is_on_the_shelf_is_not_asked_again(tmp_path):
    with Endpoint(usual=reply(said(PAIR))) as server:
        passed, samples = stage_at(server, tmp_path, 3, **PRICES)
        assert (passed.new, passed.samples, passed.spent) == (3, 3, pytest.approx(4.5))
        assert all(one.told["scene"] == PAIR["scene"] for one in samples)
        again, _ = stage_at(server, tmp_path, 4, **PRICES)
        assert (again.new, again.samples, again.spent) == (1, 4, pytest.approx(1.5))
    assert len(server.asked) == 4


def test_a_sample_without_an_answer_is_set_aside_and_the_rest_goes_on(tmp_path):
    blocked = reply(said(PAIR, finish="content_filter"))
    with Endpoint(blocked, slam, slam, reply(said(text="no pair")), usual=reply(said(PAIR))) as server:
        passed, samples = stage_at(server, tmp_path, 4, attempts=2)
    assert passed.samples == 1
    assert [one.aside[1] for one in samples[:3]] == [NO_ANSWER, NO_ANSWER, NO_PAIR]
    assert "content_filter" in samples[0].aside[2] and "2 attempts" in samples[1].aside[2]


@pytest.mark.parametrize(
    ("steps", "settings", "said_of", "aside"),
    [
        ([reply(said(PAIR)), reply({"error": {"message": "wrong key"}}, 401)], {}, "wrong key", 0),
        ([reply(said(PAIR))], PRICES | {"budget": 2.0}, "--budget 2", 0),
        ([reply(said(PAIR))] + [slam] * 5, {"attempts": 1}, "5 questions in a row", 4),
    ],
)
def test_an_endpoint_that_answers_nobody_ends_the_run_and_what_it_wrote_is_kept(
    tmp_path, steps, settings, said_of, aside
):
    with Endpoint(*steps, usual=reply(said(PAIR))) as server:
        with pytest.raises(Closed, match=said_of):
            stage_at(server, tmp_path, 8, **settings)
        asked = len(server.asked)
        passed, _ = stage_at(server, tmp_path, 8)
        assert (passed.samples, passed.new) == (8 - aside, 7 - aside)
        assert len(server.asked) - asked == passed.new


def test_an_answer_to_nobody_is_a_bad_sample_of_one(tmp_path):
    with Endpoint(reply({"error": {"message": "too long"}}, 400)) as server:
        work = writer_at(server).load()
        with pytest.raises(BadSample, match="too long"):
            work(Given(0, 0, {}, {}))
        work.close()


def test_settings_name_the_endpoint_and_its_key_is_nowhere():
    models = {"generator": "pocket", "harmonizer": "pocket", "captioner": "pocket"}
    settings = EndpointSettings(url="https://example.org/v1", key_env="WRITER_KEY", temperature=None)
    config = RecipeConfig(writer="gemini:models/some:one", endpoint=settings, **models)
    with pytest.raises(Refusal, match="--generator 'pocket'"):  # there is no pocket generator
        stages_of(config)
    described = json.dumps(EndpointText("gemini", "models/some:one", settings).describe())
    assert "example.org" in described and "some:one" in described and KEY not in described
    with pytest.raises(Refusal, match="add --writer openai:NAME"):
        RecipeConfig(writer="some/model", endpoint=settings, **models)


def test_the_summary_says_what_a_stage_cost():
    passed = Passed("write", 3, 3, 1.0, 4.5)
    summary = {
        "dataset": {"samples": 3, "path": "there"},
        "asked": 3,
        "verdicts": {},
        "verified": {"samples": 0, "path": None},
    }
    summary |= {"set_aside": {}, "boxes": None, "boxes_of_person": None, "seconds": 1.0, "review": "review"}
    summary["stages"] = {"write": {"samples": passed.samples, "new": passed.new, "seconds": 1.0, "spent": passed.spent}}
    assert "3 of them now, 1.0 s, 4.5000 spent" in told(summary)
