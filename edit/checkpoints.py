"""Checkpoints of a training: weights and optimizer state in one safetensors file, whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

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
) -> None:
    """Write all that going on needs; an interrupted write leaves the one before."""
    tensors = {f"weight.{index}": value.detach() for index, value in enumerate(parameters)}
    tensors |= {f"average.{index}": value for index, value in enumerate(average)}
    tensors |= optimizer_tensors(optimizers)
    unfinished = path.with_suffix(".partial")
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, unfinished, {"step": str(step)})
    unfinished.replace(path)


def load_checkpoint(
    path: Path,
    parameters: Sequence[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    average: Sequence[Tensor] = (),
) -> int:
    """Restore, in place, what `save_checkpoint` wrote; the step to go on from, 0 where there is none.

    Raises
    ------
    Refusal
        It is of a training of other weights.
    """
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, places in (("weight", parameters), ("average", average)):
            for index, place in enumerate(places):
                found = tensors.get(f"{name}.{index}")
                if found is None or found.shape != place.shape:
                    raise Refusal(f"{path} is of a training with other settings: remove it, or give another --out")
                place.copy_(found)
    restore_optimizers(tensors, optimizers)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
