"""What a proxy's attention says: mass by layer, decisive heads, the vote on l*, and the words it reads [ABP §5].

Each answer is a function of a ``Study`` and gives a ``Finding`` whose figures it has drawn.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from analysis import concentration, heads, layers, reading_figures, style
from analysis.attention import Written
from analysis.census import votes
from analysis.finding import Drawn, Finding
from analysis.study import Study
from probes.statistics import ends, hierarchical_draws, interval, means
from probes.verdict import named

HEAD_DRAWS = 20
"""Draws of random heads."""
TOP = 3
"""Tokens a sample that count as its most read ones."""


def mass_by_layer(study: Study, proxies: Sequence[Written]) -> pl.DataFrame:
    """Mean mass of each layer over heads, queries, samples and seeds, with the interval over seeds and images."""
    n = heads.tested(study.parts_s, study.census(proxies[0]).favourite_sh)
    per_seed = [study.census(one).summed_shl[n].mean(1).T / _queries(study, one) for one in proxies]
    values_lsn = np.stack(per_seed, axis=1)
    low_l, high_l = ends(hierarchical_draws(values_lsn))
    names = study.census(proxies[0]).layers
    return pl.DataFrame(
        {
            "layer": names,
            "mass": means(values_lsn),
            "low": low_l.astype(float),
            "high": high_l.astype(float),
            "even": 1 / len(names),
            "n": len(n),
            "seeds": len(proxies),
        }
    )


def _queries(study: Study, one: Written) -> int:
    return study.census(one).layered_phql.shape[2]


def mass(study: Study) -> Finding:
    """How attention mass is spread over the layers, and each head's part in it."""
    chosen, out = study.chosen, study.config.out
    true = mass_by_layer(study, chosen.seeds).with_columns(labels=pl.lit("true"))
    permuted = (
        [mass_by_layer(study, chosen.permuted).with_columns(labels=pl.lit("permuted"))] if chosen.permuted else []
    )
    by_layer = pl.concat([true, *permuted])
    census = study.census(chosen.main)
    cells = heads.layer_map(census, heads.tested(study.parts_s, census.favourite_sh))
    order = heads.table(census, study.decisive(chosen.main), study.reported[:1])["head"].to_list()
    figure = reading_figures.decomposition(by_layer, cells, order, study.decisive(chosen.main), census)
    drawn = Drawn(
        "figure-3-decomposition",
        f"Left: attention mass by layer, mean over heads, queries, {true['n'][0]:,} images and {true['seeds'][0]} "
        "seeds; bars are 95 % intervals over seeds and images, dotted the even spread. Right: the mass of each head "
        "(rows, largest drop first; a dot marks decisive heads) on each layer.",
    )
    style.save(figure, out, drawn.name, pl.concat([by_layer, cells], how="diagonal_relaxed"), _making(study))
    best = true.sort("mass", descending=True).row(0, named=True)
    answer = (
        f"Most goes to {named(best['layer'])}: {_share(best, 'mass')} of all mass, {best['mass'] / best['even']:.1f} "
        f"times an even spread ({best['even']:.3f}; n = {best['n']:,}, {_count(best['seeds'], 'seed')})."
    )
    if permuted:
        top = permuted[0].sort("mass", descending=True).row(0, named=True)
        same = permuted[0].filter(pl.col("layer") == best["layer"]).row(0, named=True)
        answer += (
            f" Proxies taught other samples' boxes give it {_share(same, 'mass')}; their largest is "
            f"{named(top['layer'])} with {_share(top, 'mass')}."
        )
    above = cells.filter(pl.col("q") < 0.05, pl.col("mass") > pl.col("even"))
    answer += (
        f" Of {cells.height} (head, layer) cells of {chosen.main.called}, {above.height} are above an even spread at a "
        "false-discovery rate of 5 %."
    )
    return Finding(
        "mass",
        "How is the proxy's attention spread over the layers?",
        answer,
        (drawn,),
        {"layers": by_layer, "cells": cells},
    )


def decisive(study: Study) -> Finding:
    """Which heads are decisive, on images that did not choose T."""
    chosen, main = study.chosen, study.chosen.main
    census, found = study.census(main), study.decisive(main)
    samples = heads.tested(study.parts_s, census.favourite_sh)
    table = heads.table(census, found, samples)
    twins = pl.DataFrame([_twin(study, one) for one in (*chosen.seeds, *chosen.permuted)])
    ranked = heads.ranked_rows(census, found)
    permuted = [heads.ranked_rows(study.census(one), study.decisive(one)) for one in chosen.permuted]
    tokens = concentration.ranked(study.shares_nt) if main.by_token else None
    figure = reading_figures.ranked_mass(ranked, permuted, found, tokens)
    drawn = Drawn(
        "figure-2-ranked-mass",
        "Left: attention mass by rank of layer, sorted within each image, so that rank takes the place of layer; a "
        f"line a head, decisive ones strong, mean of queries and {int(census.count_p[1]):,} images; dashed the mean "
        "head of proxies taught permuted labels, dotted the even spread. Right: the same for tokens within each "
        "image's l*, decisive heads, with its 95 % interval.",
    )
    data = [ranked, *([tokens.rename({"share": "mass"})] if tokens is not None else [])]
    style.save(figure, study.config.out, drawn.name, pl.concat(data, how="diagonal_relaxed"), _making(study))
    of = census.drop_sh[samples][:, found.decisive_h].mean(1)
    others = census.drop_sh[samples][:, ~found.decisive_h]
    how = "given" if found.given else f"chosen on {int(census.count_p[0]):,} images of {study.config.choose}"
    count = int(found.decisive_h.sum())
    answer = (
        f"{count} of {len(census.heads)} heads of {main.called} {'is' if count == 1 else 'are'} decisive (T = "
        f"{found.threshold:.3f}, {how}): {', '.join(table.filter(pl.col('decisive'))['head'])}. On {len(samples):,} "
        f"images of {study.config.report} the first layer has {_interval(of)} more mass than the second there"
    )
    if others.size:
        answer += f", in the other heads {_interval(others.mean(1))}"
    answer += f"; above T on these images, too: {int(found.stable_h.sum())}."
    answer += " [ABP] sees a drop of about 0.6; an even spread has none."
    if chosen.permuted:
        floor, own = (twins.filter(labels=labels) for labels in ("permuted", main.labels))
        answer += (
            f" Above the same T, twins taught permuted labels have {floor['above_main'].mean():.1f} heads on average "
            f"({_count(floor.height, 'seed')}), proxies of true labels {own['above_main'].mean():.1f} "
            f"({_count(own.height, 'seed')})."
        )
    return Finding(
        "heads",
        "Which heads of the proxy read one layer?",
        answer,
        (drawn,),
        {"heads": table, "seeds": twins, "ranks": ranked},
        ("A head that reads one layer says where this proxy looks, not that no other layer would do.",),
    )


def _twin(study: Study, one: Written) -> dict[str, object]:
    census, found = study.census(one), study.decisive(one)
    threshold = study.decisive(study.chosen.main).threshold
    return {
        "proxy": one.probe,
        "seed": one.seed,
        "labels": one.labels,
        "threshold": found.threshold,
        "decisive": int(found.decisive_h.sum()),
        "largest_drop": float(found.drop_ph[1].max()),
        "above_main": int((found.drop_ph[1] > threshold).sum()),
        "n": int(census.count_p[1]),
    }


def vote(study: Study) -> Finding:
    """l* of every sample: where it lies, how firm it is, and whether seeds agree."""
    chosen, main, n = study.chosen, study.chosen.main, study.reported
    names = study.census(main).layers
    groups = {"true": study.deciding(chosen.seeds), "permuted": study.deciding(chosen.permuted)}
    rows = []
    for labels, proxies in groups.items():
        for one in proxies:
            found = study.votes(one)
            about = {"labels": labels, "seed": one.seed, "tied": float(found.tied_s[n].mean())}
            about |= {"entropy": float(np.nanmean(found.entropy_s[n])), "main": one == main}
            told = {key: pl.lit(value) for key, value in about.items()}
            rows.append(layers.shares(found.l_star_s[n], names).with_columns(**told))
    by_seed = pl.concat(rows)
    agreement = pl.DataFrame(
        [_agreement(study, labels, proxies) for labels, proxies in groups.items() if len(proxies) > 1],
        schema={"labels": pl.String, "seeds": pl.Int64, "kappa": pl.Float64, "low": pl.Float64, "high": pl.Float64}
        | {"same": pl.Float64, "n": pl.Int64},
    )
    own = by_seed.filter("main")
    first = own.sort("share", descending=True).row(0, named=True)
    tied, entropy = (
        interval(getattr(study.votes(main), name)[n].astype(np.float32)) for name in ("tied_s", "entropy_s")
    )
    figure = reading_figures.vote(by_seed, study.votes(main).entropy_s[n], first, len(n))
    drawn = Drawn(
        "figure-6-votes",
        f"Left: share of {len(n):,} images whose decisive heads vote for each layer, with 95 % intervals over images; "
        "rings are other seeds, crosses proxies taught permuted labels, dotted the even spread. Right: the entropy of "
        "an image's votes, 0 where all decisive heads agree.",
    )
    style.save(figure, study.config.out, drawn.name, by_seed, _making(study))
    answer = (
        f"{named(first['layer']).capitalize()} in {_share(first, 'share')} of {len(n):,} images ({main.called}; an "
        f"even vote would give {first['even']:.3f}). {_share_of(tied)} of the votes are ties, broken by total mass; "
        f"their mean entropy is {_triple(entropy)} bits."
    )
    at_random = random_heads(study, names.index(first["layer"]))
    if len(at_random):
        answer += (
            f" As many heads drawn from the others name that layer in {at_random['share'].mean():.1%} of images "
            f"({_least_most(at_random['share'])} in {len(at_random)} draws) and agree with l* on "
            f"{at_random['agreed'].mean():.1%}."
        )
    for row in agreement.iter_rows(named=True):
        whose = "seeds" if row["labels"] == "true" else "twins taught permuted labels"
        beyond = (
            "always one and the same, so that there is no κ"
            if np.isnan(row["kappa"])
            else f"κ = {_triple((row['kappa'], row['low'], row['high']))}"
        )
        answer += f" Two {whose} name the same layer for {row['same']:.0%} of images, {beyond}."
    if (agreement.filter(labels="true")["low"].fill_nan(None) < 0.2).any():
        answer += (
            " So the layer is one of the proxy, hardly one of the image: beyond their favourites, seeds agree little."
        )
    samples = study.voted.filter(pl.col("part") == "report").drop("part")
    return Finding(
        "layers", "Which layer do its decisive heads vote for?", answer, (drawn,),
        {"votes": by_seed, "agreement": agreement, "random_heads": at_random, "samples": samples},
        ("Ties are many where decisive heads are few.",),
    )  # fmt: skip


def random_heads(study: Study, layer: int) -> pl.DataFrame:
    """The null of the vote: heads that are not decisive, as many as are, drawn again and again; a row a draw.

    ``share`` of the reported images that they vote for ``layer`` in, and of those where they ``agreed`` with l*. No
    rows where every head is decisive.
    """
    census, decisive_h = study.census(study.chosen.main), study.decisive(study.chosen.main).decisive_h
    own_n = study.votes(study.chosen.main).l_star_s[study.reported]
    others = np.flatnonzero(~decisive_h)
    generator = np.random.default_rng([study.config.seed, 11])
    rows = []
    for _ in range(HEAD_DRAWS if len(others) else 0):
        drawn_h = np.zeros(len(decisive_h), bool)
        drawn_h[generator.choice(others, min(len(others), int(decisive_h.sum())), replace=False)] = True
        said_n = votes(census, drawn_h).l_star_s[study.reported]
        rows.append({"share": float((said_n == layer).mean()), "agreed": float((said_n == own_n).mean())})
    return pl.DataFrame(rows, schema={"share": pl.Float64, "agreed": pl.Float64})


def _least_most(values: pl.Series) -> str:
    return f"{values.min():.1%} to {values.max():.1%}"


def _agreement(study: Study, labels: str, proxies: Sequence[Written]) -> dict[str, object]:
    codes_kn = np.stack([study.votes(one).l_star_s[study.reported] for one in proxies])
    whole, low, high = layers.kappa(codes_kn, len(study.census(proxies[0]).layers))
    pairs = np.triu_indices(len(codes_kn), 1)
    same = float((codes_kn[pairs[0]] == codes_kn[pairs[1]]).mean())
    return {
        "labels": labels,
        "seeds": len(proxies),
        "kappa": whole,
        "low": low,
        "high": high,
        "same": same,
        "n": codes_kn.shape[1],
    }


def words(study: Study) -> Finding:
    """Which tokens and words the decisive heads read within l*."""
    n, main = study.reported, study.chosen.main
    share_nt, spoken = study.shares_nt, study.words
    ranked = concentration.ranked(share_nt)
    groups = {"all tokens": (share_nt, n, study.tokens)}
    spoken_nt = concentration.among(share_nt, n, spoken)
    known = ~np.isnan(spoken_nt).all(1)
    if known.any():  # a proxy may read no words, or words may have no mass
        groups["instruction"] = (spoken_nt[known], n[known], spoken)
    tags, named_words = [], []
    for among, (share, samples, table) in groups.items():
        tags.append(concentration.by_tag(share, samples, table).with_columns(among=pl.lit(among)))
        first = concentration.top(share, samples, table, 1)
        named_words.append(concentration.words(first, table).with_columns(among=pl.lit(among)))
    by_tag, by_word = pl.concat(tags), pl.concat(named_words)
    figure = reading_figures.words(by_tag, by_word, len(n))
    drawn = Drawn(
        "figure-5-words",
        f"Within each image's l*, decisive heads, {len(n):,} images. Left: share of the mass that goes to the tokens "
        "of each part of speech, all tokens and the instruction's alone, with 95 % intervals over images; the line is "
        "what an even spread would give. Right: the instruction's words that are most often the most read one, and in "
        "how many of the images that have the word.",
    )
    style.save(
        figure, study.config.out, drawn.name, pl.concat([by_tag, by_word], how="diagonal_relaxed"), _making(study)
    )
    first, second = ranked.row(0, named=True), ranked.row(1, named=True) if ranked.height > 1 else None
    best = by_word.filter(among="all tokens").row(0, named=True)
    answer = (
        f"Within l* the most read token has {_share(first, 'share')} of the mass"
        + (f", the second {second['share']:.3f}" if second else "")
        + f" (even: {first['even']:.3f}; n = {first['n']:,}). Most often it is “{best['word']}” ({best['tag']}; first "
        f"in {best['first']:,} of {best['n']:,} images)."
    )
    whole = by_tag.filter(among="all tokens")
    template = whole.filter(tag="template")
    if template.height and template["share"][0] > 0.5:
        answer += (
            f" So the place is read not from words but from the template around them: {template['share'][0]:.1%} of "
            f"the mass, against {template['even'][0]:.1%} by their number."
        )
    among = by_tag.filter(among="instruction").sort("excess", descending=True)
    told = [
        f"{row['tag']} {row['share']:.3f} (even {row['even']:.3f}, excess "
        f"{_triple((row['excess'], row['excess_low'], row['excess_high']))})"
        for row in among.iter_rows(named=True)
        if row["tag"] in ("noun", "adjective", "position")
    ]
    if told:
        answer += f" Among the instruction's tokens alone: {'; '.join(told)}."
    caveats = (
        "Parts of speech are told by a tagger, positions by a closed list of words (analysis/tagging.py).",
        "Tokens late in the prompt have seen all that is before them: a token that is read need not be what it says.",
        "This is one proxy: where words have little of the mass, another training may read other words.",
    )
    tables = {"tags": by_tag, "words": by_word, "ranks": ranked}
    if known.any():
        tables["top"] = study.top(TOP).with_columns(called=pl.lit(main.called))
    return Finding("words", "Which tokens and words are read there?", answer, (drawn,), tables, caveats)


def _making(study: Study) -> dict[str, object]:
    """What a figure's file says of its making."""
    main = study.chosen.main
    return {"store": str(study.opened.place), "attention": main.name, "proxy": main.proxy, "seed": study.config.seed}


def _share(row: dict, name: str) -> str:
    return f"{row[name]:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _share_of(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.1%} [{found[1]:.1%}, {found[2]:.1%}]"


def _triple(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"


def _interval(values_n: np.ndarray) -> str:
    return _triple(interval(values_n.astype(np.float32)))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number != 1 else ''}"
