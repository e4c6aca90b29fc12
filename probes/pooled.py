"""Probes simpler than a Q-Former: a linear map or an MLP of the mean token, and pooling by learned attention.

What these can read lies open in the states; what only a Q-Former finds takes computation to get at.
Shape suffixes: see ``probes.stacked``.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.stacked import Linear, Stacked, View, full


def mean_token(view: View, each: int) -> Tensor:
    """Mean over the tokens of every layer, layers end to end, for ``each`` probes of a group: (p, b, l·w)."""
    states_glbtw, open_glbt = view.states_glbtw, view.open_glbt
    share_glbt = open_glbt / open_glbt.sum(-1, keepdim=True).clamp(min=1)
    mean_gblw = torch.einsum("glbt,glbtw->gblw", share_glbt.to(states_glbtw.dtype), states_glbtw)
    return mean_gblw.flatten(2).repeat_interleave(each, 0)


class LinearProbe(Stacked):
    """A linear map of the mean token."""

    def __init__(self, seeds, vlm_layers, vlm_width, outputs):
        super().__init__()
        self.out = Linear(len(seeds), vlm_layers * vlm_width, outputs)
        self.start(seeds, {})

    def forward(self, view: View) -> Tensor:
        """Raw outputs (p, b, o)."""
        return full(self.out(mean_token(view, len(self.out.weight) // len(view.states_glbtw))))


class MLPProbe(Stacked):
    """Two hidden layers of ``width`` on the mean token."""

    def __init__(self, seeds, vlm_layers, vlm_width, outputs, *, width: int):
        super().__init__()
        sizes = (vlm_layers * vlm_width, width, width, outputs)
        self.layers = nn.ModuleList(Linear(len(seeds), *pair) for pair in itertools.pairwise(sizes))
        self.start(seeds, {})

    def forward(self, view: View) -> Tensor:
        """Raw outputs (p, b, o)."""
        x_pbd = mean_token(view, len(self.layers[0].weight) // len(view.states_glbtw))
        for linear in self.layers[:-1]:
            x_pbd = functional.gelu(linear(x_pbd))
        return full(self.layers[-1](x_pbd))


class AttentionProbe(Stacked):
    """Each of ``heads`` learned queries pools all (layer, token) states by one softmax; then a linear map."""

    def __init__(self, seeds, vlm_layers, vlm_width, outputs, *, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(len(seeds), heads, vlm_width))
        self.out = Linear(len(seeds), heads * vlm_width, outputs)
        self.start(seeds, {"query": 1 / math.sqrt(vlm_width)})

    def forward(self, view: View) -> Tensor:
        """Raw outputs (p, b, o)."""
        states_glbtw = view.states_glbtw
        g, _, b, _, w = states_glbtw.shape
        p, heads, _ = self.query.shape
        query_gsw = self.query.view(g, p // g * heads, w).to(states_glbtw.dtype)
        scores_glbts = full(torch.einsum("glbtw,gsw->glbts", states_glbtw, query_gsw))
        if view.closed_glbt is not None:
            scores_glbts = scores_glbts + view.closed_glbt[..., None]
        scores_gbsk = scores_glbts.permute(0, 2, 4, 1, 3).flatten(3)
        weights_gbslt = scores_gbsk.softmax(-1).unflatten(3, states_glbtw.shape[1:4:2])
        read = torch.einsum("gbslt,glbtw->gsbw", weights_gbslt.to(states_glbtw.dtype), states_glbtw)
        read = read.unflatten(1, (p // g, heads)).transpose(2, 3).reshape(p, b, heads * w)
        return full(self.out(read))
