"""Which proxies a run trains: one per layer, the mid-layer prompt proxy, and the trained floors.

A floor is a proxy that cannot know the answer, or knows only a part of the question. What a layer's proxy scores
above the floors is due to its layer (science §8).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from probes.config import ProbeConfig
from store.errors import Refusal

Role = Literal["layer", "prompt", "floor"]


@dataclass(frozen=True)
class Spec:
    """One proxy: what it reads, and which boxes it is taught."""

    name: str
    """Its name in tables and folders, e.g. ``layer-3``."""
    role: Role
    """Shown on the layer axis, as the prompt proxy, or as a floor."""
    layers: tuple[str, ...]
    """VLM layers read together, under one softmax."""
    tokens: Literal["all", "image", "text", "none"]
    """Tokens of these layers that it sees; none for the floors that need no training."""
    permuted: bool = False
    """Taught the boxes of other samples: what can be had from the distribution of boxes alone."""

    @property
    def layer(self) -> str:
        """The layers as one label: ``3``, ``4–7`` for a run of blocks, ``2,9`` for others."""
        blocks = [int(name) for name in blocks_of(self.layers)]
        if len(self.layers) > 1 and blocks and blocks == list(range(blocks[0], blocks[0] + len(self.layers))):
            return f"{blocks[0]}–{blocks[-1]}"
        return ",".join(self.layers)


def blocks_of(layers: Sequence[str]) -> list[str]:
    """The decoder blocks among the layer names, without ``embed`` and ``final``."""
    return [name for name in layers if name.isdigit()]


def middle_third(layers: Sequence[str]) -> tuple[str, ...]:
    """The middle third of the decoder blocks (4 … 7 of 12), at least one."""
    blocks = blocks_of(layers)
    third = len(blocks) // 3
    return tuple(blocks[third : len(blocks) - third])


def specs(config: ProbeConfig, layers: Sequence[str]) -> list[Spec]:
    """All proxies of a run on a store that holds ``layers``.

    Raises
    ------
    Refusal
        When the settings name a layer that the store does not hold.
    """
    for option in ("layers", "prompt_layers"):
        unknown = [name for name in getattr(config, option) if name not in layers]
        if unknown:
            raise Refusal(
                f"--{option.replace('_', '-')} names {', '.join(unknown)}; the store holds {', '.join(layers)}"
            )
    middle = middle_third(layers)
    prompt = config.prompt_layers or middle
    wanted = [Spec(f"layer-{name}", "layer", (name,), "all") for name in config.layers or layers]
    if prompt:
        wanted.append(Spec("mid-prompt", "prompt", tuple(prompt), "text"))
    if "embed" in layers:
        # Before the first block no token has seen another: these two know the words only, and the picture only.
        wanted.append(Spec("floor-text-only", "floor", ("embed",), "text"))
        wanted.append(Spec("floor-image-only", "floor", ("embed",), "image"))
    centre = middle[len(middle) // 2] if middle else layers[len(layers) // 2]
    wanted.append(Spec("floor-permuted", "floor", (centre,), "all", permuted=True))
    return wanted
