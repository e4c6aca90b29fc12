"""What the questions to one store share: the store, the attention that is read, and what was found on the way.

Each is computed once, when it is first asked for.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import polars as pl

import store
from analysis import attention, concentration, heads, layers
from analysis.attention import Written
from analysis.blocks import SOURCE
from analysis.census import NONE, Census, Votes, census, votes
from analysis.config import Attended
from analysis.heads import Decisive
from analysis.tagging import tagged
from store.errors import Refusal


class Study:
    """A store and the attention of its proxies, as the settings choose them.

    Raises
    ------
    Refusal
        When the store holds no attention of a proxy, or no samples of the splits.
    """

    def __init__(self, config: Attended):
        self.config = config
        self.opened = store.open(config.store)
        self.chosen = attention.choose(self.opened, config.attention)
        self._censuses: dict[str, Census] = {}

    @cached_property
    def parts_s(self) -> np.ndarray:
        """Which split each sample is of: 0 the choosing one, 1 the reporting one, −1 neither; int8 [s]."""
        if "split" not in self.opened.samples.columns:
            raise Refusal(
                f"the samples of {self.opened.place} have no column split: T is chosen on one, told of another"
            )
        splits = self.opened.samples["split"]
        for option in ("choose", "report"):
            wanted = getattr(self.config, option)
            if not (splits == wanted).any():
                there = ", ".join(sorted(splits.drop_nulls().unique()))
                raise Refusal(f"--{option} {wanted}: {self.opened.place} has no such split; it has {there}")
        return np.select([splits == self.config.choose, splits == self.config.report], [0, 1], -1).astype(np.int8)

    def census(self, one: Written) -> Census:
        """What one pass over a proxy's attention mass tells."""
        if one.name not in self._censuses:
            mass = attention.mass(self.opened, one.name)
            found = census(mass, self.parts_s, dask=self.config.dask, progress=True)
            there, should = int((found.favourite_sh[:, 0] != NONE).sum()), mass.attrs.get("samples", 0)
            if there < should:
                raise Refusal(
                    f"derived/{one.name} of {self.opened.place} has the attention of {there} samples and was written "
                    f"for {should}: `python -m store verify` tells what is lost"
                )
            self._censuses[one.name] = found
        return self._censuses[one.name]

    def decisive(self, one: Written) -> Decisive:
        """The decisive heads of a proxy, each by its own T unless one is given; only the main proxy must have some."""
        return heads.find(self.census(one), self.config.threshold, needed=one == self.chosen.main)

    def deciding(self, proxies: Sequence[Written]) -> list[Written]:
        """Those of the proxies that have decisive heads."""
        return [one for one in proxies if self.decisive(one).decisive_h.any()]

    def votes(self, one: Written) -> Votes:
        """The votes of a proxy's decisive heads."""
        return votes(self.census(one), self.decisive(one).decisive_h)

    @cached_property
    def voted(self) -> pl.DataFrame:
        """The main proxy's vote on every sample, see ``layers.frame``."""
        main = self.chosen.main
        decisive = int(self.decisive(main).decisive_h.sum())
        return layers.frame(
            self.census(main), self.votes(main), self.opened.samples["sample_id"], self.parts_s, decisive
        )

    @cached_property
    def reported(self) -> np.ndarray:
        """Samples of the reporting split that have attention: int64 [n]."""
        there = (self.parts_s == 1) & (self.votes(self.chosen.main).l_star_s >= 0)
        if not there.any():
            raise Refusal(f"--report {self.config.report}: none of its samples has attention; attend to them first")
        return np.flatnonzero(there)

    @cached_property
    def tokens(self) -> pl.DataFrame:
        """The reported samples' tokens that the main proxy read, with ``word`` and ``tag``."""
        return self.tokens_of(self.reported)

    @cached_property
    def words(self) -> pl.DataFrame:
        """Those of ``tokens`` that are the instruction's."""
        return self.tokens.filter(pl.col("kind") == "instruction")

    @cached_property
    def shares_nt(self) -> np.ndarray:
        """What share of their layer's mass goes to each token of the reported samples: float32 (n, t)."""
        return self.shares_of(self.reported, self.votes(self.chosen.main).l_star_s)

    def tokens_of(self, samples: np.ndarray) -> pl.DataFrame:
        """The same table of any samples with attention."""
        table = attention.token_table(self.opened, self.chosen.main, samples)
        return tagged(table, self.opened.samples["instruction"])

    def shares_of(self, samples: np.ndarray, layer_s: np.ndarray) -> np.ndarray:
        """The same shares of any samples, at a layer of each by its place among the proxy's layers.

        Raises
        ------
        Refusal
            When only the attention summed over tokens was kept.
        """
        main = self.chosen.main
        if not main.by_token:
            raise Refusal(
                f"derived/{main.name} is summed over tokens: run `python -m probes attend` with --keep tokens for it"
            )
        asked_s = np.full(len(layer_s), -1)
        asked_s[samples] = layer_s[samples]
        array = self.opened.derived[main.name].assign_attrs({SOURCE: f"derived/{main.name} of {self.opened.place}"})
        decisive_h = self.decisive(main).decisive_h
        return concentration.shares(array, decisive_h, asked_s, dask=self.config.dask)[samples]

    def top(self, count: int) -> pl.DataFrame:
        """The instruction's most read tokens at l* of each reported sample, see ``concentration.top``."""
        spoken_nt = concentration.among(self.shares_nt, self.reported, self.words)
        return concentration.top(spoken_nt, self.reported, self.words, min(count, spoken_nt.shape[1]))

    def ranked_tokens(self, everyone: bool) -> pl.DataFrame:
        """All prompt tokens of the reported samples, or of every sample with attention, most read at l* first.

        Image tokens are not among them: their slots are those of another array.
        """
        l_star_s = self.votes(self.chosen.main).l_star_s
        samples = np.flatnonzero(l_star_s >= 0) if everyone else self.reported
        share_nt = self.shares_of(samples, l_star_s) if everyone else self.shares_nt
        tokens = self.tokens_of(samples) if everyone else self.tokens
        prompt = tokens.filter(pl.col("kind") != "image")
        return concentration.top(concentration.among(share_nt, samples, prompt), samples, prompt, share_nt.shape[1])

    def voted_by(self, proxies: Sequence[Written]) -> pl.DataFrame:
        """The votes of several proxies on every sample: ``sample``, ``seed``, ``l_star``."""
        samples = np.arange(len(self.parts_s))
        parts = []
        for one in proxies:
            names = np.array([*self.census(one).layers, None], object)[self.votes(one).l_star_s]
            l_star = pl.Series("l_star", names.tolist(), dtype=pl.String)
            parts.append(pl.DataFrame({"sample": samples, "seed": one.seed}).with_columns(l_star))
        return pl.concat(parts)
