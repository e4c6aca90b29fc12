"""Results, comparisons and the verdict of runs whose probes know exactly as much as they were made to."""

import json
import math

import numpy as np
import polars as pl
import pytest
from made_probes import LAYERS, about_row, made_run, stock

from probes import panel, tables
from probes.comparisons import EFFECTS, FLOOR, LAST, NORMED, SELECTIVITY, comparisons
from probes.config import EvaluateConfig
from probes.evaluate import evaluate, final_table, read_run, table
from probes.statistics import benjamini_hochberg, holm
from probes.verdict import paragraph, verdict
from store.errors import Refusal

KNOWING = {"layer-3": 0.8, "layer-2": 0.5, "layer-4": 0.7, "layer-5": 0.5, "layer-final": 0.45, "layer-embed": 0.1}


@pytest.fixture(scope="module")
def run():
    """A run whose block 3 knows most, and whose prompt tokens know more still."""
    skill = KNOWING | {"mid-prompt": 0.9, "matched-prompt-1": 0.5, "matched-prompt-n": 0.5, "control-3": 0.3}
    return made_run(skill=skill, shifts=("fresh",))


@pytest.fixture(scope="module")
def gathered(run):
    return run.gather()


def one(table, **wanted):
    rows = table.filter(**wanted)
    assert rows.height == 1, rows
    return rows.row(0, named=True)


def of(table, question, **wanted):
    return table.filter(pl.col("question") == question, **({"data": "held-out"} | wanted))


def iou(run, probe, data="held-out"):
    """IoU by the definition, one row per seed and image."""
    rows = run.predictions.filter(probe=probe, data=data).sort("seed", "sample")
    a, b = (rows.select(f"{p}{c}" for c in ("x1", "y1", "x2", "y2")).to_numpy() for p in ("", "true_"))
    overlap = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None).prod(1)
    area = [np.prod(corners[:, 2:] - corners[:, :2], axis=1) for corners in (a, b)]
    return (overlap / (area[0] + area[1] - overlap)).reshape(rows["seed"].n_unique(), -1)


def test_a_result_is_the_mean_over_seeds_and_images_and_each_seeds_own(run, gathered):
    values = iou(run, "layer-3")
    found = gathered[0].filter(probe="layer-3", data="held-out", stratum="all", metric="iou")
    assert found.columns == list(tables.RESULTS)
    over = one(found.filter(pl.col("seed").is_null()))
    assert over["value"] == pytest.approx(values.mean(), abs=1e-6)
    assert (over["n"], over["seeds"]) == (120, 3)
    for seed in range(3):
        own = one(found, seed=seed)
        assert own["value"] == pytest.approx(values[seed].mean(), abs=1e-6)
        spread = 1.96 * values[seed].std() / math.sqrt(120)
        assert own["high"] - own["low"] == pytest.approx(2 * spread, rel=0.1)


def test_every_interval_holds_its_value_and_every_row_says_n_and_seeds(gathered):
    told = gathered[0].filter(pl.col("low").is_not_null())
    assert told.filter((pl.col("low") > pl.col("value") + 1e-6) | (pl.col("high") < pl.col("value") - 1e-6)).is_empty()
    assert gathered[0]["n"].null_count() == gathered[0]["seeds"].null_count() == 0


def test_all_metrics_of_a_box_are_there_with_chance_beside_them(gathered):
    final = gathered[0].filter(probe="layer-3", data="held-out", stratum="all", seed=0).drop_nulls("low")
    assert set(final["metric"]) == set(panel.METRICS["box"])


def test_a_share_of_none_or_all_has_an_interval_with_a_width(run):
    rows = run.predictions.filter(pl.col("probe") == "layer-3").with_columns(
        pl.col(f"true_{name}").alias(name) for name in ("x1", "y1", "x2", "y2")
    )
    found = tables.results(rows, run.curves.clear(), run.about)
    row = one(found.filter(pl.col("seed").is_null()), data="held-out", stratum="all", metric="iou_at_0.5")
    assert (row["value"], row["high"]) == (1, 1)
    assert 0.95 < row["low"] < 0.99


def test_curves_keep_each_seed_and_get_a_band_over_seeds(run, gathered):
    found = gathered[0].filter(probe="layer-3", metric="error", step=100)
    assert found["stratum"].unique().to_list() == ["watched"]
    own = run.curves.filter(probe="layer-3", metric="error", step=100)["value"]
    over = one(found.filter(pl.col("seed").is_null()))
    assert over["value"] == pytest.approx(own.mean())
    assert over["high"] - over["low"] == pytest.approx(2 * 1.96 * own.std() / math.sqrt(3), rel=1e-3)
    assert sorted(found["seed"].drop_nulls()) == [0, 1, 2]


def test_strata_part_the_images_and_their_cut_points_are_in_their_names(run, gathered):
    found = gathered[0].filter(probe="layer-3", data="held-out", metric="iou").filter(pl.col("seed").is_null())
    by_area = found.filter(pl.col("stratum").str.starts_with("area"))
    assert by_area["n"].to_list() == [40, 40, 40]
    assert by_area["stratum"].str.extract(r"area: (\w+)").to_list() == ["small", "medium", "large"]
    low, high = by_area["stratum"].str.extract(r"([\d.]+)% to")[1], by_area["stratum"].str.extract(r"to ([\d.]+)%")[1]
    box = run.predictions.filter(probe="layer-3", data="held-out", seed=0)
    area = (box["true_x2"] - box["true_x1"]) * (box["true_y2"] - box["true_y1"])
    middle = ((area >= float(low) / 100 - 5e-5) & (area < float(high) / 100 + 5e-5)).to_numpy()
    assert middle.sum() == 40
    assert by_area["value"][1] == pytest.approx(iou(run, "layer-3")[:, middle].mean(), abs=1e-6)
    objects = found.filter(pl.col("stratum").str.starts_with("objects"))
    assert objects["n"].sum() == 120
    assert {"task: swap", "task: removal"} <= set(found["stratum"])


def test_a_stratum_of_few_images_is_left_out(gathered):
    assert "task: rare" not in gathered[0]["stratum"].to_list()
    assert gathered[0].filter(pl.col("stratum") != "watched")["n"].min() >= panel.SMALLEST


def test_the_layer_is_chosen_on_watched_images_and_compared_on_the_others(run, gathered):
    row = one(of(gathered[1], LAST))
    assert (row["a"], row["b"], row["n"], row["chosen_on"], row["seeds"]) == ("layer-3", "layer-5", 80, 40, 3)
    difference = (iou(run, "layer-3") - iou(run, "layer-5"))[:, 40:]
    assert row["difference"] == pytest.approx(difference.mean(), abs=1e-6)
    assert row["low"] < row["difference"] < row["high"]
    assert row["value_a"] - row["value_b"] == pytest.approx(row["difference"], abs=1e-6)
    assert one(of(gathered[1], NORMED))["b"] == "layer-final"


def test_on_other_data_the_same_layer_is_compared_on_all_images(gathered):
    row = one(of(gathered[1], LAST, data="fresh"))
    assert (row["a"], row["n"]) == ("layer-3", 120)


def test_the_floors_of_a_layer_are_constants_embeddings_and_its_own_controls(gathered):
    floors = set(of(gathered[1], FLOOR)["b"])
    constant = {"floor-text-only", "floor-image-only", "floor-mean-box", "floor-centre-box"}
    assert floors == constant | {"layer-embed", "permuted-3", "random-3", "shuffled-3"}


def test_holm_is_over_the_claims_family_and_false_discovery_over_the_layers(gathered):
    held = gathered[1].filter(data="held-out")
    family = held.filter(pl.col("question").is_in([LAST, NORMED, FLOOR]))
    np.testing.assert_allclose(family["p_holm"], holm(family["p"].to_numpy()))
    found = held.filter(pl.col("question") == SELECTIVITY)
    assert found.height == len(LAYERS)
    np.testing.assert_allclose(found["q_bh"], benjamini_hochberg(found["p"].to_numpy()))
    assert found["p_holm"].null_count() == found.height


def test_selectivity_is_task_minus_control_on_images_that_both_know(run):
    known = (pl.col("probe") != "control-3") | (pl.col("sample") % 3 != 0)
    found = of(comparisons(run.predictions.filter(known), run.about), SELECTIVITY)
    row = one(found, layer="3")
    both = np.arange(40, 120)[np.arange(40, 120) % 3 != 0]
    assert row["n"] == len(both)
    expected = (iou(run, "layer-3") - iou(run, "control-3"))[:, both].mean()
    assert row["difference"] == pytest.approx(expected, abs=1e-6)


def test_a_two_by_two_gives_both_effects_and_their_interaction(run, gathered):
    told = {row["question"]: row for row in of(gathered[1], EFFECTS[0]).vstack(of(gathered[1], EFFECTS[1])).to_dicts()}
    cell = {f"{t}-{c}": iou(run, f"matched-{t}-{c}")[:, 40:].mean() for t in ("all", "prompt") for c in "1n"}
    tokens = (cell["prompt-1"] + cell["prompt-n"] - cell["all-1"] - cell["all-n"]) / 2
    count = (cell["prompt-n"] + cell["all-n"] - cell["prompt-1"] - cell["all-1"]) / 2
    both = cell["prompt-n"] - cell["prompt-1"] - cell["all-n"] + cell["all-1"]
    assert told[EFFECTS[0]]["difference"] == pytest.approx(tokens, abs=1e-6)
    assert told[EFFECTS[0]]["low"] > 0.05
    assert told[EFFECTS[1]]["difference"] == pytest.approx(count, abs=1e-6)
    assert told[EFFECTS[1]]["low"] < 0.01
    assert one(of(gathered[1], EFFECTS[2]))["difference"] == pytest.approx(both, abs=1e-6)


def test_sample_efficiency_is_the_value_by_share(gathered):
    found = gathered[0].filter(role="efficiency", layer="2", data="held-out", stratum="all", metric="iou")
    assert sorted(found.filter(pl.col("seed").is_null())["share"]) == [1 / 8, 1 / 2]
    assert any("by share of the train split" in line for line in table(*gathered))


def coded(bits, shares=(1 / 8, 1 / 4, 1 / 2), n=800, seeds=(0, 1)):
    """Codelength probes of one layer that spend the same bits on every label."""
    rows = [
        about_row(f"code-3-{s}", "codelength", ("3",), target="cell-3x3", share=share) for s, share in enumerate(shares)
    ]
    frames = []
    for row, start, stop in zip(rows, shares, [*shares[1:], 1], strict=True):
        sample = np.arange(round(n * start), round(n * stop))
        for seed in seeds:
            named = {"probe": row["probe"], "seed": seed, "data": "held-out", "part": "next", "sample": sample}
            named |= {"sample_id": [str(i) for i in sample], "watched": False, "predicted": "0,0", "true": "0,0"}
            frames.append(pl.DataFrame(named | {"nll": np.full(len(sample), bits * math.log(2))}))
    return pl.concat(frames), pl.DataFrame(rows)


def test_an_online_code_is_the_uniform_first_portion_and_what_the_probes_spend_on_the_rest():
    predictions, about = coded(bits=1.0)
    curves = made_run(stock(extras=False)[:1]).curves.clear()
    found = tables.results(predictions, curves, about)
    value = dict(found.select("metric", "value").iter_rows())
    uniform = 800 * math.log2(9)
    assert value["uniform_codelength"] == pytest.approx(uniform)
    assert value["codelength"] == pytest.approx(100 * math.log2(9) + 700, rel=1e-5)
    assert value["compression"] == pytest.approx(uniform / (100 * math.log2(9) + 700), rel=1e-5)
    assert found["n"].unique().to_list() == [800]
    assert found["layer"].unique().to_list() == ["3"]
    assert any("online code of cell-3x3" in line for line in table(found, comparisons(predictions, about)))


def test_a_probe_that_knows_nothing_compresses_nothing():
    predictions, about = coded(bits=math.log2(9))
    found = tables.results(predictions, made_run(stock(extras=False)[:1]).curves.clear(), about)
    assert one(found, metric="compression")["value"] == pytest.approx(1)


def test_numbers_are_told_by_the_variance_they_explain():
    rng = np.random.default_rng(0)
    true = rng.normal(size=100)
    guess = true + rng.normal(0, 0.5, 100)
    rows = pl.DataFrame(
        {"probe": "layer-1", "seed": 0, "data": "held-out", "part": "test", "sample": np.arange(100), "watched": False}
        | {"sample_id": [str(i) for i in range(100)], "predicted": guess, "true": true}
    )
    about = pl.DataFrame([about_row("layer-1", "layer", ("1",), target="n_objects")])
    for frame in (rows, panel.joined([rows, coded(1.0)[0].clear()])):
        found = tables.results(frame, made_run(stock(extras=False)[:1]).curves.clear(), about)
        row = one(found.filter(pl.col("seed").is_null()), metric="r2", stratum="all")
        assert row["value"] == pytest.approx(1 - ((guess - true) ** 2).sum() / ((true - true.mean()) ** 2).sum())


def test_an_answer_that_is_no_number_is_refused_by_name(run):
    broken = run.predictions.with_columns(
        pl.when(pl.col("probe") == "layer-1", pl.col("sample") == 5).then(float("nan")).otherwise("x1").alias("x1")
    )
    with pytest.raises(Refusal, match=r"probe layer-1, seed 0, on held-out has 3 answers that are no finite numbers"):
        tables.results(broken, run.curves, run.about)


def test_two_answers_for_one_image_are_refused(run):
    twice = pl.concat([run.predictions, run.predictions.filter(probe="layer-1", seed=1).head(1)])
    with pytest.raises(Refusal, match="probe layer-1, seed 1, on held-out has sample 0 more than once"):
        tables.results(twice, run.curves, run.about)


def test_a_probe_that_nobody_describes_is_refused(run):
    with pytest.raises(Refusal, match="layer-1, which `about` does not describe"):
        tables.results(run.predictions, run.curves, run.about.filter(pl.col("probe") != "layer-1"))


def test_the_verdict_says_yes_where_it_is_yes(gathered):
    told = verdict(*gathered)
    assert [told[part]["answer"] for part in ("layer", "prompt", "controls")] == [True, True, True]
    assert told["layer"]["chosen"] == "layer-3"
    assert told["layer"]["sentence"].startswith("Yes: block 3, the best mid layer on 40 watched images")
    assert "reading prompt tokens alone helps" in told["prompt"]["sentence"]
    words = paragraph(*gathered)
    assert "as the paper found" in words
    assert "On other data that lead is: fresh +" in words


@pytest.mark.parametrize(
    ("skill", "said"),
    [
        ({}, "That the middle knows more than the end, this run does not show"),
        ({"layer-5": 0.8, "layer-final": 0.8}, "The middle does not know more than the end"),
        ({"layer-3": 0.7, "random-3": 0.7}, "beats the last layer but not every floor"),
        ({"layer-3": 0.7, "mid-prompt": 0.4}, "is not seen here: they are worse than"),
        ({"layer-3": 0.7, "mid-prompt": 0.7}, "is not seen here: they are not clearly better than"),
        ({"layer-3": 0.7, "control-3": 0.7}, "may be learning the answer rather than reading it"),
    ],
)
def test_the_paragraph_says_no_where_it_is_no(skill, said):
    assert said in paragraph(*made_run(skill=skill, n=90).gather())


def test_the_verdict_says_which_last_layer_it_had():
    told = verdict(*made_run(stock(("3", "4", "5"), extras=False), KNOWING, n=90).gather())
    assert told["layer"]["answer"] is True
    assert "on one side of the final norm only" in told["layer"]["sentence"]


def test_no_difference_is_called_one_in_a_run_without_any():
    told = verdict(*made_run(n=90).gather())
    assert [told[part]["answer"] for part in ("layer", "prompt", "controls")] == [False, False, False]


@pytest.mark.parametrize(
    "rows",
    [
        stock(("3", "4", "5"), controls=False, extras=False),
        stock(("3", "5"), controls=False, extras=False),
        stock(("final",), extras=False),
        stock(controls=False, extras=False)[:3],
        [row for row in stock(extras=False) if row["role"] == "floor"],
        [row for row in stock() if row["role"] != "floor"],
        [row for row in stock() if row["role"] == "matched"],
        stock(target="cell-3x3"),
        [row for row in stock() if row["labels"] != "control"],
        [row for row in stock() if row["probe"] != "random-3" and row["role"] != "prompt"],
        [*stock(extras=False), *({**row, "probe": f"cell-{row['probe']}"} for row in stock(target="cell-3x3"))],
        [*stock(extras=False), *({**row, "probe": f"linear-{row['probe']}", "kind": "linear"} for row in stock()[:5])],
    ],
)
def test_a_part_of_a_sweep_gives_a_table_and_a_verdict_of_what_there_is(tmp_path, capsys, rows):
    folder = made_run(rows, KNOWING, seeds=(0,), n=50, watched=20).write(tmp_path)
    evaluate(EvaluateConfig(folder))
    text = capsys.readouterr().out
    assert all(row["probe"] in text for row in rows if row["role"] in ("layer", "floor", "prompt"))
    assert "nan" not in text
    evaluate(EvaluateConfig(folder, json=True))
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"probes", "comparisons", "verdict", "paragraph"}
    assert len(told["probes"]) == len(rows)


def test_a_run_on_which_nothing_was_watched_gets_a_table_and_no_choice():
    results, compared = made_run(stock(extras=False), KNOWING, watched=0).gather()
    assert verdict(results, compared)["layer"]["answer"] is None
    assert not compared["question"].str.starts_with("mid layer").any()


def test_evaluate_prints_floors_first_layers_in_order_and_n_and_seeds_on_every_row(run, tmp_path, capsys):
    evaluate(EvaluateConfig(run.write(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("probe "))
    names = [line.split()[0] for line in lines[start + 1 :] if line.split("  ")[0]][:13]
    assert all(name.startswith("floor-") for name in names[:4])
    assert names[4:13] == [*(f"layer-{name}" for name in LAYERS), "mid-prompt"]
    layer = next(line for line in lines if line.startswith("layer-3 "))
    assert " 120 " in layer
    assert layer.split()[5] == "3"
    assert {"selectivity", "random", "shuffled", "permuted"} <= set(lines[start].split())


def test_a_folder_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"lacks results\.parquet, comparisons\.parquet, about\.parquet"):
        read_run(tmp_path)


def test_the_final_table_has_a_row_per_probe(run, gathered):
    final = final_table(gathered[0])
    assert final["probe"].to_list() == run.about["probe"].to_list()
    assert {"iou", "iou_low", "iou_high", "n", "seeds"} <= set(final.columns)
