"""The whole analysis of a small real study: commands, the report, the page of queries."""

import json
import re
import sys
from pathlib import Path

import polars as pl
import pytest
from pocket_run import pocket_run

from analysis.__main__ import COMMANDS
from analysis.config import ReportConfig
from analysis.finding import SUFFIX, Finding
from analysis.report import report
from store.commandline import route
from store.errors import Refusal

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import run_queries  # noqa: E402

PAGE = (ROOT / "docs/queries.md").read_text()
QUESTIONS = "curves mass heads layers words maps causes norms similarity position lens".split()


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """A small study; nothing in it is changed by a test."""
    return pocket_run(tmp_path_factory.mktemp("pocket"))


def asked(pocket, out, **changes):
    given = {"data": str(pocket / "data/scenes"), "probes": pocket / "runs/probes", "gallery": 8, "examples": 4}
    return ReportConfig(str(pocket / "data/store.zarr"), out, samples=24, images=16, **given | changes)


@pytest.fixture(scope="module")
def written(pocket, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis")
    return report(asked(pocket, out)), out


def test_the_report_answers_every_question_with_files_for_each(written):
    page, out = written
    names = [path.name.removesuffix(SUFFIX) for path in out.glob(f"*{SUFFIX}")]
    assert sorted(names) == sorted(QUESTIONS)
    text = page.read_text()
    for name in names:
        found = Finding.load(out, name)
        assert found.answer[:60].split("<")[0].split("'")[0][:40] in re.sub(r"&#x27;|&quot;", "'", text)
        for drawn in found.figures:
            for suffix in ("png", "svg", "csv", "json"):
                assert (out / f"{drawn.name}.{suffix}").stat().st_size > 100
            assert json.loads((out / f"{drawn.name}.json").read_text())["command"]
    assert not re.search(r'(src|href)="https?://', text)
    shown = pl.read_parquet(out / "maps-gallery.parquet")
    assert shown.height == 8 and shown["words"].dtype == pl.String and "[&#x27;" not in text


def test_the_same_store_gives_the_same_answers(pocket, written, tmp_path):
    again = report(asked(pocket, tmp_path)).parent
    for name in QUESTIONS:
        first, second = Finding.load(written[1], name), Finding.load(again, name)
        assert first.answer == second.answer
        for table, rows in first.tables.items():
            assert rows.equals(second.tables[table]), (name, table)
    for picture in written[1].glob("*.svg"):
        assert picture.read_bytes() == (again / picture.name).read_bytes()


def test_what_cannot_be_asked_is_left_out_with_its_reason(pocket, tmp_path, capfd):
    page = report(asked(pocket, tmp_path, probes=tmp_path / "none", data=str(tmp_path / "nowhere")))
    told = capfd.readouterr()
    assert "curves is left out: " in told.out + told.err
    text = page.read_text()
    assert "left out" in text and "probes sweep" in text
    assert (tmp_path / "figure-4-maps.png").exists()  # drawn on plain ground


@pytest.mark.parametrize("command", ["mass", "heads", "layers", "words", "maps", "causes", "states"])
def test_each_question_is_a_command_that_prints_its_answer(pocket, tmp_path, capsys, command):
    given = ["--store", pocket / "data/store.zarr", "--out", tmp_path]
    more = {"maps": ["--data", pocket / "data/scenes", "--gallery", 2], "states": ["--samples", 16, "--no-lens"]}
    argv = [command, *map(str, [*given, *more.get(command, [])])]
    with pytest.raises(SystemExit) as ended:
        route("python -m analysis", "", {one.__name__: one for one in COMMANDS}, argv)
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    asked = Finding.load(tmp_path, "norms" if command == "states" else command)
    assert asked.question in told.out and asked.answer in told.out
    assert f"{asked.figures[0].name}.png" in told.out


def test_one_json_object_is_printed_when_asked_for(pocket, tmp_path, capsys):
    page = report(asked(pocket, tmp_path, json=True, checkpoint=str(tmp_path / "nowhere")))
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(page)
    assert [one["name"] for one in told["findings"]] == [name for name in QUESTIONS if name != "lens"]
    assert set(told["left_out"]) == {"lens"} and "nowhere" in told["left_out"]["lens"]
    for one in told["findings"]:
        assert all(Path(path).is_file() for path in [*one["tables"].values(), *one["figures"]])


def test_a_store_without_attention_or_split_is_refused_in_one_line(pocket, tmp_path):
    with pytest.raises(Refusal, match="has no such split; it has test, train"):
        report(asked(pocket, tmp_path, report="dev"))
    assert not list(tmp_path.iterdir())


def test_the_page_of_queries_runs_from_top_to_bottom_each_in_three_lines(pocket, monkeypatch):
    monkeypatch.chdir(pocket)
    blocks = run_queries.BLOCK.findall(PAGE)
    assert len(blocks) == 11 and all(len(code.splitlines()) <= 3 for code in blocks[1:])
    shown = run_queries.run(PAGE.replace('"leftmost"', '"the"'))
    assert shown[0][1] is None and all(answer for _, answer in shown[1:])
    assert len(re.findall("^## ", PAGE, re.MULTILINE)) == 10
    assert PAGE.count("```text") == 10  # the page has what was printed
