"""The single pass for pictures at hand, without a store: states as a store of the same identity would give them.

A store says in its ``identity`` by which model, template, positions and dtype its states came about; `Encoder.of`
sets all that up again, and `Encoder.read` answers as `store.Store.read` does for a sample.

Shape suffixes: s sample, l layer, t token, w width, n kept tokens of a batch.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig

from extract.capture import layer_names, single_pass
from extract.config import POCKET, RANDOM_WEIGHTS, ExtractConfig
from extract.editors import editor_of
from extract.families import family_of
from extract.model import (
    draw_model,
    file_hash,
    find_checkpoint,
    find_device,
    library_versions,
    load_model,
    load_processor,
    processor_settings,
    weight_hashes,
)
from extract.omniedit import EMPTY_PROMPT, BadSample, checked_picture, decode, pixels
from extract.pipeline import kept_tokens
from extract.sequence import Conditioner, Prepared
from store.errors import Refusal

Picture = Image.Image | str | os.PathLike | bytes

KINDS = {"all": ("image", "text")} | {kind: (kind,) for kind in ("image", "text", "instruction", "template")}
"""Kinds of tokens that can be asked for, and the masks of a batch that each is made of, in this order."""

SIZES = ("size", "max_patches")
"""Settings of image processors that ``--max-pixels`` makes."""

NEEDED = ("model", "revision", "weights", "tokenizer", "processor", "conditioning", "template", "positions", "dtype")


@dataclass(frozen=True)
class Encoder:
    """A model that reads (picture, instruction) once, as it did for a store; made by `Encoder.of`.

    Examples
    --------
    >>> encoder = extract.Encoder.of(store.open(path).identity)               # doctest: +SKIP
    >>> states, mask = encoder.read("picture.png", "Remove the leftmost ball.", ("6", "final"), "instruction")
    >>> proxy.predict_states(states, mask)
    """

    model: nn.Module
    conditioner: Conditioner
    batch_size: int
    """Samples a pass."""
    threads: int | None
    """Torch threads of a pass on the CPU; they change the last bit of a sum."""
    max_prompt_tokens: int
    """Longest instruction in tokens."""

    @classmethod
    def of(
        cls,
        identity: Mapping[str, Any],
        model: str | os.PathLike | None = None,
        *,
        revision: str | None = None,
        device: Literal["auto", "cuda", "cpu"] | None = None,
        max_prompt_tokens: int = ExtractConfig.max_prompt_tokens,
    ) -> Self:
        """The encoder that gave a store its states.

        Parameters
        ----------
        identity
            A store's ``identity``. A ``random-weights`` control's has no checkpoint: its weights are drawn again.
        model, revision
            Where the checkpoint is found, a folder or a hub id (and its revision); where the identity says, if not
            given. Its files must be the very ones, by their hashes.
        device
            Where it runs; where the store's states were computed, if that is here and nothing is given.
        max_prompt_tokens
            Longest instruction in tokens that is read.

        Raises
        ------
        Refusal
            The identity is not that of an extraction, the checkpoint is not found, or is another one.

        Warns
        -----
        UserWarning
            The libraries or the device are others than the store's: the last bits of the states may differ.
        """
        if missing := [name for name in NEEDED if name not in identity]:
            raise Refusal(
                f"the identity has no {missing[0]!r}: give `store.open(path).identity` of a store that "
                "`python -m extract` made"
            )
        folder = _find(identity, model, revision)
        where = _device(identity, device)
        conditioner = _conditioner(identity, folder)
        _refuse_others(identity, folder, conditioner)
        _warn_of_others(identity, conditioner, where)
        dtype = getattr(torch, identity["dtype"])
        if _is_drawn(identity):
            made = draw_model(folder, where, dtype, identity["control"]["seed"])
        else:
            made = load_model(folder, where, dtype)
        batch_size = identity.get("batch_size", ExtractConfig.batch_size)
        return cls(made, conditioner, batch_size, identity.get("threads"), max_prompt_tokens)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that can be read, in the order of the pass."""
        return tuple(layer_names(self.model))

    def read(
        self, image: Picture, instruction: str, layers: str | Sequence[str], tokens: str = "all"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States of one picture and instruction.

        Parameters
        ----------
        image
            A Pillow picture, the path of a file, or an encoded picture as bytes; it is turned upright by its EXIF.
        instruction
            What is to be edited, in words.
        layers
            One or more of ``layers``.
        tokens
            ``image``, ``text`` (all others), ``all`` (image, then text), ``instruction`` or ``template``; each in the
            order of the sequence.

        Returns
        -------
        states : torch.Tensor
            ``[1, l, t, w]`` on the CPU, in the model's dtype, as `store.Store.read` gives them for a sample. Bit for
            bit where the store was made with ``--batch-size 1`` on the same machine; else within what padding and the
            split of work change (`extract.pipeline.TOLERANCE`).
        mask : torch.Tensor
            bool ``[1, t]``.

        Raises
        ------
        Refusal
            The picture cannot be read whole, the instruction is empty or too long, or no layer or kind of tokens has
            that name.
        """
        return self.read_many([(image, instruction)], layers, tokens)

    def read_many(
        self, pairs: Sequence[tuple[Picture, str]], layers: str | Sequence[str], tokens: str = "all"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States of several (picture, instruction): ``[s, l, t, w]``, zero where the mask ``[s, t]`` is false.

        They go through the model in batches of alike length. Parameters and errors as of `read`; an error says which
        pair it is about, and none is read then.
        """
        names = [layers] if isinstance(layers, str) else [str(layer) for layer in layers]
        self._refuse_unknown(names)
        if tokens not in KINDS:
            raise Refusal(f"no token is of kind {tokens!r}: ask for {', '.join(KINDS)}")
        ready = [self._prepared(number, *pair) for number, pair in enumerate(pairs)]
        order = sorted(range(len(ready)), key=lambda number: len(ready[number].ids))
        found: dict[int, torch.Tensor] = {}
        with _threads(self.threads if self.model.device.type == "cpu" else None):
            for first in range(0, len(order), self.batch_size):
                chosen = order[first : first + self.batch_size]
                found |= zip(
                    chosen, self._pass([ready[number] for number in chosen], names, KINDS[tokens]), strict=True
                )
        counts = torch.tensor([found[number].shape[1] for number in range(len(ready))], dtype=torch.int64)
        longest, width = max(counts.tolist(), default=0), self.model.config.text_config.hidden_size
        states = torch.zeros(len(ready), len(names), longest, width, dtype=self.model.dtype)
        for number, one_ltw in found.items():
            states[number, :, : counts[number]] = one_ltw
        return states, torch.arange(longest) < counts[:, None]

    def see(self, image: Picture, instruction: str, layers: Sequence[str]) -> "Seen":
        """States of one picture and instruction at some layers, of all kept tokens in the order of the sequence.

        For who needs several kinds of tokens of one pass. Parameters and errors as of `read`.
        """
        self._refuse_unknown(layers)
        ready = self._prepared(0, image, instruction)
        with _threads(self.threads if self.model.device.type == "cpu" else None):
            (states_ltw,) = self._pass([ready], layers, KINDS["all"])
        masks = self.conditioner.collate([ready]).masks
        place = torch.cat([masks[kind][0].nonzero()[:, 0] for kind in KINDS["all"]])
        order = place.argsort()
        kinds = {kind: masks[kind][0][place[order]] for kind in ("image", "instruction", "template")}
        return Seen(tuple(layers), states_ltw[:, order], kinds)

    def describe(self, image: Picture, instruction: str, max_new_tokens: int) -> str:
        """What the model itself writes, greedily, under the template that its states are read with.

        Parameters and errors as of `read`; the answer is cut off after ``max_new_tokens``.
        """
        from extract.decoding import ask

        batch = self.conditioner.collate([self._prepared(0, image, instruction)], padding_side="left")
        with _threads(self.threads if self.model.device.type == "cpu" else None):
            return ask(self.model, batch, self.conditioner.tokenizer, max_new_tokens)[0].text.strip()

    def _refuse_unknown(self, layers: Sequence[str]) -> None:
        if unknown := [name for name in layers if name not in self.layers] or ["(none)"] * (not layers):
            raise Refusal(f"layer {unknown[0]!r} is not in this model: it has {', '.join(self.layers)}")

    def _pass(self, ready: Sequence[Prepared], layers: Sequence[str], kinds: Sequence[str]) -> list[torch.Tensor]:
        """The states of a batch, of each sample ``[l, t, w]``, on the CPU."""
        batch = self.conditioner.collate(ready)
        counts_bk, keep = kept_tokens(batch, kinds)
        batch = batch.to(self.model.device)
        hidden_lnw = single_pass(self.model, batch.inputs, layers, keep=keep.to(self.model.device)).hidden.cpu()
        return list(hidden_lnw.split(counts_bk.sum(1).tolist(), dim=1))

    def _prepared(self, number: int, image: Picture, instruction: str) -> Prepared:
        """One pair as the model gets it; what is wrong with it is said with its number."""
        try:
            picture = _opened(image)
        except BadSample as bad:
            raise Refusal(
                f"the picture of pair {number} ({_named(image)}) cannot be used: {bad}; give one that Pillow reads "
                "whole, such as a JPEG or PNG"
            ) from None
        try:
            if not isinstance(instruction, str):
                raise BadSample(EMPTY_PROMPT, f"it is a {type(instruction).__name__}")
            asked = self.conditioner.encode(instruction.strip())
        except BadSample as bad:
            raise Refusal(
                f"the instruction of pair {number} ({instruction!r}) cannot be used: {bad}; say in words what to edit"
            ) from None
        if (count := int(asked.query.sum())) > self.max_prompt_tokens:
            raise Refusal(
                f"the instruction of pair {number} ({instruction[:40]!r}…) is too long: {count} tokens, "
                f"{self.max_prompt_tokens} are allowed; shorten it or give a larger max_prompt_tokens"
            )
        return self.conditioner.prepare(picture, instruction.strip(), str(number))


@dataclass(frozen=True)
class Seen:
    """One picture and instruction as the model saw them; made by `Encoder.see`."""

    layers: tuple[str, ...]
    states: torch.Tensor
    """``[l, t, w]`` on the CPU, in the model's dtype; tokens in the order of the sequence."""
    kinds: Mapping[str, torch.Tensor]
    """Bool ``[t]`` of ``image``, ``instruction`` and ``template``."""

    def tokens(self, layers: Sequence[str], kind: str) -> torch.Tensor:
        """``[l, t, w]`` of tokens of one of `KINDS` at some of the layers, in the order in which `Encoder.read` gives
        them.
        """
        text = ~self.kinds["image"]
        masks = {**self.kinds, "text": text}
        order = torch.cat([masks[one].nonzero()[:, 0] for one in KINDS[kind]])
        return self.states[[self.layers.index(layer) for layer in layers]][:, order]


def _find(identity: Mapping[str, Any], model: str | os.PathLike | None, revision: str | None) -> Path:
    """The checkpoint's folder."""
    named = identity["model"] if model is None else os.fspath(model)
    mend = "give model='/path/to/its/folder' or model='its/hub-id'"
    # A bare name was a folder's: the hub might know something else by it.
    if model is None and named != POCKET and "/" not in named and not Path(named).is_dir():
        raise Refusal(
            f"the store's model was a folder named {named!r}, and there is none of that name here (a store keeps only "
            f"the name of a local folder): {mend}"
        )
    try:
        return find_checkpoint(named, identity["revision"] if model is None else revision)
    except Refusal as refusal:
        raise Refusal(f"the store's model is not found: {refusal}; {mend}") from refusal


def _device(identity: Mapping[str, Any], asked: str | None) -> torch.device:
    if asked is not None:
        return find_device(asked)
    own = identity.get("device", "auto")
    return find_device("auto" if own == "cuda" and not torch.cuda.is_available() else own)


def _is_drawn(identity: Mapping[str, Any]) -> bool:
    """Whether the weights are a control's, of no checkpoint."""
    return identity.get("control", {}).get("name") == RANDOM_WEIGHTS


def _conditioner(identity: Mapping[str, Any], folder: Path) -> Conditioner:
    """What makes model inputs, by the identity's template and picture size."""
    config, conditioning = AutoConfig.from_pretrained(folder), identity["conditioning"]
    editor = None if conditioning == "native" else editor_of(conditioning, family_of(config))
    processor = load_processor(folder)
    made = Conditioner(processor, identity["template"], identity["positions"], config, editor)
    # A run's --max-pixels is known by the settings that it made; in all others `_refuse_others` allows no difference.
    own = processor_settings(made)
    for name in SIZES:
        if own.get(name) != identity["processor"].get(name):
            setattr(processor.image_processor, name, identity["processor"].get(name))
    return made


def _refuse_others(identity: Mapping[str, Any], folder: Path, conditioner: Conditioner) -> None:
    """Refuse a checkpoint that is not the identity's, by what its files hold."""
    found = {
        "weights": weight_hashes(folder, _is_drawn(identity)),
        "tokenizer": {"tokenizer.json": file_hash(folder / "tokenizer.json")},
        "processor": processor_settings(conditioner),
    }
    wanted = {**identity, "tokenizer": {"tokenizer.json": identity["tokenizer"]}}
    for part, here in found.items():
        there = wanted[part]
        if other := sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key)):
            raise Refusal(
                f"{folder} is not the model of the store: {part} {other[0]} is {here.get(other[0])!r} here and "
                f"{there.get(other[0])!r} there; give model= the checkpoint that the store was made with"
            )


def _warn_of_others(identity: Mapping[str, Any], conditioner: Conditioner, device: torch.device) -> None:
    """Say what may change the last bits of states."""
    here = {"device": device.type, **library_versions(conditioner)}
    there = {"device": identity.get("device"), **identity.get("libraries", {})}
    if other := [
        f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]
    ]:
        warnings.warn(f"states may differ from the store's in their last bits: {'; '.join(other)}", stacklevel=3)


def upright_size(image: Picture) -> tuple[int, int]:
    """Width and height in pixels of a picture that `Encoder.read` has read: turned upright by its EXIF."""
    return _opened(image).size


def _opened(image: Picture) -> Image.Image:
    """The picture as upright RGB (raises `BadSample`)."""
    if isinstance(image, Image.Image):
        return pixels(image, checked_picture(image))
    if isinstance(image, bytes):
        return decode(image)
    try:
        encoded = Path(image).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise BadSample("it cannot be opened", getattr(error, "strerror", None) or str(error)) from error
    return decode(encoded)


def _named(image: Any) -> str:
    """A picture as messages name it."""
    if isinstance(image, bytes):
        return f"{len(image)} bytes"
    if isinstance(image, Image.Image):
        return f"{image.mode}, {image.width}×{image.height}"
    return repr(image)[:200]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many torch threads within; as many as there are if null."""
    own = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(own)
