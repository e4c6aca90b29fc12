"""What the report page says, of what it is made, and that nothing in the data can become part of it."""

import base64
import hashlib
import io
import itertools
import json
import re
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_report import HOSTILE, LAYERS, PROVENANCE, WORDS, draw, finding, hostile_samples, read, samples

from analysis import page
from analysis.finding import Drawn, Finding
from analysis.page import figures, tables
from analysis.page.markup import lead
from store.errors import Refusal


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    for name in ("layers-curve", "words-bars"):
        draw(folder, name)
    return folder


@pytest.fixture
def made(drawn, tmp_path):
    """A function that writes a page and reads it."""

    def make(findings=(), gallery=None, provenance=PROVENANCE, title="Where is it?", folder=drawn):
        return read(page.write(tmp_path, title, findings, folder, gallery, provenance))

    return make


@pytest.fixture
def usual(made):
    return made([finding("layers", figures=["layers-curve"]), finding("words", figures=["words-bars"])], samples(6))


def content(link):
    """The bytes that an address holds."""
    return base64.b64decode(link.partition(";base64,")[2], validate=True)


def cells(table):
    return [[cell.text for cell in row.all("td")] for row in table.one("tbody").all("tr")]


def test_answers_come_first_and_lead_to_their_sections(usual):
    sections = [section["id"] for section in usual.all("section")]
    assert sections == ["answers", "finding-layers", "finding-words", "samples", "provenance"]
    first, second = next(usual.all("section")).one("ol").all("li")
    assert first.one("a").text.startswith("Where is the layers kept?")
    assert first.one("a")["href"] == "#finding-layers" and second.one("a")["href"] == "#finding-words"
    told = " ".join(part.text for part in list(first.all("p"))[1:])
    assert told.split() == finding("layers").answer.split()
    assert first.one("p", class_="lead").text == "Block 6 keeps it, by far."


@given(st.text(st.sampled_from('ab N6.!?\n "“'), max_size=60))
def test_a_lead_and_its_rest_are_the_whole_answer(answer):
    assert " ".join(lead(answer)).split() == answer.split()


@pytest.mark.parametrize(
    ("answer", "first"),
    [
        (
            "No. Masking the top word does not hurt the box. More follows.",
            "No. Masking the top word does not hurt the box.",
        ),
        ("It leads by 0.039 [0.030, 0.049], e.g. by a lot. Then", "It leads by 0.039 [0.030, 0.049], e.g. by a lot."),
        ("One sentence alone", "One sentence alone"),
    ],
)
def test_the_lead_is_a_whole_sentence_of_more_than_a_word(answer, first):
    assert lead(answer)[0] == first


def test_a_section_has_answer_caveats_figures_and_the_first_table(usual):
    section = usual.one("section", id="finding-layers")
    answer = section.one("div", class_="answer")
    assert [part.text for part in answer.all("p")][1] == "No other one does."
    assert section.one("aside").one("code").text == "docs/log.md"
    shown, further = section.all("table")
    assert [head.text for head in shown.all("th")] == ["layer", "mean iou", "n", "note"]
    assert len(cells(shown)) == 14 and len(cells(further)) == 3
    assert next(section.all("summary")).text == "per seed 3 rows"


def test_nothing_is_asked_of_a_network_and_only_the_pages_own_script_may_run(usual):
    for element in usual.all():
        for attribute, value in element.attributes.items():
            assert not attribute.startswith("on") and attribute not in ("style", "srcset", "action"), element.tag
            if attribute in ("src", "href"):
                assert value.startswith(("data:", "#")), value[:80]
    style, script = usual.one("style").text, usual.one("script").text
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?:", style + script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (meta,) = (one for one in usual.all("meta") if one["http-equiv"] == "Content-Security-Policy")
    policy = dict(rule.strip().split(" ", 1) for rule in meta["content"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_same_input_makes_the_same_bytes(drawn, tmp_path):
    files = [
        page.write(tmp_path / name, "T", [finding("layers", figures=["layers-curve"])], drawn, samples(3), PROVENANCE)
        for name in "ab"
    ]
    assert files[0] == tmp_path / "a" / "report.html"
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_reader_who_listens_finds_landmarks_headings_in_order_and_a_text_for_every_picture(usual):
    for landmark in ("header", "nav", "main", "footer"):
        assert len(list(usual.all(landmark))) == 1
    levels = [int(element.tag[1]) for element in usual.all() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(image["alt"] for image in usual.all("img"))
    ids = [element["id"] for element in usual.all() if element["id"] is not None]
    assert len(ids) == len(set(ids))
    for element in usual.all():
        assert element["aria-labelledby"] is None or element["aria-labelledby"] in ids
        assert not (element["href"] or "").startswith("#") or element["href"][1:] in ids
    assert usual.one("html")["lang"] == "en"


def test_a_figure_is_an_image_that_cannot_run_scripts_with_its_caption_and_files(usual, drawn):
    figure = usual.one("figure", id="figure-layers-curve")
    image = figure.one("img")
    assert image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] == "Mean IoU against layer. "
    assert (image["width"], image["height"]) == ("576", "288")
    assert figure.one("figcaption").text.startswith("Figure 1. Mean IoU against layer.")
    assert usual.one("figure", id="figure-words-bars").one("b").text == "Figure 2."
    links = {link["download"]: link for link in figure.all("a")}
    assert list(links) == [f"layers-curve.{kind}" for kind in ("svg", "png", "csv", "json")]
    for name in list(links)[1:]:
        assert content(links[name]["href"]) == (drawn / name).read_bytes()
    assert links["layers-curve.svg"]["href"] is None, "the drawing would be on the page twice"


def test_labels_of_a_figure_keep_their_widths_where_its_font_is_missing(usual):
    svg = content(usual.one("figure", id="figure-layers-curve").one("img")["src"])
    assert b"'DejaVu Sans', Verdana, sans-serif" in svg and b"'DejaVu Sans';" not in svg


def test_of_a_drawing_too_large_for_a_page_the_picture_is_shown(drawn, tmp_path, made):
    for file in drawn.glob("layers-curve.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "layers-curve.svg").open("ab") as svg:
        svg.write(b"<!--" + b" " * figures.LARGEST_SVG + b"-->")
    figure = made([finding("layers", figures=["layers-curve"])], folder=tmp_path).one("figure")
    assert figure.one("img")["src"].startswith("data:image/png;base64,")
    assert (figure.one("img")["width"], figure.one("img")["height"]) == ("576", "288")
    assert f"{tmp_path.name}/layers-curve.svg" in figure.text


@pytest.mark.parametrize("kind", ["svg", "png", "csv", "json"])
def test_a_figure_that_is_not_there_is_named_with_the_command_that_draws_it(drawn, tmp_path, made, kind):
    for file in drawn.glob("layers-curve.*"):
        if file.suffix != f".{kind}":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        Refusal, match=rf"layers-curve\.{kind} cannot be read.*python -m analysis layers --store"
    ) as told:
        made([finding("layers", figures=["layers-curve"])], folder=tmp_path)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([0.66, 0.6049, -0.0312], ["0.660", "0.605", "−0.031"]),
        ([1040.0, 2.0], ["1,040", "2"]),
        ([12.3456, 4.5], ["12.35", "4.50"]),
        ([0.0833, 0.0833], ["0.083", "0.083"]),
        ([0.0012, 0.00345], ["0.00120", "0.00345"]),
        ([0.5, 2.3e-9, 0.0], ["0.500", "2.3e−9", "0.000"]),
        ([float("nan"), float("-inf"), 1.5], ["NaN", "−∞", "1.50"]),
        ([float("nan")], ["NaN"]),
    ],
)
def test_numbers_are_written_with_digits_that_can_be_compared(values, written):
    places = tables.decimals(np.array(values))
    assert [tables.number(value, places) for value in values] == written


def test_a_null_is_a_dash_and_not_a_number_says_so_and_neither_is_zero(made):
    rows = pl.DataFrame(
        {"value": [0.25, None, float("nan"), 0.0], "n": [1234567, None, 0, 1], "word": ["a", None, "", "d"]}
    )
    table = made([Finding("one", "Q?", "A.", tables={"numbers": rows})]).one("table", class_="numbers")
    assert cells(table) == [["0.250", "1,234,567", "a"], ["–", "–", "–"], ["NaN", "0", ""], ["0.000", "1", "d"]]
    assert [head["class"] for head in table.all("th")] == ["number", "number", "short"]


def test_names_that_are_numbers_have_no_separators_and_lists_and_bytes_are_told(made):
    rows = pl.DataFrame({"sample": [12345], "layers": [["6", None]], "raw": [b"abc"], "hit": [True]})
    shown = made([Finding("one", "Q?", "A.", tables={"numbers": rows})])
    assert cells(shown.one("table", class_="numbers")) == [["12345", "6, –", "3 bytes", "yes"]]
    text = content(shown.one("a", download="one-numbers.csv")["href"])
    assert pl.read_csv(io.BytesIO(text)).rows() == [(12345, "6, –", "3 bytes", True)]


def test_of_a_long_table_the_first_rows_are_shown_and_the_csv_has_all(made):
    long = finding("layers", rows=5000)
    shown = made([long])
    table, about = next(shown.all("table")), next(shown.all("p", class_="about"))
    assert len(cells(table)) == 200 and "the first 200 of 5,000 rows" in about.text
    assert pl.read_csv(io.BytesIO(content(about.one("a")["href"]))).equals(
        pl.read_csv(io.BytesIO(long.tables["summary"].write_csv().encode()))
    )


def test_a_table_too_large_to_carry_is_named(made):
    rows = pl.DataFrame({"value": np.random.default_rng(0).random(80_000)})
    shown = made([Finding("one", "Q?", "A.", tables={"all": rows})])
    assert "one-all.parquet" in shown.one("p", class_="about").text and not list(shown.all("a", class_="get"))[1:]


def test_a_table_without_rows_is_a_head(made):
    shown = made([Finding("one", "Q?", "A.", tables={"none": finding("x").tables["summary"].clear()})])
    assert cells(shown.one("table", class_="numbers")) == [] and "0 rows" in shown.one("p", class_="about").text


def test_hostile_text_is_text_wherever_it_stands(made, drawn):
    for kind in ("svg", "png", "csv", "json"):
        (drawn / f"a & b.{kind}").write_bytes((drawn / f"layers-curve.{kind}").read_bytes())
    bad = finding("layers", figures=["a & b"], text=HOSTILE)
    bad.tables[f"t {HOSTILE}"] = pl.DataFrame({HOSTILE: [HOSTILE]})
    shown = made([bad], hostile_samples(), {HOSTILE: {"nested": HOSTILE}, "list": [{"a": HOSTILE}]}, HOSTILE)
    assert len(list(shown.all("script"))) == 1 and "pwned" not in shown.one("script").text
    assert not any(element.text == "bold" for element in shown.all("b"))
    assert all(image["src"].startswith("data:image/") for image in shown.all("img"))
    assert shown.one("h1").text == shown.one("title").text == HOSTILE
    for tag in ("h2", "figcaption", "td", "th", "li", "dt", "dd", "option", "summary"):
        assert any(HOSTILE in element.text for element in shown.all(tag)), tag
    assert any(image["alt"].endswith(HOSTILE) for image in shown.all("img"))


def test_text_that_a_file_cannot_hold_is_replaced(made):
    shown = made([Finding("one", "Q\ud800\0?", "A.")])
    assert shown.one("h2", id="title-one").text == "Q?\ufffd?"


def test_a_card_has_what_the_filters_ask_for(made):
    first, *_ = made(gallery=samples(6)).all("li", class_="card")
    data = {key: value for key, value in first.attributes.items() if key.startswith("data-")}
    assert data == {
        "data-order": "0",
        "data-task": "swap",
        "data-l": "5",
        "data-split": "train",
        "data-outcome": "miss",
        "data-area": "0.01",
        "data-error": "0.0",
    }
    overlay, picture = first.all("img")
    assert content(overlay["src"]) == samples()["overlay"][0] and content(picture["src"]) == samples()["picture"][0]
    facts = {term.text: fact.text for term, fact in zip(first.all("dt"), first.all("dd"), strict=True)}
    assert facts["area"] == "1.0 %" and facts["energy"] == "0.50" and facts["objects"] == "4"


def test_layers_are_offered_in_the_order_of_the_model(made):
    gallery = samples(4).with_columns(l_star=pl.Series(["final", "10", "9", "embed"]))
    options = made(gallery=gallery).one("select", name="l").all("option")
    assert [option["value"] for option in options] == ["", "embed", "9", "10", "final"]


def test_what_is_absent_of_a_sample_is_a_dash_and_never_zero(made):
    *_, last = made(gallery=hostile_samples()).all("li", class_="card")
    facts = {term.text: fact.text for term, fact in zip(last.all("dt"), last.all("dd"), strict=True)}
    assert facts == dict.fromkeys(["l*", "area", "energy", "error", "task", "split", "words"], "–")
    assert last["data-area"] == last["data-error"] == "" and last["data-outcome"] == "–"
    assert [each.text for each in last.all("span", class_="overlay lost")] == ["no picture"]
    assert last.one("p", class_="instruction").text == "–"


def test_a_long_instruction_opens_on_demand_and_is_whole(made):
    long = list(made(gallery=hostile_samples()).all("li", class_="card"))[2]
    assert long.one("details").one("p").text == WORDS
    assert len(long.one("summary").text) < 160


def test_a_hit_may_be_a_share_of_tied_places_and_chance_stands_beside_energy(made):
    gallery = samples(4).with_columns(hit=pl.Series([1.0, 0.5, 0.25, None]), chance_energy=pl.lit(0.0612))
    shown = list(made(gallery=gallery).all("li", class_="card"))
    assert [card["data-outcome"] for card in shown] == ["hit", "hit", "miss", "–"]
    assert shown[0].one("div", class_="energy").one("dd").text == "0.50 (chance 0.06)"


def test_without_boxes_of_a_proxy_no_error_is_shown_or_asked_for(made):
    shown = made(gallery=samples(4).drop("iou", "n_objects"))
    assert not list(shown.all("input", name="error-from")) and not list(shown.all("option", value="-error"))
    assert "error" not in {term.text for term in shown.all("dt")}


def test_an_empty_gallery_and_none_and_no_findings_say_so(made):
    empty = made(gallery=samples(4).clear())
    assert "No sample was drawn." in empty.one("section", id="samples").text and not list(empty.all("form"))
    none = made(provenance={})
    assert not list(none.all("section", id="samples")) and "Samples" not in none.one("nav").text
    assert "No question has been answered yet." in none.one("section", id="answers").text
    assert "Nothing is known" in none.one("section", id="provenance").text


def test_a_gallery_without_a_column_is_refused_by_its_name(made):
    with pytest.raises(Refusal, match="no column 'l_star'"):
        made(gallery=samples(4).drop("l_star"))


def test_provenance_is_readable_and_the_json_is_the_same(made):
    given = PROVENANCE | {"folder": Path("runs/x"), "when": datetime(2026, 1, 2, tzinfo=UTC), "loss": float("nan")}
    section = made(provenance=given).one("section", id="provenance")
    told = json.loads(content(section.one("a")["href"]))
    assert told == PROVENANCE | {"folder": "runs/x", "when": "2026-01-02 00:00:00+00:00", "loss": "nan"}
    assert cells(section.one("table"))[1] == ["joint-seed1", "1", "3b1f" * 16]
    assert ", ".join(LAYERS) in section.text and "content hash" in section.text


def test_fifteen_figures_and_120_samples_stay_under_15_megabytes(drawn, tmp_path):
    random, findings = np.random.default_rng(0), []
    for place in range(15):
        for kind, more in (("svg", 180_000), ("png", 150_000), ("csv", 10_000), ("json", 0)):
            file = tmp_path / f"f{place}.{kind}"
            file.write_bytes((drawn / f"layers-curve.{kind}").read_bytes() + random.bytes(more))
        findings.append(Finding(f"f{place}", "Q?", "A.", (Drawn(f"f{place}", "C."),), finding("x", 400).tables))
    gallery = samples(120).with_columns(pl.lit(random.bytes(15_000)).alias(name) for name in ("picture", "overlay"))
    assert page.write(tmp_path, "T", findings, tmp_path, gallery, PROVENANCE).stat().st_size < 15e6


def test_the_pages_files_are_part_of_the_package():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["analysis.page"]
    kept = {file.name for pattern in patterns for file in Path(page.__file__).parent.glob(pattern)}
    assert {"page.html", "page.css", "page.js"} <= kept
