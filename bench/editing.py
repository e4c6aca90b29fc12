"""LoRA steps from stored states and kept latents, and edits in two stages, beside what they replace.

The editor has the pocket editor's classes and shape, and drawn weights, which are as fast as trained ones.
"""

from dataclasses import replace
from pathlib import Path

import torch

import store
from bench.measure import Row, Turns, figure_row, in_process, own_memory, pace_row, quiet, time_row
from bench.pocket import Pocket
from edit import cache
from edit.config import TrainConfig
from edit.editor import Editor
from edit.pairs import Pairs
from edit.pocket.build import SETTINGS, build_pipeline, build_vae
from edit.stages import TwoStage
from edit.states import StoredStates
from edit.train import Batch, Batches, add_lora, choose, draw, flow_loss, held_as, make_optimizers, mixed, trained
from extract.boxes import generate_boxes
from extract.encoder import Encoder
from extract.prompts import GROUND_TEMPLATE
from extract.sequence import Conditioner
from probes.config import TrainConfig as ProxyConfig
from probes.sweep import train as train_proxy
from probes.trained import load

PART = "editing"
STAGES_GOAL = 1.1
"""An edit with the box that the proxy finds over one without a box."""
ANSWER = 40
"""Most tokens of the VLM's answer when it is asked for a box."""


def measure(pocket: Pocket, turns: Turns, scratch: Path) -> list[Row]:
    """All rows of the scenes and the store of ``pocket``."""
    asked = pocket.config
    with quiet():
        pocket.new_store()
        pocket.fill_store()
        folder = scratch / "editor"
        build_pipeline(build_vae(), pocket.plan.width, 0).to(torch.bfloat16).save_pretrained(folder)
        SETTINGS.save(folder)
        config = TrainConfig(str(asked.store), str(asked.data), str(folder), scratch / "latents", batch_size=2)
        lora, encoder = (
            Lora(replace(config, gradient_checkpointing=False)),
            Encoder.of(pocket.plan.identity, asked.model),
        )
        rows = [*_steps(lora, encoder, turns), _memory(replace(config, batch_size=4))]
        return rows + _stages(lora, encoder, turns, scratch)


class Lora:
    """LoRA training of an editor, a step at a time."""

    def __init__(self, config: TrainConfig):
        self.config, self.opened = config, store.open(config.store)
        self.pairs, self.editor = Pairs(self.opened, config.data), Editor.load(config.editor, held_as(config))
        samples, _ = choose(self.opened, config)
        cache.build(config.out, self.opened, self.pairs, self.editor, samples, cache.Drawn(config.overlay))
        kept = cache.load(config.out, self.opened, self.editor, samples, cache.Drawn(config.overlay))
        self.batches = Batches(config, kept, StoredStates(self.opened, [config.layer]), 0, 1)
        self.transformer = self.editor.pipeline.transformer
        add_lora(self.transformer, config)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.optimizers = make_optimizers(self.transformer, config)

    def step(self, batch: Batch) -> None:
        """Learn from a batch."""
        noise, sigma = draw(self.config.seed, 0, 0, batch.target)
        with mixed(self.config, self.transformer.device):
            flow_loss(self.transformer, batch, noise, sigma).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained(self.transformer), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _steps(lora: Lora, encoder: Encoder, turns: Turns) -> list[Row]:
    """From the disk, and as without a store: the VLM and the autoencoder once more for each batch."""
    samples = lora.batches.epoch(0)[0]
    words = lora.opened.samples["instruction"]

    def again() -> None:
        pairs = list(lora.pairs.read(samples))
        seen = [(pair.source, words[pair.sample]) for pair in pairs]
        states, mask = encoder.read_many(seen, lora.config.layer)
        pictures = [lora.editor.resized(getattr(pair, side)) for side in ("source", "target") for pair in pairs]
        source, target = lora.editor.latents(pictures).clone().chunk(2)
        lora.step(Batch(source, target, states[:, 0], mask))

    seconds = turns.take({"kept": lambda: lora.step(lora.batches.read(samples)), "again": again})
    name = f"LoRA steps, batches of {lora.config.batch_size}"
    return [pace_row(PART, name, seconds["kept"], "VLM and autoencoder again each step", seconds["again"])]


def _memory(config: TrainConfig) -> Row:
    kept, computed = (in_process(_peak, replace(config, gradient_checkpointing=again)) for again in (False, True))
    name, baseline = f"peak memory of LoRA steps, batches of {config.batch_size}", "activations kept"
    note = "with gradient checkpointing; the whole process"
    return figure_row(PART, name, computed / 1e6, "MB", baseline, kept / 1e6, "less", note=note)


def _peak(config: TrainConfig) -> int:
    """Most bytes of this process after two steps."""
    lora = Lora(config)
    for batch in lora.batches(0, 2, lora.transformer.device):
        lora.step(batch)
    return own_memory("VmHWM")


def _stages(lora: Lora, encoder: Encoder, turns: Turns, scratch: Path) -> list[Row]:
    """One pass for the condition and the box, beside no box, and beside asking the VLM for the box first."""
    out = scratch / "proxies"
    train_proxy(ProxyConfig(lora.config.store, out, seeds=(0,), steps=1, batch=8, watch=4))
    proxy = load(next((out / "proxies").iterdir()))
    boxed = TwoStage(encoder, lora.editor, proxy=proxy, overlay=lora.config.overlay)
    plain = replace(boxed, overlay=None)
    grounding = Conditioner(encoder.conditioner.processor, GROUND_TEMPLATE, "mrope", encoder.model.config)
    (pair,) = lora.pairs.read(lora.batches.epoch(0)[0][:1])
    words = lora.opened.samples["instruction"][pair.sample]

    def asked() -> None:
        generate_boxes(encoder.model, grounding, [(pair.source, words)], max_new_tokens=ANSWER)
        boxed(pair.source, words, box=pair.box)

    bare, first = "the same edit without a box", "the VLM asked for the box first"
    seconds = turns.take(
        {"stages": lambda: boxed(pair.source, words), bare: lambda: plain(pair.source, words), first: asked}
    )
    name, note = "an edit in two stages", f"{lora.editor.settings.steps} denoising steps"
    return [
        time_row(PART, name, seconds["stages"], bare, seconds[bare], goal=STAGES_GOAL, note=note),
        time_row(PART, name, seconds["stages"], first, seconds[first]),
    ]
