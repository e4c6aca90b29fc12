"""The proxy: a Q-Former that reads VLM states as keys and values and says the box [ABP §4.4], many in one module.

The states need no gradient, so keys and values are never made: a query's score at a token is
``(q·Wk)·x``, and what a head reads is ``(Σ a·x)·Wv``. That is the same function with ``heads x queries`` rows a
sample where keys would take ``width`` columns a token, and it leaves nothing large to keep for the way back.

Shape suffixes: see ``probes.stacked``; ``q`` query, ``d`` proxy width, ``h`` head, ``e`` width of a head, ``n`` = q·b:
all samples' first queries come first, so that a sample's rows are equally far apart.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.stacked import Linear, Norm, Stacked, View, full

QUERY_STD = 0.02
"""Spread of the initial queries [ABP §4.4]; zeros would never separate them."""


class LayerNorms(nn.Module):
    """Gain and bias of a LayerNorm per VLM layer, so that norm growth does not drive attention mass (science §4)."""

    def __init__(self, probes: int, vlm_layers: int, vlm_width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(probes, vlm_layers, vlm_width))
        self.bias = nn.Parameter(torch.zeros(probes, vlm_layers, vlm_width))


class _Attend(torch.autograd.Function):
    """Scores, one softmax over all keys, and what is read; states get no gradient, and few large tensors are made.

    ``asked_glrbw`` has a sample's rows ``r`` = (s, h, q) one sample apart, which products take as they are.
    """

    @staticmethod
    def forward(ctx, asked_glrbw: Tensor, states_glbtw: Tensor, closed_glbt: Tensor | None, offset_gbrl: Tensor | None):
        g, l, r, b, _ = asked_glrbw.shape  # noqa: E741
        t = states_glbtw.shape[3]
        dtype = torch.promote_types(states_glbtw.dtype, torch.float32)
        weights = torch.empty(g, b, r, l, t, dtype=dtype, device=states_glbtw.device)
        for i in range(g):
            for j in range(l):
                scores = torch.bmm(asked_glrbw[i, j].transpose(0, 1), states_glbtw[i, j].transpose(1, 2))
                if closed_glbt is None:
                    weights[i, :, :, j] = scores
                else:
                    torch.add(scores, closed_glbt[i, j, :, None], out=weights[i, :, :, j])
        if offset_gbrl is not None:
            weights += offset_gbrl[..., None]
        weights = weights.view(g, b, r, l * t).softmax(-1).to(states_glbtw.dtype).view(g, b, r, l, t)
        ctx.save_for_backward(weights, states_glbtw)
        read = torch.stack(
            [torch.bmm(weights[i, :, :, j], states_glbtw[i, j]) for i in range(g) for j in range(l)]
        ).view(g, l, b, r, -1)
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return read, weights.sum(-1, dtype=dtype), weights

    @staticmethod
    def backward(ctx, read_glbrw: Tensor, mass_gbrl: Tensor, _):
        weights, states_glbtw = ctx.saved_tensors
        g, b, r, l, t = weights.shape  # noqa: E741
        asked = torch.empty(g, l, r, b, states_glbtw.shape[-1], dtype=states_glbtw.dtype, device=weights.device)
        gradient = torch.zeros_like(weights) if read_glbrw is None else torch.empty_like(weights)
        for i in range(g if read_glbrw is not None else 0):
            for j in range(l):
                gradient[i, :, :, j] = torch.bmm(read_glbrw[i, j], states_glbtw[i, j].transpose(1, 2))
        if mass_gbrl is not None:
            gradient += mass_gbrl[..., None].to(gradient.dtype)
        flat = (g, b, r, l * t)
        gradient = torch._softmax_backward_data(gradient.view(flat), weights.view(flat), -1, gradient.dtype)
        gradient = gradient.view(weights.shape)
        for i in range(g):
            for j in range(l):
                asked[i, j] = torch.bmm(gradient[i, :, :, j], states_glbtw[i, j]).transpose(0, 1)
        offset = full(gradient.sum(-1)) if ctx.needs_input_grad[3] else None
        return asked, None, None, offset


class Reading(nn.Module):
    """Cross-attention of queries to VLM states under one softmax over all (layer, token) keys.

    A bias of the keys would add the same to every score of a query, and there is none.
    """

    def __init__(self, probes: int, vlm_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.key = nn.Parameter(torch.empty(probes, vlm_width, width))
        self.value = nn.Parameter(torch.empty(probes, vlm_width, width))
        self.value_bias = nn.Parameter(torch.zeros(probes, 1, width))

    def forward(self, query_pnd: Tensor, view: View, norms: LayerNorms) -> tuple[Tensor, Tensor]:
        """Queries (p, q·b, d) → what they read, of the same shape, and the attention (g, b, s·h·q, l, t)."""
        p, n, d = query_pnd.shape
        g, l, b, _, w = view.states_glbtw.shape  # noqa: E741
        s, h, e, q = p // g, self.heads, d // self.heads, n // b
        key_phew = (self.key * (1 / math.sqrt(e))).view(p, w, h, e).permute(0, 2, 3, 1)
        value_phwe = self.value.view(p, w, h, e).transpose(1, 2)
        if l == 1:  # one layer's gain is a part of the projections
            key_phew = key_phew * norms.gain[:, None]
            value_phwe = value_phwe * norms.gain.transpose(1, 2)[:, None]
        query_rne = query_pnd.view(p, n, h, e).transpose(1, 2).reshape(p * h, n, e)
        asked = torch.bmm(query_rne, key_phew.reshape(p * h, e, w)).view(g, 1, s * h * q, b, w)
        offset = None
        if l > 1:  # what the norms' biases add differs between layers, and so counts
            asked = asked * self._gain(norms, g, s, q)[:, :, :, None].to(asked.dtype)
            shift = (norms.bias @ self.key).view(p, l, h, e).permute(0, 2, 3, 1) * (1 / math.sqrt(e))
            offset = full(torch.bmm(query_rne, shift.reshape(p * h, e, l))).view(g, s * h * q, b, l).transpose(1, 2)
        states = view.states_glbtw
        read, mass_gbrl, weights = _Attend.apply(asked.to(states.dtype), states, view.closed_glbt, offset)
        shift = norms.bias @ self.value
        if l > 1:
            read = (read * self._gain(norms, g, s, q)[:, :, None].to(read.dtype)).sum(1, keepdim=True)
            mass = mass_gbrl.view(g, b, s, h, q, l).permute(0, 2, 4, 1, 3, 5).reshape(p, n, h, l)
            shift = torch.einsum("pnhl,plhe->pnhe", mass, shift.view(p, l, h, e).to(mass.dtype)).reshape(p, n, d)
        read = read.squeeze(1).transpose(1, 2).reshape(p * h, n, w)
        read = torch.bmm(read, value_phwe.reshape(p * h, w, e).to(read.dtype))
        return read.view(p, h, n, e).transpose(1, 2).reshape(p, n, d) + (self.value_bias + shift), weights

    def _gain(self, norms: LayerNorms, g: int, s: int, q: int) -> Tensor:
        """The norms' gains for each row of a sample: (g, l, s·h·q, w)."""
        gain_gslw = norms.gain.unflatten(0, (g, s)).transpose(1, 2)
        return gain_gslw.repeat_interleave(self.heads * q, 2)


class Block(nn.Module):
    """One pre-norm proxy layer: self-attention of the queries, cross-attention to the VLM states, FFN ×4."""

    def __init__(self, probes: int, vlm_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_self = Norm(probes, width)
        self.qkv = Linear(probes, width, 3 * width)
        self.out_self = Linear(probes, width, width)
        self.norm_cross = Norm(probes, width)
        self.query = Linear(probes, width, width)
        self.reading = Reading(probes, vlm_width, width, heads)
        self.out_cross = Linear(probes, width, width)
        self.norm_ffn = Norm(probes, width)
        self.up = Linear(probes, width, 4 * width)
        self.down = Linear(probes, 4 * width, width)

    def mix(self, x_pnd: Tensor, q: int) -> Tensor:
        """Self-attention among the queries of a sample."""
        p, n, d = x_pnd.shape
        b, e = n // q, d // self.heads
        parts = self.qkv(self.norm_self(x_pnd)).view(p, q, b, 3, self.heads, e)
        query, key, value = parts.permute(3, 0, 2, 4, 1, 5).flatten(1, 3)
        weights = torch.bmm(query * (1 / math.sqrt(e)), key.transpose(-1, -2)).softmax(-1)
        mixed = torch.bmm(weights.to(value.dtype), value).view(p, b, self.heads, q, e)
        return x_pnd + self.out_self(mixed.permute(0, 3, 1, 2, 4).reshape(p, n, d))

    def read(self, x_pnd: Tensor, view: View, norms: LayerNorms) -> tuple[Tensor, Tensor]:
        """Cross-attention and FFN; also the attention (g, b, s·h·q, l, t)."""
        read, weights = self.reading(self.query(self.norm_cross(x_pnd)), view, norms)
        x_pnd = x_pnd + self.out_cross(read)
        return x_pnd + self.down(functional.gelu(self.up(self.norm_ffn(x_pnd)))), weights


class QFormer(Stacked):
    """P proxy Q-Formers of one shape; float32 weights, no dropout, no grid position code.

    Parameters
    ----------
    width, heads, depth, queries
        Size of each proxy; ``width`` is a multiple of ``heads``. The others are those of ``Stacked``.
    """

    def __init__(self, seeds, vlm_layers, vlm_width, outputs, *, width: int, heads: int, depth: int, queries: int):
        probes = len(seeds)
        super().__init__()
        self.queries = nn.Parameter(torch.empty(probes, queries, width))
        self.norms = LayerNorms(probes, vlm_layers, vlm_width)
        self.blocks = nn.ModuleList(Block(probes, vlm_width, width, heads) for _ in range(depth))
        self.norm = Norm(probes, width)
        self.head = nn.ModuleList(Linear(probes, width, size) for size in (width, width, outputs))
        self.start(seeds, {"queries": QUERY_STD})

    def forward(self, view: View, *, attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Raw outputs (p, b, o); with ``attention`` also a (p, b, h, q, l, t), h = (proxy layer, head), m outermost.

        The attention of a (p, b, h, q) sums to 1 over (l, t).
        """
        g, l, b, t, _ = view.states_glbtw.shape  # noqa: E741
        p, q, d = self.queries.shape
        maps, x_pnd = [], self.queries
        for m, block in enumerate(self.blocks):
            x_pnd = block.mix(x_pnd, q)
            if m == 0:  # until here the queries are the same for every sample
                x_pnd = x_pnd[:, :, None].expand(-1, -1, b, -1).reshape(p, q * b, d)
            x_pnd, weights = block.read(x_pnd, view, self.norms)
            if attention:
                maps.append(weights.view(g, b, p // g, block.heads, q, l, t).transpose(1, 2).flatten(0, 1))
        y_pbd = self.norm(x_pnd).view(p, q, b, d).mean(1)
        for linear in self.head[:-1]:
            y_pbd = functional.gelu(linear(y_pbd))
        raw_pbo = full(self.head[-1](y_pbd))
        return (raw_pbo, torch.cat(maps, dim=2)) if attention else raw_pbo
