"""Training an editor's transformer by flow matching: LoRA on box overlays, or every weight of a small one.

Shape suffixes: b sample, t token, c channel.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import store
from edit import cache
from edit.ahead import read_ahead
from edit.checkpoints import load_checkpoint, save_checkpoint
from edit.config import TrainConfig
from edit.editor import Editor, pack
from edit.overlay import rescaled
from edit.pairs import Pair, Pairs
from edit.states import StoredStates
from store.errors import Refusal
from store.reader import Store

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Where the adapters go: the picture stream's attention of every block [ABP, appendix]."""
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LORA_SETTINGS = "lora.json"
LOG = "log.jsonl"
AHEAD = 4
"""Batches that are read while a GPU is at work."""
VALIDATION_RANK = 1 << 20
"""Draws of noise for validation are those of a process that there never is."""
FREE = ("editor", "store", "data", "out", "steps", "gradient_checkpointing", "threads")
FREE += ("checkpoint_every", "validate_every", "validation")
"""Settings that may change where a training goes on: names of what is known by its content, and how it is run."""
LOSS_SAMPLES = 8
"""Times as many samples give the validation loss as are edited."""


@dataclass(frozen=True)
class Batch:
    """What the transformer is taught on."""

    source: Tensor
    """Latents before the edit ``[b, c, h, w]``, normalised, bfloat16."""
    target: Tensor
    """After it."""
    states: Tensor
    """Conditions ``[b, t, w]``."""
    mask: Tensor
    """bool ``[b, t]``."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch there."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Batches:
    """Batches by step: which samples, is a function of the seed and the step alone."""

    def __init__(self, config: TrainConfig, kept: cache.Cache, states: StoredStates, rank: int, ranks: int):
        self.config, self.kept, self.states, self.rank, self.ranks = config, kept, states, rank, ranks
        self._buckets = kept.buckets(sorted(kept.sizes))
        if not any(len(members) >= self.across for members in self._buckets.values()):
            raise Refusal(
                f"no working size has the {self.across} samples of a batch: take more samples or a smaller --batch-size"
            )

    @property
    def across(self) -> int:
        """Samples of a batch over all processes."""
        return self.config.batch_size * self.ranks

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of an epoch, in order; what does not fill one is left out this time."""
        rng = np.random.default_rng([self.config.seed, number])
        batches = []
        for size in sorted(self._buckets):
            members = rng.permutation(self._buckets[size])
            batches += [members[i : i + self.across] for i in range(0, len(members) - self.across + 1, self.across)]
        return [batches[place].tolist() for place in rng.permutation(len(batches))]

    def __call__(self, start: int, stop: int, device: torch.device) -> Iterator[Batch]:
        """Batches ``start`` to ``stop``, for a device."""
        own = (samples[self.rank :: self.ranks] for samples in self._order(start, stop))
        return read_ahead(self.read, own, AHEAD, device)

    def _order(self, start: int, stop: int) -> Iterator[list[int]]:
        per_epoch = len(self.epoch(0))
        for number in range(start // per_epoch, -(-stop // per_epoch)):
            first = number * per_epoch
            yield from self.epoch(number)[max(start - first, 0) : min(stop - first, per_epoch)]

    def read(self, samples: Sequence[int]) -> Batch:
        """The batch of these samples, which are of one working size."""
        states, mask = self.states.read(samples)
        return Batch(*self.kept.read(samples), states[:, 0].to(held_as(self.config)), mask)


def flow_loss(transformer: nn.Module, batch: Batch, noise: Tensor, sigma: Tensor, change_weight: float = 0.0) -> Tensor:
    """Squared error of the predicted velocity, per sample ``[b]``.

    The noisy target is ``(1 - sigma) · target + sigma · noise`` and its velocity ``noise - target``, as
    Qwen-Image's scheduler steps along it; the source's latents follow it in the sequence, as the pipeline has them.
    """
    height, width = batch.target.shape[2:]
    source_btc, target_btc, noise_btc = (pack(one).float() for one in (batch.source, batch.target, noise))
    along = sigma[:, None, None]
    noisy = (1 - along) * target_btc + along * noise_btc

    grid = (1, height // 2, width // 2)
    predicted = transformer(
        hidden_states=torch.cat([noisy, source_btc], 1).to(batch.states.dtype),
        timestep=sigma.to(batch.states.dtype),
        encoder_hidden_states=batch.states,
        encoder_hidden_states_mask=None if batch.mask.all() else batch.mask,
        img_shapes=[[grid, grid]] * len(sigma),
        return_dict=False,
    )[0][:, : noisy.shape[1]]
    error_bt = (predicted.float() - (noise_btc - target_btc)).square().mean(2)
    if change_weight:
        changed_bt = (target_btc - source_btc).square().mean(2) > 0.1
        weight_bt = 1 + change_weight * changed_bt
        error_bt = error_bt * weight_bt / weight_bt.mean(1, keepdim=True)
    return error_bt.mean(1)


def draw(seed: int, step: int, rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Noise like the latents, and times ``[b]`` in (0, 1), logit-normal as Qwen-Image was trained."""
    drawn = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(drawn >> np.uint64(1)))
    sigma = torch.sigmoid(torch.randn(len(like), generator=generator))
    return torch.randn(like.shape, generator=generator), sigma


def add_lora(transformer: QwenImageTransformer2DModel, config: TrainConfig) -> None:
    """Freeze the transformer and add adapters, in place."""
    transformer.requires_grad_(False)
    torch.manual_seed(config.seed)
    transformer.add_adapter(
        LoraConfig(r=config.rank, lora_alpha=config.alpha, init_lora_weights="gaussian", target_modules=list(TARGETS))
    )
    for parameter in trained(transformer):
        parameter.data = parameter.data.float()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizers(transformer: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest; each group keeps its peak rate."""
    decay = config.weight_decay
    named = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    matrices = [p for name, p in named if config.optimizer == "muon" and p.ndim == 2 and "transformer_blocks" in name]
    taken, found = set(map(id, matrices)), []
    if matrices:
        found.append(
            torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    others = [parameter for _, parameter in named if id(parameter) not in taken]
    peak = config.learning_rate / (3 if matrices else 1)
    found.append(torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay))
    for group in (group for optimizer in found for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return found


def rate(step: int, config: TrainConfig) -> float:
    """The learning rate's share of its peak: linear warm-up, then a cosine to zero."""
    along = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return (step + 1) / config.warmup if step < config.warmup else 0.5 * (1 + math.cos(math.pi * along))


def choose(opened: Store, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Rows of the samples to train on and to validate on."""
    samples = opened.samples.with_row_index("number").filter("valid")
    if config.tasks:
        if unknown := set(config.tasks) - set(samples["task"]):
            there = ", ".join(sorted(set(samples["task"])))
            raise Refusal(f"{opened.path} has no samples of the task {sorted(unknown)[0]!r}: it has {there}")
        samples = samples.filter(pl.col("task").is_in(config.tasks))
    if config.train == "lora":
        samples = samples.filter(pl.col("x1").is_not_null())
    training = samples.filter(split="train")["number"].to_list()[: config.limit]
    held_out = samples.filter(split="test")["number"].to_list()[: config.validation * LOSS_SAMPLES]
    if not training or not held_out:
        raise Refusal(f"{opened.path} has {len(training)} training and {len(held_out)} held-out samples of that kind")
    return training, held_out


class Average:
    """A moving average of trained weights, by which a model can be exchanged for a while."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.kept = [parameter.detach().clone() for parameter in parameters]

    def update(self, step: int) -> None:
        """After an optimizer step; early ones count more, so that the first weights are soon forgotten."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.kept, [parameter.detach() for parameter in self.parameters], weight)

    def exchange(self) -> None:
        """Put the average where the weights are, and the other way round."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.data, kept.data = kept.data, parameter.data


def train(config: TrainConfig) -> None:
    """Train, go on from the last checkpoint, and write what `Editor.load` and stock diffusers read."""
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = accelerate(config)
    opened = store.open(config.store)
    states = StoredStates(opened, [config.layer])
    training, held_out = choose(opened, config)
    pairs = Pairs(opened, config.data)
    drawn = cache.Drawn(config.overlay, config.bystanders) if config.train == "lora" or config.bystanders else None
    editor = Editor.load(config.editor, held_as(config), accelerator.device, nf4=config.base == "nf4")
    kept, ranks = {}, (accelerator.process_index, accelerator.num_processes)
    for name, samples in (("train", training), ("test", held_out)):
        where = config.out / "latents"
        cache.build(where, opened, pairs, editor, samples, drawn, *ranks)
        accelerator.wait_for_everyone()
        kept[name] = cache.load(where, opened, editor, samples, drawn)
    transformer = editor.pipeline.transformer
    if config.train == "lora":
        add_lora(transformer, config)
    else:
        transformer.float().requires_grad_(True)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.base == "fp8":
        transformer.enable_layerwise_casting(
            torch.float8_e4m3fn,
            torch.bfloat16,
            skip_modules_pattern=("lora", "norm", "pos_embed"),
        )
    parameters = trained(transformer)
    optimizers = make_optimizers(transformer, config)
    average = Average(parameters, config.average) if config.average else None
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoint = config.out / "checkpoint.safetensors"
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings |= {"weights of the editor": editor.weights, "store": opened.plan.identity_hash}
    kept_average = average.kept if average else ()
    start = load_checkpoint(checkpoint, parameters, optimizers, kept_average, settings)
    model, *optimizers = accelerator.prepare(transformer, *optimizers)
    batches = Batches(config, kept["train"], states, accelerator.process_index, accelerator.num_processes)
    validation = Validation(config, kept["test"], states, editor, pairs)
    began, losses = time.time(), []
    bar = tqdm(
        batches(start * config.accumulate, config.steps * config.accumulate, accelerator.device),
        initial=start * config.accumulate,
        total=config.steps * config.accumulate,
        unit="batch",
        desc="train",
        mininterval=5,
        disable=not accelerator.is_main_process,
    )
    with Log(config, start, accelerator.is_main_process) as log:
        for number, batch in enumerate(bar, start * config.accumulate):
            step = number // config.accumulate
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * rate(step, config)
            noise, sigma = draw(config.seed, number, ranks[0], batch.target)
            batch, noise, sigma = (one.to(accelerator.device) for one in (batch, noise, sigma))
            with accelerator.accumulate(model), mixed(config, accelerator.device):
                loss = flow_loss(model, batch, noise, sigma, config.change_weight).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, config.clip)
                    if not torch.isfinite(norm):
                        raise FloatingPointError(f"the gradient is not finite at step {step}")
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if (number + 1) % config.accumulate:
                continue
            if average:
                average.update(step)
            done = step + 1
            due = done == config.steps
            if accelerator.is_main_process and (done % config.checkpoint_every == 0 or due):
                save_checkpoint(checkpoint, done, parameters, optimizers, kept_average, settings)
            if accelerator.is_main_process and (done % config.validate_every == 0 or due):
                if average:
                    average.exchange()
                found = validation(done)
                if average:
                    average.exchange()
                log.write(step=done, seconds=round(time.time() - began), loss=round(float(np.mean(losses)), 5), **found)
                bar.set_postfix(loss=f"{np.mean(losses):.4f}", held_out=f"{found['held_out']:.4f}")
                losses.clear()
    if accelerator.is_main_process:
        if average:
            average.exchange()
        write(config, opened, editor)


def accelerate(config: TrainConfig) -> Accelerator:
    """What joins the processes that train together; they are refused where they do not know of each other."""
    # The text stream of the last block leads nowhere: its weights have no gradient, and several processes must know it.
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.train == "all")
    accelerator = Accelerator(gradient_accumulation_steps=config.accumulate, kwargs_handlers=[unused])
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise Refusal(
            f"{started} processes were started and accelerate takes each to be alone: on CPUs, set ACCELERATE_USE_CPU=1"
        )
    return accelerator


@contextmanager
def mixed(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Computing in bfloat16 on weights that are held otherwise.

    On a CPU attention is plain products and a softmax, in bfloat16 as well: torch's fused kernel takes longer there
    than all else in a small transformer's step.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=config.base != "float32"))
        if device.type == "cpu":
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def held_as(config: TrainConfig) -> torch.dtype:
    """The dtype that the editor is loaded in."""
    return torch.float32 if config.base == "float32" else torch.bfloat16


class Log:
    """log.jsonl: the settings of every start, then a line a validation."""

    def __init__(self, config: TrainConfig, start: int, main: bool):
        self._file = (config.out / LOG).open("a") if main else None
        if self._file:
            self.write(from_step=start, **asdict(config))

    def write(self, **record: object) -> None:
        """One line, on the disk at once."""
        self._file.write(json.dumps(record, default=str) + "\n")
        self._file.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


class Validation:
    """The loss on held-out samples, of fixed noise and times, and pictures of some of them edited."""

    def __init__(
        self,
        config: TrainConfig,
        kept: cache.Cache,
        states: StoredStates,
        editor: Editor,
        pairs: Pairs,
    ):
        self.config, self.kept, self.states, self.editor = config, kept, states, editor
        self.shown = [pair for pair in pairs.read(sorted(kept.sizes)[: config.validation]) if isinstance(pair, Pair)]

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Validate; pictures go to ``validation/step-NNNNNN.png``, one row a sample: before, wanted, made."""
        transformer = self.editor.pipeline.transformer
        device, losses = transformer.device, []
        for size, members in sorted(self.kept.buckets(sorted(self.kept.sizes)).items()):
            states, mask = self.states.read(members)
            batch = Batch(*self.kept.read(members), states[:, 0].to(held_as(self.config)), mask)
            noise, sigma = draw(self.config.seed, size[0] * 10_000 + size[1], VALIDATION_RANK, batch.target)
            with mixed(self.config, device):
                losses.append(flow_loss(transformer, batch.to(device), noise.to(device), sigma.to(device)))
        rows = [self._row(pair) for pair in self.shown]
        sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
        for number, row in enumerate(rows):
            sheet.paste(row, (0, sum(one.height for one in rows[:number])))
        folder = self.config.out / "validation"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{step:06d}.png")
        return {"held_out": round(float(torch.cat(losses).mean()), 5)}

    def _row(self, pair: Pair) -> Image.Image:
        states, mask = self.states.read([pair.sample])
        seen = self.editor.resized(pair.source)
        if self.config.train == "lora":
            seen = self.config.overlay.draw(seen, rescaled(pair.box, pair.source.size, seen.size))
        # What is trained is held in float32, the rest of the editor is not.
        with mixed(self.config, self.editor.pipeline.device):
            made = self.editor.edit(seen, states[0, 0][mask[0]], self.config.seed)
        pictures = [seen, self.editor.resized(pair.target), made]
        row = Image.new("RGB", (sum(one.width for one in pictures), seen.height))
        for number, one in enumerate(pictures):
            row.paste(one, (number * seen.width, 0))
        return row


def write(config: TrainConfig, opened: Store, editor: Editor) -> None:
    """The LoRA with its settings, or the whole transformer."""
    transformer = editor.pipeline.transformer
    if config.train == "all":
        transformer.to(torch.bfloat16).save_pretrained(config.out / "transformer")
        print(f"saved {config.out / 'transformer'}")
        return
    unfinished = config.out / "lora.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    layers = {name: value.to(torch.bfloat16) for name, value in get_peft_model_state_dict(transformer).items()}
    QwenImageEditPipeline.save_lora_weights(unfinished, transformer_lora_layers=layers)
    settings = {name: getattr(config, name) for name in ("layer", "rank", "alpha", "editor", "steps", "seed")}
    settings |= {"overlay": config.overlay.as_dict(), "store": opened.plan.identity_hash}
    (unfinished / LORA_SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    for path in sorted(unfinished.iterdir()):
        path.replace(config.out / path.name)
    unfinished.rmdir()
    print(f"saved {config.out / LORA_WEIGHTS}")
