"""A proxy's attention in a store as lazy xarray: ``a[sample, head, query, layer, token]``, and the mass of layers.

Tokens and samples say of themselves what the store's tables do, and ``.sel`` takes it: ``sel(kind="instruction",
word="leftmost")`` finds that word wherever it stands.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import xarray as xr

import store
from analysis.blocks import SOURCE
from analysis.labels import LabelIndex
from probes.verdict import named
from store.errors import Refusal
from store.reader import Store
from store.tokens import PUNCTUATION

TOKEN_LABELS = ("kind", "word", "text", "position", "slot", "row", "col")
"""What tokens say of themselves: ``word`` is the word of the instruction, without case and punctuation at its ends;
the others are columns of the token table."""
FEW = 50
"""A column of the samples table with more values than this, or one alone, is no label of a query."""


@dataclass(frozen=True)
class Written:
    """Attention that ``python -m probes attend`` wrote: whose it is."""

    name: str
    """Of the derived array."""
    probe: str
    """Name of the proxy."""
    layers: tuple[str, ...]
    tokens: str
    """Tokens that the proxy read: text, all, image or a kind of the token table."""
    labels: str
    """What it was taught: true, permuted or control."""
    seed: int
    by_token: bool
    """Whether every token's attention was kept, or its sum over tokens."""
    proxy: str
    """sha256 of the proxy's weights."""
    run: str
    """Folder of the run that trained it."""

    @property
    def called(self) -> str:
        """Its name for people."""
        words = "all tokens" if self.tokens == "all" else f"{self.tokens} tokens"
        return f"the proxy on {words} of {_blocks(self.layers)} (seed {self.seed})"


@dataclass(frozen=True)
class Chosen:
    """The attention that is analysed, and what stands beside it."""

    main: Written
    seeds: tuple[Written, ...]
    """Proxies of other seeds, alike in all else; ``main`` first."""
    permuted: tuple[Written, ...]
    """Their twins that were taught other samples' labels, by seed."""


def _blocks(layers: Sequence[str]) -> str:
    """Layers for people: blocks 0–11, or each by its name."""
    run = [str(int(layers[0]) + place) for place in range(len(layers))] if layers[0].isdigit() else []
    return (
        f"blocks {layers[0]}–{layers[-1]}" if len(layers) > 1 and list(layers) == run else ", ".join(map(named, layers))
    )


def written(opened: Store) -> list[Written]:
    """All attention of proxies in a store, by name."""
    found = []
    for name, array in sorted(opened.derived.items()):
        about, spec = array.attrs, array.attrs.get("spec")
        if "proxy" in about and isinstance(spec, Mapping) and {"head", "query", "layer"} < set(array.dims):
            layers = tuple(map(str, array["layer"].values))
            given = (name, spec["name"], layers, spec["tokens"], spec["labels"], about["seed"])
            found.append(Written(*given, "token" in array.dims, about["proxy"], about.get("run", "")))
    return found


def choose(opened: Store, name: str | None = None) -> Chosen:
    """The attention to analyse: the array ``name``, or that of the proxy of most layers, its tokens kept, first seed.

    Raises
    ------
    Refusal
        When the store holds no attention of a proxy, or none of that name.
    """
    found = written(opened)
    true = [one for one in found if one.labels == "true"]
    mend = f"`python -m probes attend --store {opened.place} --proxy FOLDER` writes a proxy's"
    if name is not None:
        main = next((one for one in found if one.name == name), None)
        if main is None:
            names = ", ".join(one.name for one in found) or "none"
            raise Refusal(f"--attention {name} is no proxy's attention in {opened.place}: it has {names}; {mend}")
    elif not true:
        raise Refusal(f"{opened.place} holds no proxy's attention: {mend}")
    else:
        main = min(true, key=lambda one: (-len(one.layers), not one.by_token, one.seed, one.name))

    def alike(labels: str) -> tuple[Written, ...]:
        same = [one for one in found if one.labels == labels and (one.layers, one.tokens) == (main.layers, main.tokens)]
        # A seed may be there twice, with its tokens and without.
        by_seed = {
            one.seed: one for one in sorted(same, key=lambda one: (one != main, not one.by_token, one.name))[::-1]
        }
        return tuple(by_seed[seed] for seed in sorted(by_seed))

    seeds = tuple(sorted(alike(main.labels), key=lambda one: (one.proxy != main.proxy, one.seed)))
    return Chosen(main, seeds, alike("permuted") if main.labels == "true" else ())


def mass(
    path: str | os.PathLike | Store, name: str | None = None, by: Literal["layer", "token"] = "layer"
) -> xr.DataArray:
    """Attention mass of a proxy, lazy float32 [ABP §5].

    Parameters
    ----------
    path
        A store, or where it lies.
    name
        The derived array; chosen as `choose` does if not given.
    by
        ``layer``: A[sample, head, query, layer], summed over tokens. ``token``: every token's own,
        a[sample, head, query, layer, token]; its sum over ``token`` is A.

    Returns
    -------
    DataArray
        ``sample`` brings the labels of the samples table (task, split …) and ``area``, the share of the picture that
        the true box covers; ``token`` brings ``kind``, ``word``, ``text``, ``position``, ``slot``, ``row``, ``col``.
        All of these, ``area`` apart, may be given to ``.sel``. Where tokens are selected, each found is one row along
        ``sample``. NaN for samples without states and past a sample's tokens.

    Raises
    ------
    Refusal
        When the store holds no such attention, or not that of tokens.

    Examples
    --------
    >>> mass("data/store.zarr").sel(split="test").mean(["sample", "query"])                       # doctest: +SKIP
    >>> mass("data/store.zarr", by="token").sel(kind="instruction", word="leftmost").mean("sample")  # doctest: +SKIP
    """
    if by not in ("layer", "token"):
        raise Refusal(f"by={by!r} is not known: give layer or token")
    opened = path if isinstance(path, Store) else store.open(path)
    one = choose(opened, name).main
    if by == "token" and not one.by_token:
        raise Refusal(
            f"derived/{one.name} of {opened.place} is summed over tokens: `python -m probes attend` with --keep tokens "
            "writes every token's"
        )
    array = opened.derived[one.name].astype(np.float32)
    if by == "layer" and one.by_token:
        # Samples without states stay NaN; tokens past the last are none.
        array = array.sum("token", min_count=1, keep_attrs=True)
    array = array.rename("mass").assign_coords(sample_labels(opened.samples))
    array.attrs[SOURCE] = f"derived/{one.name} of {opened.place}"
    if by == "token":
        array = array.assign_coords(token_labels(opened, one, array.sizes["token"]))
    labels = [name for name, value in array.coords.items() if value.dims[:1] == ("sample",)]
    labels = [name for name in labels if name not in ("sample", "area")]
    return array.set_xindex(labels, LabelIndex) if labels else array


def sample_labels(samples: pl.DataFrame) -> dict[str, tuple[str, np.ndarray]]:
    """Columns of the samples table that name few values, and ``area`` where boxes are, as coordinates."""
    kinds = (pl.String, pl.Int32, pl.Int64, pl.Boolean)
    few = [
        name
        for name, dtype in samples.schema.items()
        if dtype in kinds and (1 < samples[name].n_unique() <= FEW or name in ("task", "split"))
    ]
    labels = {name: ("sample", _values(samples[name])) for name in few}
    if {"x1", "y1", "x2", "y2", "width", "height"} <= set(samples.columns):
        area = samples.select(
            (pl.col("x2") - pl.col("x1")) * (pl.col("y2") - pl.col("y1")) / pl.col("width") / pl.col("height")
        )
        labels["area"] = ("sample", area.to_series().cast(pl.Float32).to_numpy())
    return labels


def token_labels(opened: Store, one: Written, longest: int) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
    """What each token along the array's axis says of itself, over (sample, token); None past the last."""
    table = token_table(opened, one)
    at = table["sample"].to_numpy(), table["token"].to_numpy()
    labels = {}
    for name in TOKEN_LABELS:
        values = np.full((opened.plan.n_samples, longest), None, object)
        values[at] = _values(table[name])
        labels[name] = (("sample", "token"), values)
    return labels


def token_table(opened: Store, one: Written, samples: Sequence[int] | None = None) -> pl.DataFrame:
    """The token table of the tokens that a proxy read: ``token`` is the place along its attention's axis.

    ``word`` is the word itself, ``word_index`` its place in the instruction.
    """
    choice = opened.batches(one.layers, one.tokens, 1, samples=samples).choice
    table = choice.tokens().with_columns(token=pl.int_range(pl.len(), dtype=pl.Int32).over("sample"))
    spoken = opened.samples.lazy().select(
        sample=pl.int_range(pl.len(), dtype=pl.Int64), spoken=pl.col("instruction").str.extract_all(r"\S+")
    )
    spoken = spoken.with_columns(word=pl.int_ranges(pl.col("spoken").list.len(), dtype=pl.Int32)).explode(
        "spoken", "word"
    )
    words = spoken.select("sample", "word", plain=pl.col("spoken").str.strip_chars(PUNCTUATION).str.to_lowercase())
    table = table.join(words, on=["sample", "word"], how="left", maintain_order="left")
    return table.rename({"word": "word_index", "plain": "word"}).collect()


def _values(column: pl.Series) -> np.ndarray:
    """A column as an object array, None where it is null: a label that is not there is no number."""
    out = np.empty(len(column), object)
    out[:] = column.to_list()
    return out
