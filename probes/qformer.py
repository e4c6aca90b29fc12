"""The proxy: P independent Q-Formers of one shape in stacked tensors, from VLM states to one box per sample.

Every parameter has a leading axis P and no operation mixes it, so each proxy is computed, and trained by an
elementwise optimiser such as Adam, exactly as if it were alone; ``take`` cuts one out. Training one is P = 1.

Shape suffixes: ``p`` probe, ``b`` batch, ``q`` query, ``d`` proxy width, ``l`` VLM layer, ``t`` token,
``w`` VLM width, ``k`` key = one (layer, token) pair, ``h`` head, ``m`` proxy layer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.boxes import centre_to_corners

QUERY_STD = 0.02
"""Spread of the initial queries [ABP §4.4]; zeros would never separate them."""


class StackedLinear(nn.Module):
    """P linear maps side by side: (p, n, inputs) → (p, n, outputs)."""

    def __init__(self, probes: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(probes, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(probes, 1, outputs))

    def forward(self, x_pnd: Tensor) -> Tensor:
        """Apply map p to rows p."""
        return torch.baddbmm(self.bias, x_pnd, self.weight)


class StackedNorm(nn.Module):
    """P LayerNorms side by side over the last axis of (p, n, width)."""

    def __init__(self, probes: int, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(probes, 1, width))
        self.bias = nn.Parameter(torch.zeros(probes, 1, width))

    def forward(self, x_pnd: Tensor) -> Tensor:
        """Normalise each row, then scale and shift it with the gain and bias of its probe."""
        return torch.addcmul(self.bias, functional.layer_norm(x_pnd, x_pnd.shape[-1:]), self.gain)


class LayerNorms(nn.Module):
    """Gain and bias of a LayerNorm per VLM layer, so that norm growth does not drive attention mass (science §4).

    They are folded into each projection that follows, ``(x·g + b)W = x(gW) + bW``: the same function, and neither
    the largest tensor of the model nor its gradient is written a second time.
    """

    def __init__(self, probes: int, vlm_layers: int, vlm_width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(probes, vlm_layers, vlm_width))
        self.bias = nn.Parameter(torch.zeros(probes, vlm_layers, vlm_width))

    def project(self, rows_pl: Tensor, linear: StackedLinear) -> Tensor:
        """Normalised rows (p·l, b·t, w), scaled per layer and mapped by ``linear``: (p·l, b·t, d)."""
        weight_plwd = self.gain[..., None] * linear.weight[:, None]
        offset_pld = self.bias @ linear.weight + linear.bias
        return torch.baddbmm(offset_pld.flatten(0, 1)[:, None], rows_pl, weight_plwd.flatten(0, 1))


class Block(nn.Module):
    """One pre-norm proxy layer: self-attention of the queries, cross-attention to the VLM states, FFN ×4."""

    def __init__(self, probes: int, vlm_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_self = StackedNorm(probes, width)
        self.qkv = StackedLinear(probes, width, 3 * width)
        self.out_self = StackedLinear(probes, width, width)
        self.norm_cross = StackedNorm(probes, width)
        self.query = StackedLinear(probes, width, width)
        self.key = StackedLinear(probes, vlm_width, width)
        self.value = StackedLinear(probes, vlm_width, width)
        self.out_cross = StackedLinear(probes, width, width)
        self.norm_ffn = StackedNorm(probes, width)
        self.up = StackedLinear(probes, width, 4 * width)
        self.down = StackedLinear(probes, 4 * width, width)

    def split(self, x: Tensor, p: int, layers: int, b: int) -> Tensor:
        """(p·l, b·n, d), in any grouping of its rows, → (p·b, h, l·n, d/h): all keys of a sample on one axis."""
        x = x.view(p, layers, b, -1, self.heads, x.shape[-1] // self.heads)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(p * b, self.heads, -1, x.shape[-1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, closed: Tensor | None) -> tuple[Tensor, Tensor]:
        """One softmax over all keys; ``closed`` (p·b, 1, 1, k) is −inf at padding."""
        scores = torch.matmul(query * (1 / math.sqrt(query.shape[-1])), key.transpose(-1, -2))
        weights = (scores if closed is None else scores + closed).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2), weights

    def forward(self, x_pnd: Tensor, rows_pl: Tensor, norms: LayerNorms, closed: Tensor, b: int):
        """Queries (p, b·q, d) → queries, and the cross-attention weights (p·b, h, q, k)."""
        p, layers = norms.gain.shape[:2]
        queries, keys, values = (self.split(part, p, 1, b) for part in self.qkv(self.norm_self(x_pnd)).chunk(3, -1))
        mixed, _ = self.attend(queries, keys, values, None)
        x_pnd = x_pnd + self.out_self(mixed.view(x_pnd.shape))
        queries = self.split(self.query(self.norm_cross(x_pnd)), p, 1, b)
        keys, values = (self.split(norms.project(rows_pl, part), p, layers, b) for part in (self.key, self.value))
        read, weights = self.attend(queries, keys, values, closed)
        x_pnd = x_pnd + self.out_cross(read.view(x_pnd.shape))
        return x_pnd + self.down(functional.gelu(self.up(self.norm_ffn(x_pnd)))), weights


class QFormer(nn.Module):
    """P proxy Q-Formers of one shape [ABP §4.4]; float32, no dropout, no grid position code.

    Parameters
    ----------
    probes : int
        P, how many independent proxies are stacked.
    vlm_layers, vlm_width : int
        Layers that each proxy reads together, and the width of a VLM state.
    width, heads, depth, queries : int
        Size of each proxy; ``width`` is a multiple of ``heads``.
    seed : int
        All P proxies start from the draw that a single proxy of this seed starts from, so that differences
        between layers are not differences between starts.
    """

    def __init__(
        self,
        probes: int,
        vlm_layers: int,
        vlm_width: int,
        *,
        width: int,
        heads: int,
        depth: int,
        queries: int,
        seed: int,
    ):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(probes, queries, width))
        self.norms = LayerNorms(probes, vlm_layers, vlm_width)
        self.blocks = nn.ModuleList(Block(probes, vlm_width, width, heads) for _ in range(depth))
        self.norm = StackedNorm(probes, width)
        self.head = nn.ModuleList(StackedLinear(probes, width, size) for size in (width, width, 4))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") or name == "queries":
                spread = QUERY_STD if name == "queries" else 1 / math.sqrt(parameter.shape[1])
                one = torch.randn(parameter.shape[1:], generator=generator) * spread
                parameter.data.copy_(one.expand_as(parameter))

    def forward(self, states_pbltw: Tensor, mask_pbt: Tensor, *, attention: bool = False):
        """Boxes of P proxies for one batch.

        Parameters
        ----------
        states_pbltw : Tensor, float32
            What each proxy reads: (probe, batch, VLM layer, token, VLM width).
        mask_pbt : Tensor, bool
            True where proxy p may look; every (p, b) needs at least one token.
        attention : bool
            Also return the cross-attention.

        Returns
        -------
        boxes_pb4 : Tensor, float32
            Corners (x1, y1, x2, y2) in [0, 1] of the image.
        a_pbhqlt : Tensor, float32, only with ``attention``
            Cross-attention with h = (proxy layer m, head j) flattened, m outermost; sums to 1 over (l, t).
        """
        p, b, layers, t, w = states_pbltw.shape
        closed = states_pbltw.new_zeros(mask_pbt.shape).masked_fill_(~mask_pbt, -math.inf)
        closed = closed[:, :, None].expand(p, b, layers, t).reshape(p * b, 1, 1, layers * t)
        rows_pl = functional.layer_norm(states_pbltw.transpose(1, 2).reshape(p * layers, b * t, w), (w,))
        x_pnd = self.queries[:, None].expand(-1, b, -1, -1).flatten(1, 2)
        maps = []
        for block in self.blocks:
            x_pnd, weights = block(x_pnd, rows_pl, self.norms, closed, b)
            if attention:
                maps.append(weights.view(p, b, block.heads, -1, layers, t))
        y_pbd = self.norm(x_pnd).view(p, b, -1, x_pnd.shape[-1]).mean(2)
        for linear in self.head[:-1]:
            y_pbd = functional.gelu(linear(y_pbd))
        boxes_pb4 = centre_to_corners(self.head[-1](y_pbd).sigmoid())
        return (boxes_pb4, torch.cat(maps, dim=2)) if attention else boxes_pb4


def take(stacked: QFormer, probe: int) -> dict[str, Tensor]:
    """The parameters of one of the P proxies, as the state dict of a ``QFormer`` with P = 1."""
    return {name: value[probe : probe + 1].contiguous() for name, value in stacked.state_dict().items()}


def stack(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several state dicts of P = 1 as one of P = ``len(states)``; undoes ``take``."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
