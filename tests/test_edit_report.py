"""The report of an evaluation: what it says agrees with plain calculations, and what is wrong on disk is told."""

import io
import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
from browsing import DESKTOP, PHONE, browsing, needs_browser, resize
from commands import run_here
from made_evaluation import made_evaluation
from made_report import HOSTILE, read
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from analysis import style
from edit.config import ReportConfig
from edit.report import figures, gallery
from edit.report.command import report, tables
from edit.report.evaluation import read as read_evaluation
from edit.scores.closing import closing
from store.errors import Refusal

METHODS = ("plain", "description", "our-box", "true-box", "wrong-box")
SCENES = 10


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """An evaluation; nothing in it is changed by a test but what a report writes."""
    return made_evaluation(tmp_path_factory.mktemp("kept") / "evaluation", SCENES, METHODS)


@pytest.fixture(scope="module")
def page(kept):
    return report(ReportConfig(kept))


@pytest.fixture
def copy(kept, page, tmp_path):
    """The same to be damaged."""
    return shutil.copytree(kept, tmp_path / "copy")


def frame_of(n=200, right=0.7, seed=0, **means):
    """Scores of success by method, and whether our box is right; success with our box depends on it."""
    rng, rows = np.random.default_rng(seed), []
    for scene in range(n):
        is_right, luck = float(rng.random() < right), rng.random()
        for name, mean in means.items():
            p = mean if not isinstance(mean, tuple) else mean[0] if is_right else mean[1]
            rows.append((f"s{scene}", name.replace("_", "-"), "success", float(luck < p)))
        rows.append((f"s{scene}", "our-box", "box on the right object", is_right))
    return pl.DataFrame(rows, schema=["sample", "method", "metric", "value"], orient="row")


def values(frame, method, metric="success"):
    return frame.filter(method=method, metric=metric)["value"].to_numpy()


def wilson(k, n, z=1.959964):
    middle, half = k / n + z * z / 2 / n, z * np.sqrt(k / n * (1 - k / n) / n + z * z / 4 / n / n)
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def test_the_share_of_the_gap_and_its_interval_agree_with_a_plain_paired_bootstrap():
    frame = frame_of(plain=0.3, our_box=(0.65, 0.1), true_box=0.7)
    plain, ours, true = (values(frame, name) for name in ("plain", "our-box", "true-box"))
    found = closing(frame)
    assert found.n == found.share.n == 200
    assert found.share.value == pytest.approx((ours.mean() - plain.mean()) / (true.mean() - plain.mean()))
    drawn = np.random.default_rng(5).integers(0, 200, (8000, 200))
    means = [one[drawn].mean(1) for one in (plain, ours, true)]
    ends = np.quantile((means[1] - means[0]) / (means[2] - means[0]), [0.025, 0.975])
    np.testing.assert_allclose((found.share.low, found.share.high), ends, atol=0.03)
    assert (found.success["plain"].low, found.success["plain"].high) == pytest.approx(wilson(plain.sum(), 200))


def test_what_our_box_falls_short_of_is_parted_by_whether_the_box_is_right():
    frame = frame_of(plain=0.1, our_box=(0.6, 0.05), true_box=0.7)
    ours, true = values(frame, "our-box"), values(frame, "true-box")
    right = values(frame, "our-box", "box on the right object") == 1
    found = closing(frame)
    assert found.success_if_right.value == ours[right].mean() and found.success_if_right.n == right.sum()
    assert found.success_if_wrong.value == ours[~right].mean()
    assert found.short_if_wrong.value == pytest.approx((true - ours)[~right].sum() / 200)
    assert found.short_if_right.value + found.short_if_wrong.value == pytest.approx(true.mean() - ours.mean())
    assert (found.right.low, found.right.high) == pytest.approx(wilson(right.sum(), 200))
    assert found.table()["quantity"].to_list()[4] == "share of the gap closed"


@pytest.mark.parametrize(
    ("made", "said", "unsaid"),
    [
        ({"plain": 0.1, "our_box": 0.8, "true_box": 0.85}, ("gap", ": at least half."), "Why not"),
        ({"plain": 0.2, "our_box": (0.8, 0), "true_box": 0.8, "right": 0.3}, ("box is wrong too often",), "least"),
        ({"plain": 0.2, "our_box": (0.25, 0), "true_box": 0.9, "right": 1}, ("less with our box than",), "too often"),
        ({"plain": 0.5, "our_box": 0.4, "true_box": 0.4}, ("there is no gap to close", "does not obey"), "closes"),
        ({"plain": 0.5, "our_box": 0.4}, ("Nothing is known of the gap", "true-box"), "closes"),
    ],
)  # fmt: skip
def test_the_answer_says_whether_half_is_closed_or_why_not(made, said, unsaid):
    words = closing(frame_of(**made)).words()
    assert all(one in words for one in said) and unsaid not in words
    assert "200" in words or "Nothing" in words


@pytest.mark.parametrize(("true_box", "why"), [(0.1, "obeys a drawn box"), (0.35, "does not obey a drawn box")])
def test_where_edits_land_tells_an_editor_that_obeys_from_one_that_does_not(true_box, why):
    success = frame_of(plain=0.5, our_box=0.4, true_box=0.4)
    landed = frame_of(plain=0.4, our_box=0.2, true_box=true_box).filter(metric="success")
    found = closing(pl.concat([success, landed.with_columns(pl.lit("mislocalized").alias("metric"))]))
    instead = values(landed, "true-box")
    assert found.elsewhere["true-box"].value == instead.mean() and found.elsewhere["true-box"].n == 200
    assert (found.elsewhere["plain"].low, found.elsewhere["plain"].high) == pytest.approx(
        wilson(values(landed, "plain").sum(), 200)
    )
    assert why in found.words() and f"{instead.mean():.1%}" in found.words()


def test_a_gap_that_may_be_none_gives_a_share_without_interval():
    found = closing(frame_of(n=12, plain=0.5, our_box=0.55, true_box=0.6, seed=3))
    assert found.gap.low <= 0 < found.gap.value and found.share.low is None
    assert "cannot be told from none" in found.words()


def test_scenes_that_one_method_lacks_are_left_out_of_the_gap_and_counted():
    frame = frame_of(plain=0.2, our_box=0.6, true_box=0.8)
    lacking = frame.filter(~((pl.col("method") == "plain") & pl.col("sample").is_in(["s3", "s4"])))
    found, known = closing(lacking), closing(frame.filter(~pl.col("sample").is_in(["s3", "s4"])))
    assert (found.n, found.unpaired) == (198, 2) and found.share == known.share


def test_the_page_answers_first_and_has_table_figures_gallery_methods_and_provenance(kept, page):
    root = read(page)
    sections = [one["id"] for one in root.all("section")]
    wanted = ["finding-gap", "table", "finding-methods", "finding-scenes", "samples", "explained", "provenance"]
    assert sections == ["answers", *wanted]
    scores = pl.read_parquet(kept / "scores.parquet")
    words = closing(scores).words()
    assert words.split(". ")[0] in next(root.all("p", class_="lead")).text
    table = root.one("section", id="table")
    (cell,) = [
        row for one in table.all("table") for row in one.all("tr") if next(row.all("th")).text == "our-box"
    ][0:1]  # fmt: skip
    ours, plain = (values(scores, name) for name in ("our-box", "plain"))
    told = next(cell.all("td")).text
    assert told.startswith(f"{ours.mean():.3f} ± {ours.std(ddof=1) / np.sqrt(SCENES):.3f}")
    assert "[{:.3f}, {:.3f}]".format(*wilson(ours.sum(), SCENES)) in told
    (other,) = [row for one in table.all("table") for row in one.all("tr") if next(row.all("th")).text == "plain"][0:1]
    assert f"{ours.mean() - plain.mean():+.3f}, p" in next(other.all("td")).text.replace("−", "-")
    assert "3,072 MiB" in root.one("section", id="provenance").text
    for name in ("success-damage", "success-by-scene"):
        assert json.loads((kept / "report" / f"{name}.json").read_text())["command"][3] == "report"
        assert all((kept / "report" / f"{name}.{kind}").stat().st_size > 100 for kind in ("png", "svg", "csv"))


def test_a_row_of_the_gallery_shows_source_and_every_method_with_boxes_and_outcomes(kept, page):
    rows = list(read(page).one("ul", id="cards").all("li"))
    items, outcomes = (pl.read_parquet(kept / "items.parquet"), read_evaluation(kept).outcomes())
    assert len(rows) == SCENES
    for row in rows:
        sample = row.one("bdi").text
        shots = list(row.all("div", class_="shot"))
        names = [next(shot.all("p", class_="way")).text for shot in shots]
        assert names == ["source", "plain", "our-box", "true-box", "description", "wrong-box"]
        became = dict(outcomes.filter(sample=sample).select("method", "outcome").iter_rows())
        for name, shot in zip(names[1:], shots[1:], strict=True):
            assert became[name] in next(shot.all("p", class_=f"outcome {outcome_class(became[name])}")).text
            assert (len(list(shot.all("rect"))) == 2) == (name.endswith("-box")), name
        item = items.filter(sample=sample).row(0, named=True)
        true = list(shots[0].all("rect"))[1]
        assert float(true["x"]) == item["x1"] and float(true["width"]) == item["x2"] - item["x1"]
        size = Image.open(kept / item["source"]).size
        assert shots[0].one("svg")["viewbox"] == f"0 0 {size[0]} {size[1]}"
        assert item["instruction"] in row.text


def outcome_class(outcome):
    return "hit" if outcome == "success" else "miss"


def test_outcomes_are_told_from_scores_alone(kept):
    schema = ["sample", "method", "metric", "value"]
    rows = []
    given = [(1, 0, 0, 4), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 4), (0, 0, 0, 2), (None, 0, 0, 4)]
    for sample, grades in zip("abcdef", given, strict=True):
        named = dict(zip(("success", "mislocalized", "unchanged", "instruction (0–4)"), grades, strict=True))
        rows += [(sample, "plain", metric, None if value is None else float(value)) for metric, value in named.items()]
    found = read_evaluation(kept)
    items = pl.DataFrame({"sample": list("abcdefg"), "method": ["plain"] * 7})
    told = type(found)(kept, {}, items, pl.DataFrame(rows, schema, orient="row"), {}, {}, ()).outcomes()
    words = "success mislocalized unchanged leaked otherwise".split()
    assert told["outcome"].to_list() == [*words, "not scored", "not scored"]


def test_scenes_are_taken_in_turn_from_every_outcome():
    outcomes = ["success"] * 20 + ["mislocalized"] * 4 + ["leaked"]
    frame = pl.DataFrame({"sample": [f"s{i:02}" for i in range(25)], "method": "our-box", "outcome": outcomes})
    assert gallery.chosen(frame, "our-box", 7) == ["s00", "s01", "s02", "s20", "s21", "s22", "s24"]
    assert len(gallery.chosen(frame, "our-box", 60)) == 25
    root = gallery.chosen(frame, "our-box", 10)
    assert sum(name < "s20" for name in root) == 5


def test_pictures_are_made_smaller_until_the_page_is_small(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    rows = [[gallery.Shot("source", f"{i}.png", picture=Image.fromarray(noise)) for i in range(3)]]

    def side():
        return Image.open(io.BytesIO(gallery._encoded(rows)["0.png"])).width

    assert side() == gallery.SIDES[0]
    monkeypatch.setattr(gallery, "LARGEST", 3 * len(gallery._webp(Image.fromarray(noise), gallery.SIDES[1])))
    assert side() == gallery.SIDES[1]
    monkeypatch.setattr(gallery, "LARGEST", 1)
    assert side() == gallery.SIDES[-1]


def test_the_command_makes_the_same_page_byte_for_byte(copy):
    first = report(ReportConfig(copy)).read_bytes()
    files = {path.name: path.read_bytes() for path in (copy / "report").iterdir()}
    shutil.rmtree(copy / "report")
    done = run_here("edit", "report", "--out", copy)
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_bytes() == first
    assert {path.name: path.read_bytes() for path in (copy / "report").iterdir()} == files
    assert closing(pl.read_parquet(copy / "scores.parquet")).words() in done.stdout and "report.html" in done.stdout
    assert max(map(len, done.stdout.split("\n\n")[0].splitlines())) <= 120, "a line a method, as wide as a terminal"
    mean = pl.read_parquet(copy / "scores.parquet").filter(method="our-box", metric="success")["value"].mean()
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("our-box ")]
    assert f"{mean:.3f} [" in line and f" {SCENES} " in line
    told = json.loads(run_here("edit", "report", "--out", copy, "--gallery", "0", "--json").stdout)
    assert told["n"] == SCENES and told["set_aside"] == {} and {row["metric"] for row in told["summary"]} >= {"success"}
    assert b'id="samples"' not in (copy / "report.html").read_bytes()


def change(folder, **columns):
    """Set columns of the first item's sample everywhere."""
    items = pl.read_parquet(folder / "items.parquet")
    first = pl.col("sample") == items["sample"][0]
    new = [pl.when(first).then(pl.lit(value)).otherwise(pl.col(name)).alias(name) for name, value in columns.items()]
    items.with_columns(new).write_parquet(folder / "items.parquet")


def test_hostile_text_is_shown_and_never_run(copy):
    change(copy, instruction=HOSTILE, task=HOSTILE)
    label = next((copy / "pictures" / "plain").glob("*.json"))
    label.write_text(json.dumps(json.loads(label.read_text()) | {"editor": HOSTILE}))
    about = json.loads((copy / "evaluation.json").read_text())
    about["settings"]["editor"] = HOSTILE
    (copy / "evaluation.json").write_text(json.dumps(about))
    page = report(ReportConfig(copy))
    root = read(page)
    assert len(list(root.all("script"))) == 1 and not [one for one in root.all() if one["onerror"]]
    assert any(HOSTILE in row.text for row in root.one("ul", id="cards").all("li"))
    (policy,) = [one["content"] for one in root.all("meta") if one["http-equiv"] == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    for one in root.all():
        for name in ("src", "href"):
            assert one[name] is None or one[name].startswith(("data:", "#"))
    assert "made by 2 different settings" in root.one("section", id="finding-methods").text


def test_a_picture_that_cannot_be_shown_is_set_aside_with_its_reason(copy):
    gone, broken, unlabelled, mislabelled, *_ = sorted((copy / "pictures" / "our-box").glob("*.png"))
    gone.unlink()
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    unlabelled.with_suffix(".json").unlink()
    mislabelled.with_suffix(".json").write_text('{"box": [1, 2, NaN, 4]}')
    root = read(report(ReportConfig(copy)))
    told = root.one("section", id="finding-methods").text
    assert "set aside and not shown: 4 (" in told
    assert f"{gone.relative_to(copy)}: it is not there" in told and "it has no label" in told
    assert "its label is damaged" in told and f"{broken.relative_to(copy)}: " in told
    assert len(list(root.all("span", class_="lost"))) == 4
    assert len(list(root.all("div", class_="shot"))) == SCENES * (1 + len(METHODS)), "the rest is shown"


def test_scores_that_are_missing_are_counted_and_said(copy):
    scores = pl.read_parquet(copy / "scores.parquet")
    sample = scores["sample"][0]
    scores.filter(~((pl.col("sample") == sample) & (pl.col("method") == "plain"))).write_parquet(
        copy / "scores.parquet"
    )
    root = read(report(ReportConfig(copy)))
    (row,) = [one for one in root.one("ul", id="cards").all("li") if one.one("bdi").text == sample]
    assert "plain: not scored" in row["data-outcome"]
    assert "Values that are missing: 11." in root.one("section", id="finding-methods").text
    assert "one of the three methods: 1 of" in root.one("section", id="finding-gap").text


def of_another(folder):
    scores = pl.read_parquet(folder / "scores.parquet")
    scores.with_columns(pl.lit("elsewhere").alias("sample")).write_parquet(folder / "scores.parquet")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / "scores.parquet").unlink(), "scores.parquet cannot be read.*edit evaluate"),
        (lambda out: (out / "items.parquet").write_bytes(b"PAR1 no"), "items.parquet cannot be read"),
        (lambda out: (out / "evaluation.json").write_text('{"settings": []}'), "evaluation.json cannot be read"),
        (lambda out: pl.read_parquet(out / "items.parquet").drop("task").write_parquet(out / "items.parquet"),
         "no column 'task'.*evaluate` again"),
        (lambda out: pl.read_parquet(out / "items.parquet").clear().write_parquet(out / "items.parquet"), "is empty"),
        (lambda out: change(out, objects=None), "'objects' has to hold numbers, without nulls"),
        (lambda out: change(out, x1=float("nan")), "a box or number of objects of sample .* is not finite"),
        (lambda out: pl.read_parquet(out / "scores.parquet").drop("value").write_parquet(out / "scores.parquet"),
         "no column 'value'"),
        (of_another, "sample 'elsewhere'.*different"),
        (lambda out: change(out, edited="../secret.png"), "'../secret.png' is not the name of a file"),
        (lambda out: change(out, source="/etc/passwd"), "'/etc/passwd' is not the name of a file"),
    ],
)  # fmt: skip
def test_an_evaluation_that_is_not_whole_is_refused_and_the_old_page_stays(copy, damage, said):
    before = (copy / "report.html").read_bytes()
    damage(copy)
    with pytest.raises(Refusal, match=said):
        report(ReportConfig(copy))
    assert (copy / "report.html").read_bytes() == before


def test_a_negative_gallery_is_refused():
    with pytest.raises(Refusal, match="--gallery -1"):
        ReportConfig(gallery=-1)


@pytest.fixture
def judged(copy):
    """A function that writes verdicts, grade 3 for all but one that failed."""

    def make(name="gemini.parquet", **columns):
        items = pl.read_parquet(copy / "items.parquet").select("sample", "method")
        first = pl.int_range(pl.len()) == 0
        grades = [pl.when(first).then(None).otherwise(3).cast(pl.Int8).alias(q) for q in ("edit", "subject", "leakage")]
        table = items.with_columns(*grades, pl.when(first).then(pl.lit("no answer")).alias("failed"))
        table = table.with_columns(**columns)
        table.write_parquet(copy / name)
        return copy / name

    return make


def test_verdicts_of_judges_come_beside_the_exact_scores(copy, judged):
    root = read(report(ReportConfig(copy, (judged(), judged("person.parquet")), gallery=2)))
    heads = [one.text for one in root.one("section", id="table").all("th")]
    assert "edit, judge gemini" in heads and "leakage, judge person" in heads
    summary = pl.read_parquet(copy / "report" / "methods-all means.parquet")
    (plain,) = summary.filter(method="plain", metric="edit, judge gemini").iter_rows(named=True)
    assert (plain["mean"], plain["n"], plain["missing"]) == (3.0, SCENES - 1, 1)
    assert "gemini 3/3/3" in next(root.all("li", class_="card scene")).text
    assert "person.parquet" in root.one("section", id="provenance").text


def test_verdicts_that_do_not_fit_are_refused(copy, judged):
    with pytest.raises(Refusal, match="two files are called gemini"):
        report(ReportConfig(copy, (judged(), judged())))
    with pytest.raises(Refusal, match="judges no picture of this"):
        report(ReportConfig(copy, (judged("other.parquet", sample=pl.lit("x")),)))
    with pytest.raises(Refusal, match="no column 'edit'"):
        report(ReportConfig(copy, (copy / "items.parquet",)))
    with pytest.raises(Refusal, match="is no parquet table"):
        report(ReportConfig(copy, (copy / "evaluation.json",)))


def test_a_point_of_the_scatter_lies_at_its_damage_and_success_with_its_name_and_cross(kept):
    summary, _ = tables(read_evaluation(kept))
    damage = "LPIPS (AlexNet), filled"
    with style.styled():
        figure, axes = plt.subplots()
        figures._panel(axes, summary, damage, "success")
        plt.close(figure)
    points = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() != "None"}
    mean = {(row["method"], row["metric"]): row["mean"] for row in summary.iter_rows(named=True)}
    assert points == {(mean[name, damage], mean[name, "success"]) for name in METHODS}
    assert {text.get_text() for text in axes.texts} == set(METHODS)
    crosses = [segment for part in axes.collections for segment in part.get_segments()]
    assert len(crosses) == 2 * len(METHODS)
    (row,) = summary.filter(method="our-box", metric="success").iter_rows(named=True)
    wanted = [[mean["our-box", damage], row["low"]], [mean["our-box", damage], row["high"]]]
    assert any(np.allclose(segment, wanted) for segment in crosses)
    assert len({look["marker"] for look in map(figures.look, figures.METHODS)}) == len(figures.METHODS)


def test_damage_is_lpips_unless_its_trunk_is_random():
    assert figures.damage_metric(["L2", "LPIPS (AlexNet), map", "LPIPS (AlexNet), filled"]) == "LPIPS (AlexNet), filled"
    assert figures.damage_metric(["success", "LPIPS (random trunk), filled", "L2"]) == "L2"
    assert figures.damage_metric(["success"]) is None


def test_strata_agree_with_a_plain_count(kept):
    found = read_evaluation(kept)
    counted = figures.strata(found.scores, found.scenes)
    scenes = {row["sample"]: row for row in found.scenes.iter_rows(named=True)}
    for row in counted.iter_rows(named=True):
        known = []
        for sample, value in (
            found.scores.filter(method=row["method"], metric="success").select("sample", "value").rows()
        ):
            low, _, high = row["group"].partition("–")
            of = scenes[sample]
            if of["task"] == row["group"] if row["by"] == "task" else int(low) <= of["objects"] <= int(high or low):
                known.append(value)
        assert row["n"] == len(known) and row["mean"] == pytest.approx(np.mean(known))
        assert (row["low"], row["high"]) == pytest.approx(np.clip(wilson(sum(known), len(known)), 0, 1), abs=1e-9)
    assert counted.filter(by="objects", method="plain")["n"].sum() == SCENES


@pytest.mark.parametrize("spread", [1.0, 0.02, 0.0])
def test_labels_of_points_cover_neither_each_other_nor_a_point_and_stay_within(spread):
    rng = np.random.default_rng(2)
    points = [(*(0.5 + spread * (rng.random(2) - 0.5)), f"method number {i}") for i in range(8)]
    with style.styled():
        figure, axes = plt.subplots(figsize=(6, 4.5))
        axes.set(xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
        style.label_points(axes, points)
        renderer = figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        frame = axes.get_window_extent(renderer)
        places = axes.transData.transform([point[:2] for point in points])
        plt.close(figure)
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(*place) for place in places)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def opened(browser, page):
    def make(size=DESKTOP):
        resize(browser, size)
        browser.get("about:blank")
        browser.get(page.as_uri())
        return browser

    yield make
    assert browser.get_log("browser") == []


SHOWN = "[...document.querySelectorAll('.scene:not([hidden])')]"


def shown(browser):
    """Samples of the rows that are shown, in their order."""
    return browser.execute_script(f"return {SHOWN}.map(row => row.querySelector('bdi').textContent)")


@needs_browser
def test_rows_are_filtered_by_task_outcome_box_and_words(opened, kept):
    browser, found = opened(), read_evaluation(kept)
    outcomes, scenes = found.outcomes(), found.scenes
    every = scenes["sample"].to_list()
    assert shown(browser) == every
    form = browser.find_element(By.ID, "filters")

    def choose(name, value):
        Select(form.find_element(By.NAME, name)).select_by_value(value)

    choose("task", "removal")
    assert shown(browser) == scenes.filter(task="removal")["sample"].to_list() != every
    form.find_element(By.CSS_SELECTOR, "button").click()
    choose("outcome", "plain: mislocalized")
    wanted = outcomes.filter(method="plain", outcome="mislocalized")["sample"].to_list()
    assert shown(browser) == wanted and 0 < len(wanted) < SCENES
    assert browser.find_element(By.ID, "count").text == f"{len(wanted)} of {SCENES} shown"
    form.find_element(By.CSS_SELECTOR, "button").click()
    choose("box", "wrong box")
    wrong = found.scores.filter(pl.col("value") == 0, method="our-box", metric="box on the right object")
    assert shown(browser) == wrong["sample"].to_list() != []
    form.find_element(By.CSS_SELECTOR, "button").click()
    word = scenes["instruction"][2].split()[-2]
    form.find_element(By.NAME, "text").send_keys(word.upper())
    assert shown(browser) == scenes.filter(pl.col("instruction").str.contains(word))["sample"].to_list()
    form.find_element(By.NAME, "text").send_keys("nowhere to be found")
    assert shown(browser) == [] and browser.find_element(By.ID, "none-fits").is_displayed()
    form.find_element(By.CSS_SELECTOR, "button").click()
    choose("sort", "-damage")
    damage = found.scores.filter(method="our-box", metric="LPIPS (AlexNet), filled").sort("value", descending=True)
    assert shown(browser) == damage["sample"].to_list()


@needs_browser
def test_boxes_are_switched_by_the_keyboard_with_or_without_script(opened, browser):
    for without in (False, True):
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": without})
        try:
            opened()
            true, drawn = (browser.find_element(By.CSS_SELECTOR, f"svg.{kind}") for kind in ("true", "drawn"))
            assert true.is_displayed() and drawn.is_displayed()
            browser.find_element(By.ID, "show-true").send_keys(Keys.SPACE)
            assert not true.is_displayed() and drawn.is_displayed()
            rows = browser.find_elements(By.CSS_SELECTOR, ".scene")
            assert len(rows) == SCENES and all(row.is_displayed() for row in rows)
            assert browser.find_element(By.ID, "filters").is_displayed() != without
        finally:
            browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@needs_browser
@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 700)])
def test_the_page_never_scrolls_sideways_but_a_row_does_by_the_keyboard(opened, size):
    browser = opened(size)
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner
    assert browser.execute_script("return [...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    strip = browser.find_element(By.CSS_SELECTOR, ".strip")
    if size != DESKTOP:
        strip.send_keys(Keys.ARROW_RIGHT)
        moved = "const s = document.querySelector('.strip'); return [s.scrollWidth > s.clientWidth, s.scrollLeft > 0]"
        wait = "const done = arguments[0]; setTimeout(done, 400)"
        browser.execute_async_script(wait)
        assert browser.execute_script(moved) == [True, True]
