"""Checkpoints of a training: weights and optimizer state in one safetensors file, whole or not at all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from extract.pocket.train import optimizer_tensors, restore_optimizers
from store.errors import Refusal


def save_checkpoint(
    path: Path,
    step: int,
    parameters: Sequence[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    average: Sequence[Tensor] = (),
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write all that going on needs, and the JSON-able settings that it has to be the same by.

    An interrupted write leaves the one before.
    """
    tensors = {f"weight.{index}": value.detach() for index, value in enumerate(parameters)}
    tensors |= {f"average.{index}": value for index, value in enumerate(average)}
    tensors |= optimizer_tensors(optimizers)
    about = {"step": str(step), "settings": json.dumps(dict(settings), default=str)}
    unfinished = path.with_suffix(".partial")
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, unfinished, about)
    unfinished.replace(path)


def load_checkpoint(
    path: Path,
    parameters: Sequence[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    average: Sequence[Tensor] = (),
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Restore, in place, what `save_checkpoint` wrote; the step to go on from, 0 where there is none.

    Raises
    ------
    Refusal
        It is of a training of other weights or by other settings.
    """
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        about = file.metadata()
    had, mend = json.loads(about.get("settings", "{}")), "remove it, or give another --out"
    for name, value in json.loads(json.dumps(dict(settings), default=str)).items():
        if had.get(name) != value:
            was = f"{name} {had[name]} (now {value})" if name in had else f"another {name}"
            raise Refusal(f"{path} is of a training with other settings, {was}: {mend}")
    tensors = load_file(path)
    with torch.no_grad():
        for name, places in (("weight", parameters), ("average", average)):
            for index, place in enumerate(places):
                found = tensors.get(f"{name}.{index}")
                if found is None or found.shape != place.shape:
                    raise Refusal(f"{path} is of a training with other settings: {mend}")
                place.copy_(found)
    restore_optimizers(tensors, optimizers)
    return int(about["step"])
