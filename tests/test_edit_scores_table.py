"""The table of scores agrees with plain calculations, and says what is missing."""

import itertools
import math

import numpy as np
import polars as pl
import pytest

from edit.scores import table
from probes import statistics
from store.errors import Refusal


def long(**methods):
    """A frame of one metric ``l2`` from values by method; None is a row whose value is null."""
    rows = [
        {"sample": f"s{i}", "method": method, "metric": "l2", "value": value}
        for method, values in methods.items()
        for i, value in enumerate(values)
    ]
    return pl.DataFrame(
        rows, schema={"sample": pl.String, "method": pl.String, "metric": pl.String, "value": pl.Float64}
    )


@pytest.fixture(scope="module")
def frame():
    """Three methods, a continuous metric and a share; some values are null, NaN or absent."""
    rng, rows = np.random.default_rng(0), []
    for sample in range(60):
        hard = rng.normal()
        for method, worse in (("ours", 0.0), ("plain", 0.5), ("full", 0.02)):
            value = 1 + hard + worse + rng.normal(0, 0.3)
            rows.append((sample, method, "l2", None if (sample, method) in ((3, "plain"), (5, "ours")) else value))
            if (sample, method) != (7, "full"):
                hit = float(rng.random() < 0.8 - worse)
                rows.append((sample, method, "success", math.nan if (sample, method) == (9, "full") else hit))
    return pl.DataFrame(rows, schema=["sample", "method", "metric", "value"], orient="row")


def values(frame, method, metric):
    part = frame.filter((pl.col("method") == method) & (pl.col("metric") == metric))
    pairs = zip(part["sample"], part["value"], strict=True)
    return {s: v for s, v in pairs if v is not None and not math.isnan(v)}


def row(found, **named):
    (one,) = found.filter(*(pl.col(name) == value for name, value in named.items())).iter_rows(named=True)
    return one


def test_means_errors_and_intervals_agree_with_a_plain_calculation(frame):
    found = table.summary(frame, ["success"])
    assert found["method"].unique(maintain_order=True).to_list() == ["ours", "plain", "full"]
    for method, metric in itertools.product(("ours", "plain", "full"), ("l2", "success")):
        known = np.array(list(values(frame, method, metric).values()))
        one = row(found, method=method, metric=metric)
        assert one["n"] == len(known)
        assert one["mean"] == pytest.approx(known.mean())
        assert one["sem"] == pytest.approx(
            math.sqrt(((known - known.mean()) ** 2).sum() / (len(known) - 1) / len(known))
        )
    known = np.array(list(values(frame, "plain", "l2").values()))
    drawn = np.random.default_rng(1).choice(known, (20_000, len(known))).mean(1)
    one = row(found, method="plain", metric="l2")
    np.testing.assert_allclose((one["low"], one["high"]), np.quantile(drawn, [0.025, 0.975]), atol=0.02)


def test_a_shares_interval_is_wilsons():
    found = row(table.summary(long(a=[1.0] * 9 + [0.0]), ["l2"]), method="a")
    # Wilson 1927 of 9 in 10, by his formula.
    z, p, n = 1.959964, 0.9, 10
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert found["low"] == pytest.approx((middle - half) / (1 + z * z / n))
    assert found["high"] == pytest.approx((middle + half) / (1 + z * z / n))
    certain = row(table.summary(long(a=[1.0] * 20), ["l2"]), method="a")
    assert certain["high"] == 1 and 0.8 < certain["low"] < 0.9


def test_missing_values_are_counted_whether_null_nan_or_not_there(frame):
    found = table.summary(frame, ["success"])
    assert row(found, method="plain", metric="l2")["missing"] == 1
    assert row(found, method="full", metric="l2")["missing"] == 0
    assert row(found, method="full", metric="success")["missing"] == 2
    text = table.markdown(found, table.comparisons(frame, "ours", ["success"]))
    assert "Missing: plain has no l2 for 1 samples." in text
    assert "Missing: full has no success for 2 samples." in text
    assert "Unpaired: 2 samples of l2 that ours or plain lacks." in text


def test_pairs_are_of_samples_that_both_have_and_the_test_agrees_with_all_flips_tried():
    ours, other = [1.0, 2.0, None, 4.0, 5.5, 6.0, 7.0], [2.0, 2.5, 9.0, 3.0, 7.0, None, 8.0]
    found = row(table.comparisons(long(ours=ours, other=other), "ours"), method="other")
    differences = np.array([a - b for a, b in zip(ours, other, strict=True) if None not in (a, b)])
    assert (found["n"], found["unpaired"]) == (5, 2)
    assert found["difference"] == pytest.approx(differences.mean())
    assert found["low"] <= found["difference"] <= found["high"]
    flips = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=5)]
    assert found["p"] == pytest.approx(np.mean([one >= abs(differences.sum()) - 1e-9 for one in flips]), abs=0.02)
    assert found["test"] == "sign flips"


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (8, 1), (3, 3), (2, 12), (0, 10)])
def test_mcnemar_agrees_with_the_binomial_counted_out(won, lost):
    ours = [1.0] * won + [0.0] * lost + [1.0] * 4 + [0.0] * 3
    other = [0.0] * won + [1.0] * lost + [1.0] * 4 + [0.0] * 3
    found = row(table.comparisons(long(ours=ours, other=other), "ours", ["l2"]), method="other")
    n = won + lost
    coins = [sum(coin) for coin in itertools.product((0, 1), repeat=n)]
    as_far = np.mean([abs(heads - n / 2) >= abs(won - n / 2) for heads in coins])
    assert found["p"] == pytest.approx(as_far)
    assert found["test"] == "McNemar, exact"
    assert found["difference"] == pytest.approx((won - lost) / (n + 7))


def test_holm_is_over_all_comparisons_of_the_table(frame):
    found = table.comparisons(frame, "ours", ["success"])
    assert found.select("metric", "method").rows() == [
        ("l2", "plain"), ("l2", "full"), ("success", "plain"), ("success", "full")
    ]  # fmt: skip
    np.testing.assert_allclose(found["p_holm"], statistics.holm(found["p"].to_numpy()))
    smallest = found["p"].min()
    assert found["p_holm"].min() == pytest.approx(4 * smallest)
    assert row(found, metric="l2", method="plain")["p_holm"] < 0.01
    assert row(found, metric="l2", method="full")["p_holm"] > 0.05


def test_the_order_of_rows_changes_no_number(frame):
    again = frame.sample(fraction=1, shuffle=True, seed=3)
    one = table.comparisons(frame, "ours", ["success"]).sort("metric", "method")
    other = table.comparisons(again, "ours", ["success"]).sort("metric", "method")
    for name in ("difference", "n", "unpaired"):
        np.testing.assert_allclose(one[name], other[name])


def test_the_markdown_reads_as_the_papers_table():
    ours = [0.0070 + 0.001 * (i % 3) for i in range(12)]
    frame = long(**{"our box": ours, "plain | edit": [2 * value for value in ours]})
    text = table.markdown(table.summary(frame), table.comparisons(frame, "our box"))
    lines = text.splitlines()
    assert lines[0] == "| method | l2 |"
    sem = np.std(ours, ddof=1) / math.sqrt(12)
    assert lines[2].startswith(f"| our box | 0.008 ± {sem:.3g} [0.00")
    assert lines[2].endswith("n = 12 |")
    assert lines[3].startswith(r"| plain \| edit | 0.0160 ±")
    assert any(line.startswith(r"| l2 | our box − plain \| edit | -0.008 [") for line in lines)
    assert "Holm over all 1 tests" in text and "Missing" not in text


def test_one_value_or_one_pair_gives_no_interval_and_no_test():
    frame = long(ours=[1.0, None], other=[2.0, None])
    found = row(table.summary(frame), method="ours")
    assert (found["mean"], found["sem"], found["low"], found["missing"]) == (1.0, None, None, 1)
    compared = table.comparisons(frame, "ours")
    assert row(compared, method="other")["p"] is None and row(compared, method="other")["n"] == 1
    assert "| l2 | ours − other | – | – | – |" in table.markdown(table.summary(frame), compared)


@pytest.mark.parametrize(
    ("frame", "shares", "reference", "word"),
    [
        (long(a=[1.0]).drop("metric"), [], "a", "no column 'metric'"),
        (long(a=[math.inf]), [], "a", "infinite"),
        (
            pl.concat([long(a=[1.0]), long(a=[2.0])]),
            [],
            "a",
            "sample 's0', method 'a', metric 'l2' comes more than once",
        ),
        (long(a=[0.5]), ["l2"], "a", "neither 0 nor 1"),
        (long(a=[1.0]), ["success"], "a", "share 'success'"),
        (long(a=[1.0]), [], "ours", "reference 'ours'"),
        (long(a=[1.0]).with_columns(value=pl.lit("1")), [], "a", "String"),
        (long(a=[1.0]).with_columns(sample=pl.lit(None, pl.String)), [], "a", "lacks its sample"),
    ],
)
def test_scores_that_make_no_sense_are_refused(frame, shares, reference, word):
    with pytest.raises(Refusal, match=word):
        table.comparisons(frame, reference, shares)
