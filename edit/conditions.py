"""What an editor is conditioned on: ways to make one sequence of states of what the single pass computed.

``last``         the last layer after the final norm, as Qwen-Image-Edit does
``norm-average`` every token's states normalised, then averaged over layers
``description``  the model first writes the scene out; that is read too, and the last layer of it taken
``middle``       one layer in the middle: the voted l*

Shape suffixes: l layer, t token, w width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from store.errors import Refusal

if TYPE_CHECKING:  # commands have these settings, and their --help waits for no torch
    import torch

    from extract.encoder import Encoder, Picture, Seen

LAST = "final"
WAYS = ("last", "norm-average", "description", "middle")


@dataclass(frozen=True)
class Conditioning:
    """A way to condition, with what the paper leaves open as settings."""

    way: Literal["last", "norm-average", "description", "middle"] = "last"
    """last: after the final norm, as the editor was trained. norm-average: mean over layers of normalised states.
    description: the last layer of an instruction with the model's own description of the scene. middle: one layer."""
    middle: str | None = None
    """Layer of the way ``middle``: the voted l*."""
    average_over: Literal["blocks", "all"] = "blocks"
    """Layers of ``norm-average``: the blocks' outputs and the last one after the final norm, or the embeddings too."""
    norm: Literal["rms", "l2", "layernorm"] = "rms"
    """Norm of ``norm-average``, per token and layer."""
    rescale: bool = True
    """Give averaged tokens the size that those of the last layer have."""
    describe: Literal["append", "replace"] = "append"
    """Whether the description follows the instruction or stands in its place."""
    max_new_tokens: int = 400
    """Longest description."""

    def __post_init__(self):
        """Refuse settings that do not go together."""
        if self.way not in WAYS:
            raise Refusal(f"conditioning {self.way!r} is not known: {', '.join(WAYS)}")
        if (self.way == "middle") != (self.middle is not None):
            raise Refusal("--middle names the layer of --way middle, and of no other: give both, or neither")

    def layers(self, all_layers: Sequence[str]) -> tuple[str, ...]:
        """The layers that it needs of those that there are."""
        if self.way == "middle":
            return (self.middle,)
        if self.way != "norm-average":
            return (LAST,)
        return tuple(layer for layer in all_layers if layer != "embed" or self.average_over == "all")

    def combine(self, states_ltw: torch.Tensor) -> torch.Tensor:
        """``[t, w]`` of the states at ``layers``, in that order (the last layer is the last of them)."""
        if self.way != "norm-average":
            return states_ltw[0]
        import torch

        states = states_ltw.float()
        if self.norm == "layernorm":
            normal = torch.nn.functional.layer_norm(states, states.shape[-1:])
        else:
            size = (
                states.square().mean(-1, keepdim=True) if self.norm == "rms" else states.square().sum(-1, keepdim=True)
            )
            normal = states / size.sqrt().clamp_min(1e-6)
        mean = normal.mean(0)
        if self.rescale:
            mean *= states[-1].norm(dim=-1, keepdim=True) / mean.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        return mean.to(states_ltw.dtype)

    def instruction(self, encoder: Encoder, picture: Picture, instruction: str) -> str:
        """What is read in the place of the instruction: with the model's description where that is the way."""
        if self.way != "description":
            return instruction
        said = encoder.describe(picture, instruction, self.max_new_tokens)
        return f"{instruction} {said}".strip() if self.describe == "append" or not said else said


@dataclass(frozen=True)
class Conditioned:
    """States for an editor, and the pass that they are from."""

    states: torch.Tensor
    """``[t, w]``"""
    seen: Seen
    read: str
    """What was read in the place of the instruction."""


def condition(
    encoder: Encoder, way: Conditioning, picture: Picture, instruction: str, layers: Sequence[str] = ()
) -> Conditioned:
    """One pass over (picture, instruction), and the editor's states; ``layers`` are read besides, for a proxy."""
    own = way.layers(encoder.layers)
    read = way.instruction(encoder, picture, instruction)
    wanted = [layer for layer in encoder.layers if layer in {*own, *layers}]
    seen = encoder.see(picture, read, wanted)
    return Conditioned(way.combine(seen.states[[seen.layers.index(layer) for layer in own]]), seen, read)
