"""The training of one stack of proxies that read the same states: batch order, schedule, loss, prediction."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from probes import boxes
from probes.config import ProbeConfig
from probes.data import Scenes, States
from probes.qformer import QFormer
from probes.specs import Spec

FINAL_LR = 0.3
"""The cosine ends at this share of the peak learning rate [ABP §4.4]."""


def learning_rate(step: int, config: ProbeConfig) -> float:
    """Learning rate at a step: linear rise over ``warm_up``, then a cosine down to 30 % at the last step."""
    if step < config.warm_up:
        return config.lr * (step + 1) / config.warm_up
    share = (step - config.warm_up) / max(1, config.steps - 1 - config.warm_up)
    return config.lr * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * share)) / 2)


def batch_order(rows: np.ndarray, config: ProbeConfig, seed: int) -> Iterator[np.ndarray]:
    """The rows of each step: shuffled epochs end to end, the same for every proxy of a seed."""
    generator, queue = np.random.default_rng([seed, 1]), np.empty(0, rows.dtype)
    for _ in range(config.steps):
        while len(queue) < config.batch:
            queue = np.concatenate([queue, generator.permutation(rows)])
        yield queue[: config.batch]
        queue = queue[config.batch :]


class Reader:
    """Hands a stack of proxies what each of them reads."""

    def __init__(self, states: States, specs: Sequence[Spec], device: str):
        self.states, self.specs, self.device = states, specs, device
        self.index_pl = torch.tensor([[states.layers.index(name) for name in spec.layers] for spec in specs])

    def __call__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """States (p, b, l, t, w) as float32, and masks (p, b, t)."""
        states_bltw, masks = self.states.batch(rows)
        states_lbtw = states_bltw.to(self.device).float().transpose(0, 1)
        mask_pbt = torch.stack([masks[spec.tokens] for spec in self.specs])
        return states_lbtw[self.index_pl].transpose(1, 2), mask_pbt.to(self.device)


@torch.no_grad()
def predict(model: QFormer, read: Reader, rows: np.ndarray, batch: int) -> Tensor:
    """Boxes (p, n, 4) of all proxies for ``rows``, clamped to the image, on the CPU."""
    pieces = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return torch.cat([model(*read(piece)).clamp(0, 1).cpu() for piece in pieces], dim=1)


def train_stack(
    specs: Sequence[Spec],
    states: States,
    scenes: Scenes,
    config: ProbeConfig,
    seed: int,
    *,
    device: str = "cpu",
    watch: Callable[[int, Tensor], None] | None = None,
    tick: Callable[[int], None] | None = None,
) -> tuple[QFormer, Reader]:
    """Train the proxies of ``specs``, all with the same number of layers, side by side.

    Adam is elementwise and the losses are summed, so each becomes what it would have become alone.

    Parameters
    ----------
    watch : callable, optional
        Called with the step and the boxes (p, n, 4) for ``scenes.watch``: at step 0, every ``watch_every``
        steps, and at the end.
    tick : callable, optional
        Called with the number of steps done, after each.
    """
    read = Reader(states, specs, device)
    first, _ = read(scenes.train[:1])
    model = QFormer(len(specs), first.shape[2], first.shape[-1], **config.sizes, seed=seed).to(device)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    true_ps4 = torch.from_numpy(scenes.boxes_s4).expand(len(specs), -1, -1).clone()
    shuffled = np.random.default_rng([seed, 2]).permutation(scenes.train)
    for p, spec in enumerate(specs):
        if spec.permuted:
            true_ps4[p, scenes.train] = torch.from_numpy(scenes.boxes_s4[shuffled])

    for step, rows in enumerate(batch_order(scenes.train, config, seed)):
        if watch and step % config.watch_every == 0:
            watch(step, predict(model, read, scenes.watch, config.batch))
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, config)
        predicted_pb4 = model(*read(rows))
        loss_pb = boxes.loss(predicted_pb4, true_ps4[:, rows].to(device), step, config.l1_steps)
        adam.zero_grad()
        loss_pb.mean(1).sum().backward()
        adam.step()
        if tick:
            tick(step + 1)
    if watch:
        watch(config.steps, predict(model, read, scenes.watch, config.batch))
    return model.eval(), read
