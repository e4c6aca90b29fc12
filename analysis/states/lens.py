"""Logit lens: which word each layer's state would say next, by the decoder's own norm and head [nostalgebraist 2020].

Of the checkpoint only these two tensors (and its tokenizer) are read; their files must be the store's, by their hashes.

Shape suffixes: ``n`` token, ``l`` layer, ``w`` width, ``v`` vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from analysis.states.norms import measured
from store.errors import Refusal

LOGIT_BYTES = 256 * 2**20
"""Logits that are held at once, float32."""
HEAD_ROWS = 16384
"""Rows of the head that are turned into float32 at once."""

WANTED = re.compile(r"(?:model\.|language_model\.)*(norm|lm_head|embed_tokens)\.weight")
"""Names of the decoder's final norm, head and embeddings in checkpoints of all families, old and new."""

FINAL = "final"
"""The layer that has had the norm already."""
METRICS = ("log_p", "top1", "rank_inverse", "entropy", "agreement")


@dataclass(frozen=True)
class Head:
    """The last steps of a model: its final norm and its head."""

    norm: nn.Module
    weight_vw: Tensor
    tokenizer: Tokenizer

    @classmethod
    def of(cls, identity: Mapping[str, Any], checkpoint: str | None = None) -> Self:
        """Read norm and head of the checkpoint that a store's states came from.

        Parameters
        ----------
        identity
            A store's ``identity``.
        checkpoint
            A folder or hub id; where the identity says, if not given.

        Raises
        ------
        Refusal
            The store's weights are of no checkpoint, or it is not found, or is another one.
        """
        weights = dict(identity.get("weights", {}))
        if not any(name.endswith(".safetensors") for name in weights):
            raise Refusal("the logit lens needs the model's head, and this store names no checkpoint: add --no-lens")
        folder = _find(identity, checkpoint)
        held = _tensors(folder, weights)
        head_key = "embed_tokens" if "lm_head" not in held else "lm_head"
        if "norm" not in held or head_key not in held:
            raise Refusal(f"{folder} has no tensors of a final norm and a head: it has {', '.join(sorted(held))}")
        norm = _norm(folder)
        norm.to_empty(device="cpu").to(held["norm"].dtype).load_state_dict({"weight": held["norm"]})
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(norm.to(device).eval(), held[head_key].to(device), tokenizer)

    @property
    def vocabulary(self) -> int:
        """Tokens that can be said."""
        return len(self.weight_vw)

    @torch.no_grad()
    def logits(self, states_nw: Tensor, normed: bool) -> Tensor:
        """Logits (n, v), float32, of states as stored; ``normed`` ones (layer ``final``) only pass the head."""
        states_nw = states_nw.to(self.weight_vw.device)
        states_nw = (states_nw if normed else self.norm(states_nw.to(self.weight_vw.dtype))).float()
        # Products of bfloat16 in float32: sums of 3,584 of them in bfloat16 would lose what ranks tell apart.
        return torch.cat([states_nw @ rows.float().T for rows in self.weight_vw.split(HEAD_ROWS)], 1)

    def say(self, token: int) -> str:
        """A token as text."""
        return self.tokenizer.decode([token], skip_special_tokens=False)


def _find(identity: Mapping[str, Any], checkpoint: str | None) -> Path:
    from extract.config import POCKET
    from extract.model import find_checkpoint

    named = identity["model"] if checkpoint is None else checkpoint
    mend = "give --checkpoint /path/to/its/folder (or its/hub-id), or --no-lens"
    # A bare name was a folder's: the hub might know something else by it.
    if checkpoint is None and named != POCKET and "/" not in named and not Path(named).is_dir():
        raise Refusal(f"the store's model was a folder named {named!r}, and there is none of that name here: {mend}")
    try:
        return find_checkpoint(named, identity.get("revision") if checkpoint is None else None)
    except Refusal as refusal:
        raise Refusal(f"the store's model is not found: {refusal}; {mend}") from refusal


def _tensors(folder: Path, hashes: Mapping[str, str]) -> dict[str, Tensor]:
    """Norm and head (the embeddings where there is no head) by their short names, of files with the right hashes."""
    from extract.model import file_hash

    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= {found[1]: (path, key) for key in file.keys() if (found := WANTED.fullmatch(key))}  # noqa: SIM118
    if "lm_head" in places:
        places.pop("embed_tokens", None)
    for path in sorted({folder / "config.json", *(path for path, _ in places.values())}):
        if file_hash(path) != hashes.get(path.name):
            raise Refusal(
                f"{folder} is not the model of the store: {path.name} is {file_hash(path)[:12]}… here and "
                f"{hashes.get(path.name, 'absent')[:12]}… there; give --checkpoint the one that it was made with"
            )
    held = {}
    for name, (path, key) in places.items():
        with safe_open(path, "pt") as file:
            held[name] = file.get_tensor(key)
    return held


def _norm(folder: Path) -> nn.Module:
    """The final norm as transformers' class has it, without values: the model is made where nothing takes memory."""
    from transformers import AutoConfig

    from extract.families import family_of

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return family_of(config).model_class._from_config(config).base_model.language_model.norm


class Lens:
    """What every layer would say at every instruction token: arrays (l, n), filled in pieces.

    Parameters
    ----------
    head
        Norm and head.
    layers
        All layers, in the order of the pass.
    next_n
        The token that does come next, -1 where none of the instruction does.
    """

    def __init__(self, head: Head, layers: Sequence[str], next_n: np.ndarray):
        self.head, self.layers, self.next_n = head, tuple(layers), next_n
        shape = (len(layers), len(next_n))
        self.log_p, self.entropy, self.top_p = (np.full(shape, np.nan, np.float32) for _ in range(3))
        self.rank, self.top = np.full(shape, np.nan, np.float32), np.full(shape, -1, np.int64)

    def add(self, layer: str, states_nw: Tensor, tokens: slice) -> None:
        """Ask one layer's states (as stored) of some tokens."""
        place, piece = self.layers.index(layer), max(1, LOGIT_BYTES // (4 * self.head.vocabulary))
        for start in range(0, len(states_nw), piece):
            own = slice(tokens.start + start, tokens.start + min(start + piece, len(states_nw)))
            logits_nv = self.head.logits(states_nw[start : start + piece], layer == FINAL)
            logs_nv = logits_nv.log_softmax(1)
            next_n1 = torch.from_numpy(self.next_n[own]).to(logs_nv.device)[:, None]
            known_n = (next_n1[:, 0] >= 0).cpu().numpy()
            true_n1 = logs_nv.gather(1, next_n1.clamp(min=0))
            self.log_p[place, own] = np.where(known_n, true_n1[:, 0].cpu(), np.nan)
            self.rank[place, own] = np.where(known_n, 1 + (logs_nv > true_n1).sum(1).cpu(), np.nan)
            self.entropy[place, own] = -torch.linalg.vecdot(logs_nv.exp(), logs_nv).cpu()
            best = logs_nv.max(1)
            self.top[place, own], self.top_p[place, own] = best.indices.cpu(), best.values.exp().cpu()

    def table(self, images_n: np.ndarray) -> pl.DataFrame:
        """By layer, tidy: ``layer, metric, value, low, high, n, images``; intervals over images (int ≥ 0).

        ``log_p`` (nats), ``top1`` and ``rank_inverse`` (mean of 1 / rank) are of the true next token; ``entropy``
        (nats) of what would be said; ``agreement`` is the share of tokens whose likeliest next one is the last
        layer's.
        """
        asked_n = self.next_n >= 0
        agreement = np.where(self.top < 0, np.nan, self.top == self.top[-1]).astype(np.float32)
        own_top1 = np.where(asked_n, self.rank == 1, np.nan).astype(np.float32)
        found_kln = np.stack([self.log_p, own_top1, 1 / self.rank, self.entropy, agreement])
        ends_3kl = np.stack(measured(found_kln.reshape(-1, len(asked_n)), images_n)).reshape(3, len(METRICS), -1)
        rows = []
        for metric, values_ln, ends_3l in zip(METRICS, found_kln, ends_3kl.swapaxes(0, 1), strict=True):
            known_n = np.isfinite(values_ln).any(0)
            n = {"n": int(known_n.sum()), "images": len(np.unique(images_n[known_n]))}
            rows += [
                {"layer": layer, "metric": metric, "value": value, "low": low, "high": high} | n
                for layer, (value, low, high) in zip(self.layers, ends_3l.T.tolist(), strict=True)
            ]
        return pl.DataFrame(rows)

    def readings(self, tokens: pl.DataFrame) -> pl.DataFrame:
        """Which token each layer would say next: ``tokens`` (a row each, in order) with ``layer, top, p``."""
        parts = []
        for place, layer in enumerate(self.layers):
            said = [self.head.say(int(token)) for token in self.top[place, : tokens.height]]
            own = pl.Series("p", self.top_p[place, : tokens.height])
            parts.append(tokens.with_columns(layer=pl.lit(layer), top=pl.Series(said), p=own))
        return pl.concat(parts)


def unigram(next_n: np.ndarray, frequent_v: np.ndarray, images_n: np.ndarray) -> pl.DataFrame:
    """The floor: the next token guessed by how often each comes next elsewhere, as ``Lens.table`` has it, layer null.

    ``frequent_v`` are counts; one is added to each, so that no token is impossible.
    """
    p_v = (frequent_v + 1) / (frequent_v + 1).sum()
    known_n = next_n >= 0
    own_n = p_v[np.maximum(next_n, 0)]
    rank_n = 1 + len(p_v) - np.searchsorted(np.sort(p_v), own_n, side="right")
    values = np.stack([np.log(own_n), next_n == p_v.argmax(), 1 / rank_n]).astype(np.float32)
    values[:, ~known_n] = np.nan
    rows = {"metric": METRICS[:3]} | dict(zip(("value", "low", "high"), measured(values, images_n), strict=True))
    n = {"n": int(known_n.sum()), "images": len(np.unique(images_n[known_n]))}
    found = pl.DataFrame(rows).with_columns(pl.lit(value, pl.Int64).alias(name) for name, value in n.items())
    return found.select(pl.lit(None, pl.String).alias("layer"), pl.all())


def answer(found: pl.DataFrame) -> str:
    """What the table says in words."""
    own = found.filter(source="store")

    def told(rows: pl.DataFrame, metric: str, place: int) -> str:
        row = rows.filter(metric=metric).row(place, named=True)
        return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    logs = own.filter(metric="log_p")
    best = logs.sort("value").row(-1, named=True)
    floor = found.filter(source="unigram")
    first, last = logs["layer"][0], logs["layer"][-1]
    line = (
        f"Read by the model's own norm and head, the true next token of the instruction has a mean log-probability of "
        f"{told(own, 'log_p', 0)} nats at {first} and {told(own, 'log_p', -1)} at {last}, highest at {best['layer']} "
        f"({best['value']:.2f} [{best['low']:.2f}, {best['high']:.2f}]); by unigram frequency it has "
        f"{told(floor, 'log_p', 0)}"
    )
    drawn = found.filter(source="random-weights")
    if drawn.height:
        line += f", from states of random weights {told(drawn, 'log_p', -1)} at {drawn['layer'][-1]}"
    half = own.filter(pl.col("metric") == "agreement", pl.col("value") >= 0.5)
    return (
        f"{line}. It is the likeliest one for {told(own, 'top1', -1)} of the tokens at {last} (unigram: "
        f"{told(floor, 'top1', 0)}); half of all tokens have the last layer's choice from {half['layer'][0]} on; "
        f"n = {best['n']:,} tokens of {best['images']:,} images."
    )
