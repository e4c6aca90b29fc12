"""The findings on a proxy's attention: answers in words that say what the numbers say, figures, and no false claims."""

import json

import numpy as np
import plain_analysis as plain
import polars as pl
import pytest
from attended_store import attended_store
from matplotlib.image import imread

from analysis import reading
from analysis.attention import mass
from analysis.config import Attended
from analysis.finding import Finding
from analysis.study import Study
from store.errors import Refusal

ASKED = {"mass": reading.mass, "heads": reading.decisive, "layers": reading.vote, "words": reading.words}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = attended_store(tmp_path_factory.mktemp("attended") / "store", 60)
    study = Study(Attended(place, tmp_path_factory.mktemp("out")))
    return {name: ask(study) for name, ask in ASKED.items()}, study.config.out


@pytest.mark.parametrize("name", ASKED)
def test_every_finding_has_numbers_with_n_and_figures_with_their_data(found, name):
    finding, out = found[0][name], found[1]
    assert finding.name == name and finding.question.endswith("?")
    for drawn in finding.figures:
        assert imread(out / f"{drawn.name}.png").shape[0] > 700
        assert drawn.caption.endswith(".")
        about = json.loads((out / f"{drawn.name}.json").read_text())
        assert about["proxy"] == "true0" and about["attention"] == "attention-true-0"
        assert pl.read_csv(out / f"{drawn.name}.csv", infer_schema_length=None).height > 0
    assert "n" in next(iter(finding.tables.values())).columns
    assert "nan" not in finding.answer


def test_the_answers_name_what_was_planted(found):
    answers = {name: one.answer for name, one in found[0].items()}
    assert answers["mass"].startswith("Most goes to block 2: ")
    assert answers["heads"].startswith("3 of 6 heads") and "0.0, 0.1, 1.0" in answers["heads"].replace(
        "0.1, 0.0", "0.0, 0.1"
    )
    assert answers["layers"].startswith("Block 2 in ")
    assert "the most read token has" in answers["words"]


def test_a_finding_is_read_back_as_it_was_saved(found, tmp_path):
    finding = found[0]["layers"]
    *_, told = finding.save(tmp_path)
    assert told.name == "layers.finding.json"
    again = Finding.load(tmp_path, "layers")
    assert (again.question, again.answer, again.figures, again.caveats) == (
        finding.question,
        finding.answer,
        finding.figures,
        finding.caveats,
    )
    for name, table in finding.tables.items():
        assert again.tables[name].equals(table)


def test_a_finding_that_is_not_there_or_damaged_names_the_command_that_makes_it(found, tmp_path):
    with pytest.raises(Refusal, match="python -m analysis layers"):
        Finding.load(tmp_path, "layers")
    found[0]["layers"].save(tmp_path)
    (tmp_path / "layers-votes.parquet").write_bytes(b"torn")
    with pytest.raises(Refusal, match="python -m analysis layers"):
        Finding.load(tmp_path, "layers")


def test_one_seed_without_twins_claims_nothing_of_seeds_or_controls(tmp_path):
    place = attended_store(tmp_path / "store", 30, seeds=(4,), permuted=())
    study = Study(Attended(place, tmp_path / "out"))
    answers = [ask(study).answer for ask in ASKED.values()]
    assert not any("permuted" in answer or "κ" in answer for answer in answers)
    assert "1 seed" in answers[0]


def test_random_heads_vote_as_plain_loops_over_their_draws_say(tmp_path):
    study = Study(Attended(attended_store(tmp_path / "store", 40, seeds=(0,), permuted=()), tmp_path))
    found = reading.random_heads(study, 2)
    masses = mass(study.opened).values.astype(np.float64)
    own = [plain.vote(masses[s], [0, 1, 2])[0] for s in study.reported]
    generator = np.random.default_rng([0, 11])
    for row in found.iter_rows(named=True):
        drawn = sorted(generator.choice([3, 4, 5], 3, replace=False).tolist())
        said = [plain.vote(masses[s], drawn)[0] for s in study.reported]
        assert row["share"] == pytest.approx(np.mean([layer == 2 for layer in said]))
        assert row["agreed"] == pytest.approx(np.mean([a == b for a, b in zip(said, own, strict=True)]))
    assert found.height == reading.HEAD_DRAWS


def test_a_proxy_of_the_picture_alone_reads_no_words_and_says_so(tmp_path):
    study = Study(Attended(attended_store(tmp_path / "store", 40, tokens="image"), tmp_path))
    finding = reading.words(study)
    assert finding.tables["tags"]["tag"].to_list() == ["image"] and "top" not in finding.tables
    assert "instruction" not in finding.answer and finding.tables["tags"]["share"][0] == pytest.approx(1, abs=1e-5)


def test_twins_without_a_decisive_head_have_no_vote_and_stop_nothing(tmp_path):
    study = Study(Attended(attended_store(tmp_path / "store", 40), tmp_path, threshold=0.4))
    assert not study.deciding(study.chosen.permuted) and study.deciding(study.chosen.seeds)
    answers = [ask(study).answer for ask in ASKED.values()]
    assert "twins taught permuted labels have 0.0 heads on average" in answers[1]
    assert "permuted" not in answers[2] and not any("nan" in answer for answer in answers)
