"""Training the pocket model from scratch on the CPU: answers to both prompts, with dense help from a tutor.

The language-model loss alone stays at chance for thousands of steps: nothing tells the model early which token an
object stands in. The tutor does. It is a set of linear heads on the image tokens (where is the object here, what is
it, how many stand to its left …) and on the last prompt token of grounding rows, dropped after training. It never
sees a row of the editing prompt beyond its image tokens, so that what a proxy finds there was put there by the model.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.ops import box_iou
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention, apply_rotary_pos_emb_vision

from extract.pocket.build import build_config, build_processor
from extract.pocket.lesson import IGNORE, MAX_RANK, WAYS, Batch, Lesson, Teacher
from extract.scenes.shapes import COLOURS, KINDS

TOLERANCE = 0.05  # of an image token: box errors below it are forgiven quadratically
LOSS_WEIGHTS = {
    "ground": 3.0,
    "describe": 1.0,
    "ground_instruction": 0.1,
    "describe_instruction": 0.1,
    "present": 0.5,
    "offset": 1.0,
    "look": 0.15,
    "rank": 0.2,
    "placed": 1.0,
    "cell": 0.1,
    "box": 1.0,
    "point": 0.5,
}


@dataclass(frozen=True)
class TrainConfig:
    """Train the pocket model from scratch (about two hours on one CPU core); resumes from its last checkpoint."""

    out: Path = Path("runs/pocket")
    """Folder for checkpoints, log.jsonl and the finished model."""
    steps: int = 4000
    """Optimizer steps."""
    pictures: int = 16
    """Pictures a step; each is encoded once."""
    branches: int = 4
    """Instructions a picture."""
    described: int = 2
    """Pictures a step that are described as well."""
    learning_rate: float = 3e-3
    """Peak rate of both optimizers (Muon for matrices, AdamW for the rest); linear warm-up, then to zero."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay_share: float = 0.6
    """Share of the steps, at the end, over which the rate falls to zero."""
    weight_decay: float = 0.02
    """Decoupled weight decay of matrices."""
    hard_share: float = 0.8
    """Share of hard scenes; the rest are easy and medium ones."""
    instruction_weight: float = 0.1
    """Weight of predicting the instruction's own tokens (answers weigh 1): late layers then do what those of a
    pretrained language model do, prepare the next token."""
    early_layer: int = 3
    """Decoder block after which the tutor asks image tokens for absolute positions."""
    middle_layer: int = 7
    """Decoder block after which the tutor asks the last grounding prompt token for the target."""
    threads: int = 1
    """Torch threads."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    seed: int = 20_001
    """Seed of weights and scenes; scenes of other seeds are never seen."""


class Tutor(nn.Module):
    """Linear heads that ask the model for what it will need; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [1, 4, len(KINDS), len(COLOURS), MAX_RANK + 1, *[MAX_RANK] * len(WAYS)]
        self.seen = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.sizes)))
        self.placed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 + 2 * MAX_RANK))
        self.box = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))
        self.key = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))

    def look(self, features: torch.Tensor, lesson: Lesson, rows: int, columns: int) -> dict[str, torch.Tensor]:
        """Losses on the vision tower's output (b, v, d): what stands in each image token, relative to it."""
        there, offset, *names = self.seen(features).split(self.sizes, -1)
        mask = lesson.present.bool()
        losses = {"present": F.binary_cross_entropy_with_logits(there[..., 0], lesson.present)}
        grid = torch.tensor([columns, rows, columns, rows], dtype=torch.float32)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = torch.stack([column, row, column, row], -1).reshape(-1, 4) + 0.5
        losses["offset"] = F.smooth_l1_loss(offset[mask], (lesson.boxes * grid - centre)[mask], beta=TOLERANCE)
        answers = [*lesson.looks.unbind(-1), *lesson.ranks.unbind(-1)]
        what = [
            F.cross_entropy(n.flatten(0, 1), a.flatten(), ignore_index=IGNORE)
            for n, a in zip(names, answers, strict=False)
        ]
        losses["look"] = sum(what[:3])
        losses["rank"] = sum(w for w, a in zip(what[3:], answers[3:], strict=False) if (a != IGNORE).any())
        return losses

    def place(self, states: torch.Tensor, lesson: Lesson, rows: int, columns: int) -> dict[str, torch.Tensor]:
        """Losses on image tokens (b, v, d) inside the decoder: where they and their objects are in the picture."""
        box, row, column = self.placed(states).split([4, MAX_RANK, MAX_RANK], -1)
        mask = lesson.present.bool()
        grid = torch.tensor([columns, rows, columns, rows], dtype=torch.float32)
        rows_v = torch.arange(rows).repeat_interleave(columns).expand(len(states), -1)
        columns_v = torch.arange(columns).repeat(rows).expand(len(states), -1)
        return {
            "placed": F.smooth_l1_loss(box[mask] * grid, (lesson.boxes * grid)[mask], beta=TOLERANCE),
            "cell": F.cross_entropy(row.flatten(0, 1), rows_v.flatten())
            + F.cross_entropy(column.flatten(0, 1), columns_v.flatten()),
        }

    def point(self, states: torch.Tensor, batch: Batch, image_v: torch.Tensor, grid: torch.Tensor) -> dict:
        """Losses on the last prompt tokens of grounding rows: the box, and which image tokens hold the target."""
        row, column = batch.prompt_ends.unbind(1)
        ends = states[row, column]
        losses = {"box": F.smooth_l1_loss(self.box(ends) * grid, batch.branch_boxes * grid, beta=TOLERANCE)}
        keys = self.key(states[:, image_v])[row]
        scores = (keys @ self.query(ends)[..., None])[..., 0] / 8
        share = batch.branch_owner.sum(1, keepdim=True)
        wanted = batch.branch_owner / share.clamp_min(1e-6)
        known = share[:, 0] > 0
        losses["point"] = -(wanted * scores.log_softmax(-1)).sum(-1)[known].mean()
        return losses


def grouped_attention(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
    """`Qwen2_5_VLVisionAttention.forward` with windows of one length stacked: the same sums, a hundred calls fewer."""
    length = hidden_states.shape[0]
    q, k, v = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    starts, sizes = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
    out = torch.empty_like(q)
    for size in sizes.unique().tolist():
        index = (starts[sizes == size][:, None] + torch.arange(size)).reshape(-1)
        stacked = [x[index].unflatten(0, (-1, size)).transpose(1, 2) for x in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*stacked, scale=self.scaling)
        out = out.index_copy(0, index, mixed.transpose(1, 2).flatten(0, 1))
    return self.proj(out.reshape(length, -1))


@contextmanager
def grouped_windows():
    """Let the vision tower use `grouped_attention` while this is open (stock code calls attention once a window)."""
    stock = Qwen2_5_VLVisionAttention.forward
    Qwen2_5_VLVisionAttention.forward = grouped_attention
    try:
        yield
    finally:
        Qwen2_5_VLVisionAttention.forward = stock


def losses_of(model, tutor: Tutor, lesson: Lesson, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Every loss of one lesson, unweighted, by name."""
    core = model.model
    rows, columns = int(lesson.grid[0, 1]) // 2, int(lesson.grid[0, 2]) // 2
    features = core.visual(lesson.pixels, grid_thw=lesson.grid).pooler_output
    features = features.unflatten(0, (-1, rows * columns))
    losses = tutor.look(features, lesson, rows, columns)
    grid = torch.tensor([columns, rows, columns, rows], dtype=torch.float32)
    for job, batch in (("ground", lesson.ground), ("describe", lesson.describe)):
        states = {}
        first = int((batch.tokens[0] == model.config.image_token_id).nonzero()[0])
        image_v = torch.arange(first, first + rows * columns)
        embeds = core.language_model.embed_tokens(batch.tokens)
        embeds = torch.cat([embeds[:, :first], features[: len(embeds)], embeds[:, first + rows * columns :]], 1)

        def keep(_module, _given, output, index, states=states):
            states[index] = output

        hooks = [
            core.language_model.layers[index].register_forward_hook(partial(keep, index=index))
            for index in (config.early_layer, config.middle_layer)
        ]
        final = core.language_model(
            inputs_embeds=embeds, attention_mask=batch.visible, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        for hook in hooks:
            hook.remove()
        weights = batch.weights[:, 1:]
        taught = weights > 0
        surprise = F.cross_entropy(model.lm_head(final[:, :-1][taught]), batch.tokens[:, 1:][taught], reduction="none")
        answer = weights[taught] == 1
        losses[job] = surprise[answer].mean()
        losses[f"{job}_instruction"] = surprise[~answer].mean()
        if job == "ground":
            losses |= tutor.place(states[config.early_layer][:, image_v], lesson, rows, columns)
            losses |= tutor.point(states[config.middle_layer], batch, image_v, grid)
    return losses


def rate(step: int, config: TrainConfig) -> float:
    """The learning rate's share of its peak: linear warm-up, plateau, linear fall to zero."""
    fall = (config.steps - step) / max(config.steps * config.decay_share, 1)
    return min((step + 1) / config.warmup, fall, 1.0)


def make_optimizers(model: nn.Module, tutor: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, norms, biases and the tutor."""
    matrices, others = [], list(tutor.parameters())
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=config.learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


class Lessons(torch.utils.data.Dataset):
    """Lessons by step number, so that a worker process can draw them ahead of the training step."""

    def __init__(self, teacher: Teacher, steps: int):
        self.teacher, self.steps = teacher, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Lesson:
        return self.teacher.lesson(step)


def teacher_forced_iou(model, teacher: Teacher, steps: range) -> list[float]:
    """IoU of boxes read off the most likely digit at each place of the true answer, on unseen hard scenes."""
    found = []
    core, tokenizer = model.model, teacher.processor.tokenizer
    for step in steps:
        lesson, batch = (made := teacher.lesson(step)), made.ground
        height, width = (int(v) * 14 for v in lesson.grid[0, 1:])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            embeds = core.language_model.embed_tokens(batch.tokens)
            features = core.visual(lesson.pixels, grid_thw=lesson.grid).pooler_output
            embeds[batch.tokens == model.config.image_token_id] = features.to(embeds.dtype)
            final = core.language_model(
                inputs_embeds=embeds, attention_mask=batch.visible, position_ids=batch.positions, use_cache=False
            ).last_hidden_state
            said = model.lm_head(final).argmax(-1)
        for (row, column), truth in zip(batch.prompt_ends.tolist(), batch.branch_boxes, strict=True):
            numbers = re.findall(r"\d+", tokenizer.decode(said[row, column : column + 30]).partition("[")[2])[:4]
            box = torch.tensor([float(n) for n in numbers]) / torch.tensor(
                [width, height, width, height][: len(numbers)]
            )
            found.append(box_iou(box[None], truth[None]).nan_to_num().item() if len(numbers) == 4 else 0.0)
    return found


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The state of optimizers as named tensors, for a safetensors file."""
    return {
        f"optimizer.{number}.{index}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizers(tensors: Mapping[str, torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give optimizers the state that `optimizer_tensors` named; other tensors are passed over."""
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                index, key = name.split(".")[2:]
                state["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(state)


def save_checkpoint(folder: Path, step: int, model, tutor, optimizers) -> None:
    """Weights, tutor and optimizer state in one safetensors file, whole or not at all."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    tensors |= {f"tutor.{k}": v for k, v in tutor.state_dict().items()}
    tensors |= optimizer_tensors(optimizers)
    unfinished = folder / "checkpoint.partial"
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, unfinished, {"step": str(step)})
    unfinished.replace(folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path, model, tutor, optimizers) -> int:
    """Restore what `save_checkpoint` wrote; the step to go on from (0 where there is no checkpoint)."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    part = {p: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("model.", "tutor.")}
    model.load_state_dict(part["model."], strict=False)
    tutor.load_state_dict(part["tutor."])
    restore_optimizers(tensors, optimizers)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def train(config: TrainConfig) -> None:
    """Train the pocket model from scratch and save it where ``--out`` says; go on from the last checkpoint."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    finished = config.out / "model"
    processor = Qwen2_5_VLProcessor.from_pretrained(finished) if finished.exists() else build_processor()
    processor.save_pretrained(finished)
    model = Qwen2_5_VLForConditionalGeneration(build_config(processor.tokenizer)).train()
    tutor = Tutor(model.config.text_config.hidden_size)
    optimizers = make_optimizers(model, tutor, config)
    start = load_checkpoint(config.out, model, tutor, optimizers)
    scenes = (config.pictures, config.branches, config.described)
    teacher = Teacher(processor, config.seed, *scenes, config.hard_share, config.instruction_weight)
    unseen = Teacher(processor, config.seed + 1, *scenes, 1.0, config.instruction_weight)
    lessons = torch.utils.data.DataLoader(
        Lessons(teacher, config.steps),
        batch_size=None,
        sampler=range(start, config.steps),
        num_workers=1,
        prefetch_factor=8,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    settings = {"from_step": start} | asdict(config) | {"losses": LOSS_WEIGHTS, "tolerance": TOLERANCE}
    bar = tqdm(lessons, initial=start, total=config.steps, unit="step", mininterval=5)
    began = time.time()
    averages: dict[str, float] = {}
    with grouped_windows(), (config.out / "log.jsonl").open("a") as log:
        log.write(json.dumps(settings, default=str) + "\n")
        for step, lesson in enumerate(bar, start):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("peak", group["lr"]) * rate(step, config)
            with torch.autocast("cpu", torch.bfloat16):
                losses = losses_of(model, tutor, lesson, config)
                total = sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items())
            total.backward()
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 2.0))
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient is not finite at step {step}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for name, loss in losses.items():
                value = float(loss.detach())
                averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                ious = teacher_forced_iou(model, unseen, range(2))
                hits = sum(iou >= 0.5 for iou in ious) / len(ious)
                record = {"step": step + 1, "seconds": round(time.time() - began), "unseen_hard_iou50": round(hits, 3)}
                log.write(json.dumps(record | {k: round(v, 4) for k, v in averages.items()}) + "\n")
                log.flush()
                save_checkpoint(config.out, step + 1, model, tutor, optimizers)
                bar.set_postfix(ground=f"{averages['ground']:.3f}", iou50=f"{hits:.2f}")
    model.to(torch.bfloat16).save_pretrained(finished)
    shutil.copy(config.out / "log.jsonl", finished / "log.jsonl")
    print(f"saved {finished}; copied over extract/pocket/weights it is the shipped model")
