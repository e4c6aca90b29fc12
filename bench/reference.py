"""The proxy as a researcher would write it: plain PyTorch, one at a time, over a memory map of padded states.

It is the same function as ``probes.qformer.QFormer`` of one probe (a test copies the weights over), and shares nothing
with it but the loss. Where there is a choice it takes the quick way: fused attention, fused Adam.

Shape suffixes: ``s`` sample, ``b`` batch, ``l`` VLM layer, ``t`` token, ``w`` VLM width, ``n`` = l·t keys, ``q`` query,
``d`` proxy width, ``o`` output.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from probes import boxes

QUERY_STD = 0.02


class Attention(nn.Module):
    """Multi-head attention of queries to keys, all of the proxy's width."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, query_bqd: Tensor, key_bnd: Tensor, value_bnd: Tensor, real_bn: Tensor | None = None) -> Tensor:
        """What the queries read (b, q, d); keys count where ``real_bn`` is True."""
        parts = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query_bqd, key_bnd, value_bnd)]
        mask = None if real_bn is None else real_bn[:, None, None]
        return functional.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm self-attention of the queries, cross-attention to the states, and a FFN ×4."""

    def __init__(self, vlm_width: int, width: int, heads: int):
        super().__init__()
        self.attention = Attention(heads)
        self.norm_self = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_self = nn.Linear(width, width)
        self.norm_cross = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(vlm_width, width)
        self.value = nn.Linear(vlm_width, width)
        self.out_cross = nn.Linear(width, width)
        self.norm_ffn = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_bqd: Tensor, keys_bnw: Tensor, real_bn: Tensor) -> Tensor:
        """Queries after this block."""
        x_bqd = x_bqd + self.out_self(self.attention(*self.qkv(self.norm_self(x_bqd)).chunk(3, -1)))
        query_bqd = self.query(self.norm_cross(x_bqd))
        read_bqd = self.attention(query_bqd, self.key(keys_bnw), self.value(keys_bnw), real_bn)
        x_bqd = x_bqd + self.out_cross(read_bqd)
        return x_bqd + self.down(functional.gelu(self.up(self.norm_ffn(x_bqd))))


class Proxy(nn.Module):
    """One Q-Former that says a box; parameters as of ``probes.qformer.QFormer``."""

    def __init__(self, vlm_layers: int, vlm_width: int, *, width: int, heads: int, depth: int, queries: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * QUERY_STD)
        self.norms = nn.ModuleList(nn.LayerNorm(vlm_width) for _ in range(vlm_layers))
        self.blocks = nn.ModuleList(Block(vlm_width, width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)
        )

    def forward(self, states_bltw: Tensor, real_bt: Tensor) -> Tensor:
        """Raw outputs (b, 4), from states as they come from the VLM."""
        normed = [norm(states_bltw[:, place]) for place, norm in enumerate(self.norms)]
        keys_bnw, real_bn = torch.cat(normed, 1), real_bt.repeat(1, len(normed))
        x_bqd = self.queries.expand(len(states_bltw), -1, -1)
        for block in self.blocks:
            x_bqd = block(x_bqd, keys_bnw, real_bn)
        return self.head(self.norm(x_bqd).mean(1))


@dataclass(frozen=True)
class StatesFile:
    """Padded bfloat16 bits ``[s, l, t, w]`` in a plain file, beside what a proxy is taught."""

    path: Path
    shape: tuple[int, int, int, int]
    lengths: Sequence[int]
    """Tokens of every sample."""
    boxes: np.ndarray
    """True corners (s, 4), float32."""
    samples: np.ndarray
    """Those to train on."""

    def map(self, mode: str = "r") -> np.memmap:
        """The file, mapped anew."""
        return np.memmap(self.path, np.uint16, mode, shape=self.shape)


class States(Dataset):
    """Some layers of a ``StatesFile``, sample by sample."""

    def __init__(self, file: StatesFile, layers: Sequence[int]):
        self.file, self.layers, self.map = file, list(layers), file.map()

    def __len__(self) -> int:
        return len(self.file.samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int, Tensor]:
        sample = self.file.samples[place]
        bits_ltw = torch.from_numpy(self.map[sample, self.layers])
        return bits_ltw.view(torch.bfloat16), int(self.file.lengths[sample]), torch.from_numpy(self.file.boxes[sample])


def loader_of(file: StatesFile, layers: Sequence[int], batch: int, workers: int, device: str) -> DataLoader:
    """Shuffled batches of them."""
    return DataLoader(
        States(file, layers),
        min(batch, len(file.samples)),
        shuffle=True,
        num_workers=workers,
        # As by default on Linux; a process that was spawned would spawn, and import all it has, anew for every loader.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        persistent_workers=workers > 0,
        drop_last=True,
        pin_memory=device == "cuda",
    )


def seconds_a_step(
    file: StatesFile, layers: Sequence[int], sizes: dict[str, int], batch: int, steps: int, workers: int, device: str
) -> float:
    """Seconds of a training step of one proxy with its loading, the mean of ``steps`` after one that is not counted."""
    torch.manual_seed(0)
    model = Proxy(len(layers), file.shape[-1], **sizes).to(device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    loader = loader_of(file, layers, batch, workers, device)
    mixed = torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    given = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps + 1)
    began = 0.0
    for step, (states_bltw, lengths_b, true_b4) in enumerate(given):
        real_bt = torch.arange(states_bltw.shape[2]) < lengths_b[:, None]
        states_bltw, real_bt, true_b4 = (part.to(device, non_blocking=True) for part in (states_bltw, real_bt, true_b4))
        with mixed:
            raw_b4 = model(states_bltw.float(), real_bt)
        said_b4 = boxes.centre_to_corners(raw_b4.float().sigmoid())
        boxes.loss(said_b4, true_b4, step, 0).mean().backward()
        adam.step()
        adam.zero_grad()
        if step in (0, steps) and device == "cuda":
            torch.cuda.synchronize()
        if step == 0:
            began = time.perf_counter()
    return (time.perf_counter() - began) / steps
