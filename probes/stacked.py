"""Many probes of one shape in stacked tensors: each is computed and trained as if it were alone.

Every parameter has a leading axis P and no operation mixes it, so an elementwise optimiser such as Adam trains each
probe as it would alone; ``take`` cuts one out.

Shape suffixes: ``p`` probe = ``g`` group × ``s`` probe of the group; probes of a group read the same states (other
seeds, other labels), groups read other layers or stores. ``b`` batch, ``l`` VLM layer, ``t`` token, ``w`` VLM width,
``o`` output.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class View:
    """What the groups of a stack read of one batch."""

    states_glbtw: Tensor
    """Normalised states (mean 0, variance 1 over the width), in the dtype that is computed in."""
    closed_glbt: Tensor | None
    """0 where there is a token, −inf at padding, float32. None where nothing is padded."""

    @property
    def open_glbt(self) -> Tensor:
        """1 where there is a token, 0 at padding, float32."""
        if self.closed_glbt is None:
            return self.states_glbtw.new_ones(self.states_glbtw.shape[:-1], dtype=torch.float32)
        return (self.closed_glbt == 0).float()


def full(x: Tensor) -> Tensor:
    """At least float32: what sums, softmax and outputs are in, whatever products were computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Module):
    """P linear maps side by side: (p, n, inputs) → (p, n, outputs)."""

    def __init__(self, probes: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(probes, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(probes, 1, outputs))

    def forward(self, x_pni: Tensor) -> Tensor:
        """Apply map p to rows p."""
        return torch.baddbmm(self.bias, x_pni, self.weight)


class Norm(nn.Module):
    """P LayerNorms side by side over the last axis of (p, n, width)."""

    def __init__(self, probes: int, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(probes, 1, width))
        self.bias = nn.Parameter(torch.zeros(probes, 1, width))

    def forward(self, x_pnd: Tensor) -> Tensor:
        """Normalise each row, then scale and shift it with the gain and bias of its probe."""
        return torch.addcmul(self.bias, functional.layer_norm(x_pnd, x_pnd.shape[-1:]), self.gain)


class Stacked(nn.Module):
    """P probes of one kind and shape.

    Parameters of every kind
    ------------------------
    seeds : sequence of int, (p,)
        Probe p starts from the draw that a single probe of its seed starts from, so that differences between layers
        are not differences between starts.
    vlm_layers, vlm_width : int
        Layers that each probe reads together, and the width of a VLM state.
    outputs : int
        Numbers that it says.
    """

    def start(self, seeds: Sequence[int], spreads: Mapping[str, float]) -> None:
        """Draw all weights: normal, of variance one over their inputs, or of the spread that ``spreads`` names."""
        drawn = [
            (parameter, spreads.get(name, 1 / math.sqrt(parameter.shape[1])))
            for name, parameter in self.named_parameters()
            if parameter.ndim == 3 and not name.endswith(("gain", "bias"))
        ]
        for seed in dict.fromkeys(seeds):
            generator = torch.Generator().manual_seed(seed)
            places = [p for p, other in enumerate(seeds) if other == seed]
            for parameter, spread in drawn:
                parameter.data[places] = torch.randn(parameter.shape[1:], generator=generator) * spread

    def forward(self, view: View) -> Tensor:
        """Raw outputs (p, b, o), float32."""
        raise NotImplementedError


def take(stacked: nn.Module, probe: int) -> dict[str, Tensor]:
    """The parameters of one of the P probes, as the state dict of a stack of one."""
    return {name: value[probe : probe + 1].contiguous() for name, value in stacked.state_dict().items()}


def stack(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several state dicts of one probe each as one of P = ``len(states)``; undoes ``take``."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
