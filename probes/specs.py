"""Which probes a sweep trains: every layer, and everything that a referee would hold beside it.

A floor knows nothing, or a part of the question; a control shows what a probe of this size learns by itself; matched
probes differ in one thing only (science §8). What a layer's probe scores beyond them is due to its layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from probes.config import SweepConfig, TrainConfig
from store.errors import Refusal

Role = Literal["layer", "prompt", "floor", "control", "matched", "efficiency", "codelength", "other"]
Labels = Literal["true", "permuted", "control"]

ORDINARY = "ordinary"
"""The store itself, beside the control stores that ``python -m extract --control`` fills."""

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the train split of the sample-efficiency curve; the whole of it is the ordinary probe of the layer."""

PORTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares that a codelength's probes are trained on; each codes the samples up to the next [Voita & Titov 2020]."""

CELLS = "cell-3x3"
"""Target of codelengths: the ninth of the picture that the box's centre lies in. A code needs classes."""


@dataclass(frozen=True)
class Spec:
    """One probe, seed apart: what it reads, and what it is taught."""

    name: str
    """Its name in tables and folders, unique in a sweep, e.g. ``layer-3``."""
    role: Role
    """What it is for."""
    layers: tuple[str, ...]
    """VLM layers read together, under one softmax."""
    tokens: str = "all"
    """Tokens of these layers that it sees: image, text, all, or a kind of the token table."""
    kind: str = "qformer"
    """qformer, linear, mlp or attention; constant for floors without training."""
    target: str = "box"
    """What it is to say; see ``probes.targets``."""
    labels: Labels = "true"
    """The samples' own answers, those of other samples, or one drawn per type of input (the control task)."""
    source: str = ORDINARY
    """Which store its states are of: the ordinary one, random-weights or shuffled-images."""
    share: float = 1.0
    """Share of the train split that it sees."""
    keys: int | None = None
    """(layer, token) pairs of a sample that it sees, drawn evenly over the layers; all if not given."""
    without: str | None = None
    """Derived array that marks the prompt tokens that it does not see; see ``probes.marked``."""

    @property
    def layer(self) -> str:
        """The layers as one label: ``3``, ``4–7`` for a run of blocks, ``2,9`` for others."""
        blocks = [int(name) for name in blocks_of(self.layers)]
        if len(self.layers) > 1 and blocks and blocks == list(range(blocks[0], blocks[0] + len(self.layers))):
            return f"{blocks[0]}–{blocks[-1]}"
        return ",".join(self.layers)

    def about(self) -> dict[str, Any]:
        """Its row in the table of probes."""
        fields = asdict(self)
        return fields | {"probe": fields.pop("name"), "layers": list(self.layers), "layer": self.layer}


def blocks_of(layers: Sequence[str]) -> list[str]:
    """The decoder blocks among the layer names, without ``embed`` and ``final``."""
    return [name for name in layers if name.isdigit()]


def middle_third(layers: Sequence[str]) -> tuple[str, ...]:
    """The middle third of the decoder blocks (4 … 7 of 12), at least one."""
    blocks = blocks_of(layers)
    third = len(blocks) // 3
    return tuple(blocks[third : len(blocks) - third])


def fraction(share: float) -> str:
    """A share of one over a whole number as a name: ``1-of-16``."""
    return f"1-of-{round(1 / share)}"


def named(prefix: str, layers: Sequence[str], tokens: str) -> str:
    """The name of a probe: ``layer-3``, ``permuted-3-text``, ``joint-4+5``."""
    return f"{prefix}-{'+'.join(layers)}" + ("" if tokens == "all" else f"-{tokens}")


def once(option: str, layers: Sequence[str]) -> None:
    """Refuse layers of which one is named twice."""
    if len(set(layers)) < len(layers):
        raise Refusal(f"--{option.replace('_', '-')} {' '.join(layers)}: name each layer once")


def one(config: TrainConfig, layers: Sequence[str]) -> Spec:
    """The probe that ``train`` is asked for, over a store that holds ``layers``; a sweep's, where it has the same.

    Raises
    ------
    Refusal
        When the settings name no layer, one twice, or one that the store does not hold, or leave out prompt tokens of a
        probe that reads none.
    """
    unknown = [name for name in config.layers if name not in layers]
    if unknown or not config.layers:
        raise Refusal(f"--layers names {', '.join(unknown) or 'none'}; the store holds {', '.join(layers)}")
    once("layers", config.layers)
    if config.without and config.tokens == "image":
        raise Refusal(f"--without {config.without} leaves out prompt tokens, and --tokens image reads none")
    role: Role = "control" if config.labels != "true" else "layer" if len(config.layers) == 1 else "other"
    prefix = config.labels if config.labels != "true" else "layer" if len(config.layers) == 1 else "joint"
    spec = Spec("", role, config.layers, config.tokens, config.probe, config.target, config.labels)
    name = named(prefix, config.layers, config.tokens)
    if config.without:
        # It is neither the layer's probe nor a control of it, which tables would take it for.
        return replace(spec, name=f"{name}-without-{config.without}", role="other", without=config.without)
    return replace(spec, name=name)


def left_out(config: SweepConfig, layers: Sequence[str], text_tokens: int) -> Iterator[str]:
    """Lines on the parts of a sweep that this store has not what it takes for."""
    middle = config.prompt_layers or middle_third(layers)
    if "prompt" in config.parts and not middle:
        yield "prompt is left out: the store holds no block; --prompt-layers names what to read"
    if "joint" in config.parts and len(blocks_of(layers)) < 2:
        yield "joint is left out: it reads the blocks together, and the store holds fewer than two"
    if "floors" in config.parts and "embed" not in layers:
        yield "floors text-only and image-only are left out: the store holds no layer embed"
    if "matched" in config.parts and not 1 < len(middle) <= text_tokens:
        yield (
            f"matched is left out: it takes two middle layers and as many prompt tokens in every sample, and there are "
            f"{len(middle)} and {text_tokens}; --prompt-layers names others"
        )


def seen(share: float, samples: int) -> int:
    """How many of so many train samples a probe of a share sees, at least two."""
    return max(2, round(share * samples))


def specs(config: SweepConfig, layers: Sequence[str], controls: Sequence[str], text_tokens: int) -> list[Spec]:
    """All probes of a sweep over a store that holds ``layers``, beside which the ``controls`` stores are given.

    ``text_tokens`` is the least number of prompt tokens of a sample: what matched probes may have of each layer.

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
    common = Spec("", "layer", (), config.tokens, config.probe, config.target)
    for option in ("layers", "prompt_layers"):
        once(option, getattr(config, option))
    wanted = list(_specs(config, common, layers, controls, text_tokens))
    # Asked of one layer alone, the prompt's probe and a floor may be the same as a layer's.
    return list({spec.name: spec for spec in wanted}.values())


def _specs(
    config: SweepConfig, common: Spec, layers: Sequence[str], controls: Sequence[str], text_tokens: int
) -> Iterator[Spec]:
    parts, chosen = config.parts, config.layers or tuple(layers)
    middle = config.prompt_layers or middle_third(layers)

    def each(role: Role, prefix: str, **changes: Any) -> Iterator[Spec]:
        for name in chosen:
            yield replace(common, name=named(prefix, (name,), config.tokens), role=role, layers=(name,), **changes)

    if "layers" in parts:
        yield from each("layer", "layer")
    if "prompt" in parts and middle:
        yield replace(common, name="mid-prompt", role="prompt", layers=tuple(middle), tokens="text")
    if "joint" in parts and len(blocks := tuple(blocks_of(layers))) > 1:
        # As `probes train` would name them.
        joint = replace(common, layers=blocks, tokens="text")
        yield replace(joint, name=named("joint", blocks, "text"), role="other")
        yield replace(joint, name=named("permuted", blocks, "text"), role="control", labels="permuted")
    if "floors" in parts and "embed" in layers:
        # Before the first block no token has seen another: these two know the words only, and the picture only.
        for kind in ("text", "image"):
            yield replace(common, name=f"floor-{kind}-only", role="floor", layers=("embed",), tokens=kind)
    if "permuted" in parts:
        yield from each("control", "permuted", labels="permuted")
    if "control-task" in parts:
        yield from each("control", "control", labels="control")
    for source in controls:
        yield from each("control", source.split("-")[0], source=source)
    if "matched" in parts and 1 < len(middle) <= text_tokens:
        keys = text_tokens - text_tokens % len(middle)
        centre = (middle[len(middle) // 2],)
        for tokens, count in ((tokens, count) for tokens in ("all", "text") for count in (1, len(middle))):
            name = f"matched-{'prompt' if tokens == 'text' else tokens}-{'1' if count == 1 else 'n'}"
            read = centre if count == 1 else tuple(middle)
            yield replace(common, name=name, role="matched", layers=read, tokens=tokens, keys=keys)
    if "shares" in parts:
        for share in SHARES:
            for spec in each("efficiency", "layer", share=share):
                yield replace(spec, name=f"{spec.name}-{fraction(share)}")
    if "codelength" in parts:
        target = CELLS if config.target == "box" else config.target
        for share in PORTIONS:
            for spec in each("codelength", "codelength", share=share, target=target):
                yield replace(spec, name=f"{spec.name}-{fraction(share)}")
