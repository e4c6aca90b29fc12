"""The command that judges a table of edited pictures, against a real local endpoint."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from judging import GRADES, KEY, Endpoint, hang, picture, reply, said

from edit.judges.command import judge, read_items
from edit.judges.config import JudgeConfig
from edit.judges.judge import SCHEMA
from store.commandline import parse
from store.errors import Refusal

PRICES = ("--price-in", "2", "--price-out", "10")


@pytest.fixture
def table(tmp_path):
    """Six samples, two methods; pictures in a folder beside the table."""
    (tmp_path / "made/pictures").mkdir(parents=True)
    rows = []
    for n in range(6):
        picture(n).save(tmp_path / f"made/pictures/{n}.png")
        for method in ("ours", "plain"):
            box = {"x1": 1.0, "y1": 2.0, "x2": 30.0, "y2": 40.0} if n else dict.fromkeys(("x1", "y1", "x2", "y2"))
            files = {"source": f"pictures/{n}.png", "edited": "pictures/0.png"}
            rows.append({"sample": f"s{n}", "method": method, "instruction": f"{method} {n}"} | files | box)
    pl.DataFrame(rows).write_parquet(tmp_path / "made/items.parquet")
    return tmp_path / "made/items.parquet"


def options(table, server, *more):
    folder = table.parent
    given = [table, "--judge", "openai", "--model", "m", "--url", server.url, "--out", folder / "out/judged.parquet"]
    return list(map(str, ["--items", *given, "--cache", folder / "cache", *more]))


def run(*given):
    judge(parse(JudgeConfig, "python -m edit judge", "", given))


def graded(handler):
    """Grades by the instruction's number; every third is a refusal."""
    text = json.dumps(handler.server.asked[-1]["body"])
    number = int(re.search(r"(?:ours|plain) (\d)", text)[1])
    answer = "I would rather not." if number % 3 == 2 else json.dumps(GRADES | {"edit": number % 5})
    reply(said(text=answer))(handler)


def test_a_table_is_judged_and_summed_up_with_n_and_intervals(table, capsys):
    with Endpoint(usual=graded) as server:
        run(*options(table, server, *PRICES, "--concurrency", "1"))
    rows = pl.read_parquet(table.parent / "out/judged.parquet")
    assert dict(rows.schema) == SCHEMA
    assert len(rows) == 12
    assert rows["failed"].null_count() == 8
    ours = rows.filter(pl.col("method") == "ours")
    assert ours["edit"].to_list() == [0, 1, None, 3, 4, None]
    told = capsys.readouterr().out
    assert "12 pictures to ask about, 0 answered before" in told
    assert f"spent     {12 * (1000 * 2 + 50 * 10) / 1e6:.4f} in this run" in told
    assert "ours: n = 4, 2 set aside" in told
    mean, low, high = map(float, re.search(r"edit +(\S+) \[(\S+), (\S+)\]", told).groups())
    values = np.array([0, 1, 3, 4])
    draws = np.random.default_rng(5).choice(values, (20_000, 4)).mean(1)
    assert mean == values.mean()
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.025, 0.975]), atol=0.26)
    assert "4 × the answer has no JSON object with grades: I would rather not." in told
    assert not list(table.parent.rglob("*.partial"))


def test_the_estimate_alone_asks_nothing(table, capsys):
    with Endpoint() as server:
        run(*options(table, server, *PRICES, "--estimate"))
        assert server.asked == []
    assert re.search(r"about [\d,]+ tokens there and 1,200 back, about 0\.0\d+ in money", capsys.readouterr().out)
    assert not (table.parent / "out").exists()


def test_the_judge_is_told_of_boxes_only_if_asked(table):
    with Endpoint() as server:
        run(*options(table, server))
        assert "of the width" not in json.dumps(server.asked)
        server.asked.clear()
        run(*options(table, server, "--show-box"))
        assert [("of the width" in json.dumps(one)) for one in server.asked].count(True) == 10  # two have no box


def test_an_interrupted_run_keeps_its_answers_and_the_same_command_goes_on(table, monkeypatch):
    steps = [reply(said())] * 5
    program = "from store.commandline import run; from edit.judges.command import judge; run('judge', judge)"
    with Endpoint(*steps, usual=hang) as server:
        given = options(table, server, "--key-env", "JUDGE_KEY", "--timeout", "5", "--concurrency", "1")
        environment = os.environ | {"JUDGE_KEY": KEY}
        process = subprocess.Popen(
            [sys.executable, "-c", program, *given], env=environment, stdout=-1, stderr=-1, text=True
        )
        end = time.monotonic() + 120
        while len(server.asked) < 6 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert len(list((table.parent / "cache").rglob("*.json"))) == 5
        assert not (table.parent / "out/judged.parquet").exists()
        server.usual = reply(said())
        server.asked.clear()
        monkeypatch.setenv("JUDGE_KEY", KEY)
        run(*given)
    assert len(server.asked) == 12 - 5
    assert pl.read_parquet(table.parent / "out/judged.parquet")["failed"].null_count() == 12
    assert "interrupted" in err
    assert "Traceback" not in err
    assert KEY not in out + err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rows: rows.drop("edited", "method"), "no column method, edited"),
        (lambda rows: rows.head(0), "is empty"),
        (lambda rows: rows.with_columns(instruction=pl.lit(None, pl.String)), "instruction has to hold text"),
        (lambda rows: rows.with_columns(sample=pl.lit(1)), "sample has to hold text"),
        (lambda rows: rows.drop("x1"), "no column x1"),
    ],
)
def test_a_table_that_is_none_is_refused(table, change, word):
    change(pl.read_parquet(table)).write_parquet(table)
    with pytest.raises(Refusal, match=word):
        read_items(table, True)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "items").write_text("sample,method")
    for path in (tmp_path / "items", tmp_path / "none.parquet"):
        with pytest.raises(Refusal, match="no parquet table"):
            read_items(path, False)


def test_an_estimate_of_a_local_model_is_refused(table):
    with pytest.raises(Refusal, match="--estimate is for endpoints"):
        run("--items", str(table), "--judge", "local", "--model", "pocket", "--estimate")


def test_a_local_model_judges_by_the_same_command(table, capsys):
    rows = pl.read_parquet(table).head(1)
    rows.write_parquet(table)
    out = table.parent / "judged.parquet"
    cache = table.parent / "cache"
    given = ("--items", table, "--judge", "local", "--model", "pocket", "--device", "cpu", "--max-pixels", "3136")
    run(*map(str, (*given, "--max-tokens", "4", "--out", out, "--cache", cache)))
    assert "ours: n = 0, 1 set aside" in capsys.readouterr().out
    assert pl.read_parquet(out)["failed"].to_list()[0].startswith("the model stopped (not at an end after 4 tokens)")
