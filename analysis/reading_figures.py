"""Figures on a proxy's attention: ranked mass, its decomposition, the vote on l*, and the words that are read."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.census import Census
from analysis.heads import Decisive
from probes.verdict import named

WORDS = 12
"""Words that are shown."""
HATCHES = {
    "position": "",
    "noun": "////",
    "adjective": "....",
    "verb": "xxxx",
    "function": "----",
    "template": "++++",
    "image": "oo",
}
"""Parts of speech by hatch, so that they are told apart in grey."""


def ranked_mass(
    ranked: pl.DataFrame, permuted: Sequence[pl.DataFrame], found: Decisive, tokens: pl.DataFrame | None
) -> Figure:
    """Mass by rank of layer for every head, and by rank of token within l*."""
    with style.styled():
        figure = Figure(figsize=(10.5, 4.4))
        figure.subplots_adjust(left=0.075, right=0.97, top=0.8, bottom=0.13, wspace=0.4)
        left, right = figure.subplots(1, 2) if tokens is not None else (figure.subplots(), None)
        ranks = int(ranked["rank"].max())
        ends = [(1 / ranks, "even spread", style.QUIET)]
        for (_, is_decisive), part in ranked.sort("decisive").group_by("head", "decisive", maintain_order=True):
            look = {"color": style.ACCENT, "lw": 1.8, "marker": "o", "ms": 3.5, "zorder": 3} if is_decisive else None
            left.plot(part["rank"], part["mass"], **(look or {"color": style.QUIET, "lw": 0.6, "alpha": 0.7}))
        if permuted:
            mean = pl.concat(permuted).group_by("rank").agg(pl.col("mass").mean()).sort("rank")
            left.plot(mean["rank"], mean["mass"], color=style.INK, lw=1.4, ls=(0, (5, 2)), zorder=2)
            ends.append((float(mean["mass"][-1]), "permuted labels", style.INK))
        left.axhline(1 / ranks, color=style.QUIET, lw=0.8, ls=":")
        _ranks(left, ranks, "rank of the layer within an image", "attention mass")
        style.label_ends(left, ranks + 0.3, sorted(ends, key=lambda end: end[0]), size=7.5)
        n_decisive, n = int(found.decisive_h.sum()), int(ranked["n"][0])
        left.set_title(f"Layers: {n_decisive} decisive heads of {len(found.decisive_h)} (strong)")
        drop = found.drop_ph[1, found.decisive_h].mean()
        headline = f"Decisive heads give their first layer {drop:.2f} more mass than their second"
        figure.suptitle(headline, x=0.075, ha="left", fontsize=13, fontweight="bold")
        note = f"Mean over {n:,} images that did not choose T = {found.threshold:.3f}."
        figure.text(0.075, 0.9, note, color=style.QUIET)
        if tokens is not None:
            right.plot(tokens["rank"], tokens["share"], color=style.ACCENT, lw=1.8, marker="o", ms=3.5)
            right.fill_between(tokens["rank"], tokens["low"], tokens["high"], color=style.ACCENT, alpha=0.25, lw=0)
            right.plot(tokens["rank"], tokens["even"], color=style.QUIET, lw=0.8, ls=":")
            _ranks(
                right, int(tokens["rank"].max()), "rank of the token within an image's l*", "share of the layer's mass"
            )
            right.set_title(f"Tokens: the first has {tokens['share'][0]:.0%}")
        return figure


def _ranks(axes: Axes, ranks: int, x: str, y: str) -> None:
    axes.set_xlim(0.7, ranks + 0.3)
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def decomposition(
    by_layer: pl.DataFrame, cells: pl.DataFrame, order: Sequence[str], found: Decisive, census: Census
) -> Figure:
    """Mass by layer with its twins of permuted labels, and each head's part in it."""
    names, n_heads = census.layers, len(order)
    with style.styled():
        figure = Figure(figsize=(11, max(4.6, 1.9 + 0.13 * n_heads)))
        figure.subplots_adjust(left=0.065, right=0.95, top=0.83, bottom=0.13, wspace=0.18)
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        true = by_layer.filter(labels="true")
        places = np.arange(len(names))
        reach = [true["mass"] - true["low"], true["high"] - true["mass"]]
        left.bar(places, true["mass"], yerr=reach, color=list(style.layer_colours(names).values()), ecolor=style.INK)
        permuted = by_layer.filter(labels="permuted")
        if permuted.height:
            reach = [permuted["mass"] - permuted["low"], permuted["high"] - permuted["mass"]]
            look = {"fmt": "x", "color": style.INK, "ecolor": style.QUIET, "ms": 5, "elinewidth": 0.8}
            left.errorbar(places, permuted["mass"], yerr=reach, label="taught permuted labels", **look)
            left.legend(loc="upper left", fontsize=8)
        left.axhline(true["even"][0], color=style.QUIET, lw=0.8, ls=":")
        _layer_ticks(left, names)
        left.set_ylabel("attention mass")
        left.set_ylim(0, max(by_layer["high"].max(), by_layer["mass"].max()) * 1.18)
        left.set_title(f"All heads, {_seeds(true)}; dotted: even spread")
        grid = cells.pivot(on="layer", index="head", values="mass").select("head", *names)
        grid = pl.DataFrame({"head": order}).join(grid, on="head", how="left", maintain_order="left")
        image = right.imshow(
            grid.drop("head").to_numpy(), cmap="cividis", vmin=0, aspect="auto", interpolation="nearest"
        )
        _layer_ticks(right, names)
        decisive = {head for head, one in zip(census.heads, found.decisive_h, strict=True) if one}
        every = max(1, n_heads // 36)
        right.set_yticks(
            range(0, n_heads, every), [f"{h} •" if h in decisive else h for h in order[::every]], fontsize=6.5
        )
        right.set_ylabel("head (proxy layer . head)")
        right.set_title("Each head, largest drop first; • decisive")
        right.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=right, fraction=0.045, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("mean mass")
        best = true.sort("mass", descending=True).row(0, named=True)
        ratio = best["mass"] / best["even"]
        headline = (
            f"Most attention mass lies on {named(best['layer'])}: {best['mass']:.2f}, {ratio:.1f} times an even spread"
        )
        figure.suptitle(headline, x=0.065, ha="left", fontsize=13, fontweight="bold")
        figure.text(
            0.065, 0.9, f"{true['n'][0]:,} images; bars are 95 % intervals over seeds and images.", color=style.QUIET
        )
        return figure


def vote(by_seed: pl.DataFrame, entropy_n: np.ndarray, first: dict, n: int) -> Figure:
    """The vote by layer, other seeds and permuted twins beside it, and the entropy of an image's votes."""
    own = by_seed.filter("main")
    names = own["layer"].to_list()
    with style.styled():
        figure = Figure(figsize=(10.5, 4.2))
        figure.subplots_adjust(left=0.07, right=0.97, top=0.8, bottom=0.14, wspace=0.2)
        left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
        places = np.arange(len(names))
        reach = [(own["share"] - own["low"]).clip(0), (own["high"] - own["share"]).clip(0)]
        colours = list(style.layer_colours(names).values())
        left.bar(places, own["share"], yerr=reach, color=colours, ecolor=style.INK, width=0.62, zorder=2)
        others = {"other seeds": (by_seed.filter(~pl.col("main"), labels="true"), "o", "white", -0.12)}
        others["permuted labels"] = (by_seed.filter(labels="permuted"), "x", style.INK, 0.12)
        for label, (rows, marker, face, shift) in others.items():
            if rows.height:
                at = rows["layer"].replace_strict(dict(zip(names, places, strict=True)), return_dtype=pl.Float64)
                look = {"marker": marker, "s": 18, "linewidths": 0.9, "zorder": 3, "label": label}
                colour = {"facecolors": face, "edgecolors": style.INK} if marker == "o" else {"color": face}
                left.scatter(at + shift, rows["share"], **look, **colour)
        if left.get_legend_handles_labels()[1]:
            left.legend(fontsize=8, loc="upper center")
        left.axhline(own["even"][0], color=style.QUIET, lw=0.8, ls=":")
        _layer_ticks(left, names)
        left.set_ylim(0, 1.02)
        left.set_ylabel("share of images")
        left.set_title("l* of an image; dotted: an even vote")
        values, counts = np.unique(np.round(entropy_n, 2), return_counts=True)
        right.bar(values, counts / len(entropy_n), width=max(0.02, 0.03 * max(1, values.max())), color=style.QUIET)
        right.set_xlabel("entropy of an image's votes, bits")
        right.set_ylabel("share of images")
        right.set_title(f"Mean {np.mean(entropy_n):.2f} bits; 0: all heads agree")
        headline = f"Decisive heads vote for {named(first['layer'])} in {first['share']:.0%} of images"
        figure.suptitle(headline, x=0.07, ha="left", fontsize=13, fontweight="bold")
        seeds = own["seed"][0]
        figure.text(0.07, 0.9, f"{n:,} images, seed {seeds}; bars are 95 % intervals over images.", color=style.QUIET)
        return figure


def words(by_tag: pl.DataFrame, by_word: pl.DataFrame, n: int) -> Figure:
    """Mass by part of speech against an even spread, and the words most often read first."""
    with style.styled():
        figure = Figure(figsize=(11, 4.8))
        figure.subplots_adjust(left=0.085, right=0.97, top=0.8, bottom=0.12, wspace=0.34)
        whole, spoken, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
        for axes, among, title in (
            (whole, "all tokens", "All tokens"),
            (spoken, "instruction", "Words of the instruction"),
        ):
            rows = by_tag.filter(among=among).sort("share")
            axes.set_title(title if rows.height else f"{title}: none is read")
            if rows.is_empty():
                axes.set_axis_off()
                continue
            places = np.arange(rows.height)
            reach = [rows["share"] - rows["share_low"], rows["share_high"] - rows["share"]]
            hatches = [HATCHES[tag] for tag in rows["tag"]]
            look = {"color": "#dbe4ee", "edgecolor": style.INK, "linewidth": 0.7, "ecolor": style.INK, "height": 0.62}
            axes.barh(places, rows["share"], xerr=reach, hatch=hatches, **look)
            axes.vlines(rows["even"], places - 0.42, places + 0.42, color=style.ACCENT, lw=2, zorder=3)
            axes.set_yticks(places, rows["tag"])
            axes.set_xlim(0, max(rows["share_high"].max(), rows["even"].max()) * 1.08)
            axes.set_xlabel("share of the mass at l*")
        rows = by_word.filter(among="instruction").sort("first", descending=True).head(WORDS).reverse()
        places = np.arange(rows.height)
        hatches = [HATCHES[tag] for tag in rows["tag"]]
        right.barh(places, rows["first"], hatch=hatches, color="#dbe4ee", edgecolor=style.INK, linewidth=0.7)
        for place, row in zip(places, rows.iter_rows(named=True), strict=True):
            right.annotate(f" {row['rate']:.0%} of {row['n']:,}", (row["first"], place), va="center", fontsize=7.5)
        right.set_yticks(places, [f"{row['word']}  ({row['tag']})" for row in rows.iter_rows(named=True)], fontsize=8)
        right.set_xlim(0, max(rows["first"].max() or 1, 1) * 1.3)
        right.set_xlabel("images in which it is the most read word")
        right.set_title("Most read words")
        best = by_tag.filter(among="all tokens").sort("excess", descending=True).row(0, named=True)
        headline = (
            f"Within l*, {best['tag']} tokens have {best['share']:.0%} of the mass; by number they would have "
            f"{best['even']:.0%}"
        )
        figure.suptitle(headline, x=0.085, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.085, 0.9, f"{n:,} images, decisive heads; the strong line is an even spread.", color=style.QUIET)
        return figure


def _layer_ticks(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(
        range(len(names)), names, rotation=90 if len(names) > 20 else 0, fontsize=7.5 if len(names) > 16 else 9
    )
    axes.set_xlabel("layer")


def _seeds(rows: pl.DataFrame) -> str:
    return f"mean of {rows['seeds'][0]} seeds" if rows["seeds"][0] > 1 else "one seed"
