"""The training of one stack of probes: schedule, loss, a step, prediction, and its state for a checkpoint."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.config import Recipe
from probes.data import Views
from probes.pooled import AttentionProbe, LinearProbe, MLPProbe
from probes.qformer import QFormer
from probes.specs import Spec
from probes.stacked import Stacked, stack, take
from probes.targets import Target

FINAL_LR = 0.3
"""The cosine ends at this share of the peak learning rate [ABP §4.4]."""

AT_ONCE = 28
"""Most probes of a stack on a CPU: more leave its caches, fewer leave it waiting for Python."""
ANSWERED = 128
"""Samples that are answered at once."""

KINDS: dict[str, type[Stacked]] = {
    "qformer": QFormer,
    "linear": LinearProbe,
    "mlp": MLPProbe,
    "attention": AttentionProbe,
}


@dataclass(frozen=True)
class Job:
    """One probe to be trained: a spec and a seed."""

    spec: Spec
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.spec.name}-seed{self.seed}"

    @property
    def shape(self) -> tuple:
        """Jobs of one shape can be stacked, and of one shape and the same layers read the same."""
        spec = self.spec
        read = (spec.source, spec.tokens, spec.without, spec.keys, len(spec.layers))
        return (spec.kind, *read, spec.target, spec.share)


def layers_of(jobs: Sequence[Job], source: str, order: Sequence[str]) -> list[str]:
    """The layers of a source that jobs read, in the order of the pass."""
    read = {name for job in jobs if job.spec.source == source for name in job.spec.layers}
    return [name for name in order if name in read]


def tokens_of(jobs: Sequence[Job]) -> str:
    """The tokens that are read for jobs: image or text where they need no others."""
    kinds = {{"image": "image", "all": "all"}.get(job.spec.tokens, "text") for job in jobs}
    return kinds.pop() if len(kinds) == 1 else "all"


def learning_rate(step: int, config: Recipe) -> float:
    """Learning rate at a step: linear rise over ``warm_up``, then a cosine down to 30 % at the last step."""
    if step < config.warm_up:
        return config.lr * (step + 1) / config.warm_up
    share = (step - config.warm_up) / max(1, config.steps - 1 - config.warm_up)
    return config.lr * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * share)) / 2)


def make(kind: str, sizes: dict[str, int], seeds: Sequence[int], layers: int, width: int, outputs: int) -> Stacked:
    """An untrained stack of a kind: ``layers`` VLM layers of ``width`` in, ``outputs`` numbers out."""
    return KINDS[kind](seeds, layers, width, outputs, **sizes)


class Stack:
    """Probes of one shape side by side: g groups that read their own layers, s probes in each.

    Parameters
    ----------
    jobs
        All of one ``Job.shape``, group after group, every group as large.
    width
        Width of a VLM state.
    target
        Theirs.
    labels
        What each is taught, like ``target.labels``, by (target, labels, seed).
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        width: int,
        target: Target,
        labels: dict[tuple, np.ndarray],
        config: Recipe,
        device: str,
    ):
        self.jobs, self.target, self.config, self.device = list(jobs), target, config, device
        self.spec = jobs[0].spec
        self.groups = list(dict.fromkeys(job.spec.layers for job in jobs))
        outputs, kind = target.outputs, self.spec.kind
        seeds = [job.seed for job in jobs]
        self.model = make(kind, config.sizes(kind), seeds, len(self.spec.layers), width, outputs).to(device)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.labels = [labels[job.spec.target, job.spec.labels, job.seed] for job in jobs]

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32

    def _mixed(self) -> contextlib.AbstractContextManager:
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def raw(self, views: Views) -> Tensor:
        """Raw outputs (p, b, o) of all its probes."""
        spec = self.spec
        view = views.view(spec.source, spec.tokens, self.groups, spec.keys, spec.without)
        with self._mixed():
            return self.model(view)

    def train(self, views: Views, step: int) -> Tensor:
        """One step of each probe, whose loss (p, b) is returned; Adam is elementwise, so each goes its own way."""
        true = torch.from_numpy(np.stack([labels[views.read.samples] for labels in self.labels])).to(self.device)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(step, self.config)
        loss_pb = self.target.loss(self.raw(views), true, step, self.config.l1_steps)
        loss_pb.mean(1).sum().backward()
        self.adam.step()
        # Gradients are not kept between stacks: together they take as much memory as the weights.
        self.adam.zero_grad(set_to_none=True)
        return loss_pb.detach()

    @torch.inference_mode()
    def answer(self, views: Views) -> Tensor:
        """Raw outputs (p, b, o) on the CPU, for prediction."""
        return self.raw(views).cpu()

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer state, to go on from."""
        found = {f"weights/{name}": value for name, value in self.model.state_dict().items()}
        for n, state in self.adam.state_dict()["state"].items():
            found |= {f"adam/{n}/{name}": value for name, value in state.items()}
        return found

    def restore(self, found: dict[str, Tensor]) -> None:
        """Go on from ``state``."""
        self.model.load_state_dict(
            {name.removeprefix("weights/"): value for name, value in found.items() if "weights/" in name}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in found.items():
            if name.startswith("adam/"):
                _, n, part = name.split("/")
                state.setdefault(int(n), {})[part] = value
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})

    def take(self, p: int) -> dict[str, Tensor]:
        """The weights of its p-th probe, on the CPU."""
        return {name: value.cpu() for name, value in take(self.model, p).items()}

    def fill(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Take over trained weights, of a probe each."""
        self.model.load_state_dict(stack(states))


def stacks_of(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs as stacks of at most ``most`` probes: of one shape, groups of equal size, probes of a group together."""
    shapes: dict[Any, dict[tuple, list[Job]]] = {}
    for job in jobs:
        shapes.setdefault(job.shape, {}).setdefault(job.spec.layers, []).append(job)
    made = []
    for groups in shapes.values():
        by_size: dict[int, list[list[Job]]] = {}
        for group in groups.values():
            for start in range(0, len(group), most):
                part = group[start : start + most]
                by_size.setdefault(len(part), []).append(part)
        for size, parts in by_size.items():
            count = -(-len(parts) // (most // size))
            for some in np.array_split(np.arange(len(parts)), count):
                # A group that was cut in two must not be joined again: its parts read the same layers.
                made += _apart([parts[i] for i in some])
    return made


def _apart(parts: list[list[Job]]) -> list[list[Job]]:
    stacks: list[list[list[Job]]] = []
    for part in parts:
        free = next((one for one in stacks if all(other[0].spec.layers != part[0].spec.layers for other in one)), None)
        stacks.append([part]) if free is None else free.append(part)
    return [[job for part in one for job in part] for one in stacks]
