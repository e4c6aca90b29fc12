"""What the pocket model is taught: answers to both prompts, and where every object stands, packed into batches.

One picture carries several instructions: the rows of a batch hold a shared prefix (system prompt and picture) and,
behind it, branches (instruction and answer) that see the prefix and themselves only. The picture is encoded once,
and the same picture with another target is the best contrast for learning what a position phrase means.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from extract.prompts import editing_text, ground_text
from extract.scenes import language, shapes
from extract.scenes.scene import ASPECTS, OBJECT_TASKS, Scene, ask, bounding_box, draw_scene, masks_of, paint

IGNORE = -100
MAX_RANK = 9
WAYS = ("left", "right", "top", "bottom", "clockwise")


def box_answer(box: np.ndarray | list[float]) -> str:
    """The answer to the grounding prompt: the box in whole pixels of the resized picture."""
    return '{"bbox_2d": [%d, %d, %d, %d]}' % tuple(round(float(v)) for v in box)  # noqa: UP031 - braces are text


def describe(scene: Scene) -> str:
    """The answer to the editing prompt: what is in the picture and what should change."""
    target = scene.extra if scene.wish.task == "addition" else None
    if scene.wish.target is not None:
        target = scene.things[scene.wish.target]
    where = language.region(target.x / scene.width, target.y / scene.height) if target else ""
    return language.description(
        [t.kind for t in scene.things],
        [t.colour for t in scene.things],
        scene.arrangement.layout,
        scene.background,
        scene.wish,
        where,
    )


@dataclass
class Batch:
    """One step's rows; all pictures share one grid, so shapes are rectangular. b picture, t token, v image token.

    ``tokens`` int64 and ``weights`` float32 (b, t), a token's weight in the loss; ``positions`` int64 (3, b, t);
    ``visible`` bool (b, 1, t, t), what a token attends to;
    ``prompt_ends`` int64 (branches, 2): row and column of each branch's last prompt token; ``branch_boxes`` float32
    (branches, 4) in the resized picture's unit square; ``branch_owner`` float32 (branches, v): share of the target
    object in each image token.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    prompt_ends: torch.Tensor
    branch_boxes: torch.Tensor
    branch_owner: torch.Tensor


@dataclass
class Lesson:
    """Pictures (``pixels`` (b·p, 1176), ``grid`` (b, 3)), what stands in each image token, and two batches of text."""

    pixels: torch.Tensor
    grid: torch.Tensor
    present: torch.Tensor  # (b, v) float: an object owns this image token
    boxes: torch.Tensor  # (b, v, 4) float: its box in the unit square
    looks: torch.Tensor  # (b, v, 3) int: kind, colour, number of objects; IGNORE where none
    ranks: torch.Tensor  # (b, v, 5) int: its ranks in the order of `WAYS`; IGNORE where none
    ground: Batch
    describe: Batch


class Teacher:
    """Draws lessons; a lesson is a function of (seed, step) alone."""

    def __init__(
        self,
        processor,
        seed: int,
        pictures: int,
        branches: int,
        described: int,
        hard_share: float,
        instruction_weight: float,
    ):
        self.processor = processor
        self.seed = seed
        self.pictures = pictures
        self.branches = branches
        self.described = described
        self.hard_share = hard_share
        self.instruction_weight = instruction_weight
        self.size = processor.image_processor.size
        self.encode = lambda text: processor.tokenizer(text)["input_ids"]
        self.image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.prefixes, self.suffixes = {}, {}
        for name, text in (("ground", ground_text("\0")), ("describe", editing_text("\0"))):
            head, tail = text.split("\0")
            self.prefixes[name] = (self.encode(head.split("<|image_pad|>")[0]), self.encode("<|vision_end|>"))
            self.suffixes[name] = self.encode(tail)
        self.end = self.encode("<|im_end|>")

    def lesson(self, step: int) -> Lesson:
        """The lesson of one step."""
        rng = np.random.default_rng([self.seed, step])
        aspect = ASPECTS[rng.integers(len(ASPECTS))]
        hard = rng.random(self.pictures) < self.hard_share
        pictures, present, boxes, looks, ranks, asked = [], [], [], [], [], []
        for slot in range(self.pictures):
            difficulty = "hard" if hard[slot] else ("medium", "easy")[int(rng.integers(2))]
            scene = draw_scene(self.seed, step * self.pictures + slot, difficulty, aspect)
            picture, owner = paint(scene, scene.things, scene.background)
            pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
            height, width = smart_resize(
                scene.height, scene.width, 28, self.size["shortest_edge"], self.size["longest_edge"]
            )
            masks = masks_of(owner, len(scene.things))
            unit = np.array([scene.width, scene.height] * 2, np.float32)
            thing_boxes = np.array([bounding_box(m) for m in masks], np.float32) / unit
            shares = np.stack([_shares(m, height // 28, width // 28) for m in masks])  # (n, v)
            best = shares.argmax(0)
            there = shares.max(0) > 0.12
            present.append(there)
            boxes.append(thing_boxes[best])
            kinds = np.array([shapes.KINDS.index(t.kind) for t in scene.things])
            colours = np.array([list(shapes.COLOURS).index(t.colour) for t in scene.things])
            look = np.stack([kinds[best], colours[best], np.full(len(best), len(scene.things))], 1)
            looks.append(np.where(there[:, None], look, IGNORE))
            rank = np.stack([scene.arrangement.ranks.get(way, np.full(len(kinds), -1)) for way in WAYS], 1)[best]
            ranks.append(np.where(there[:, None] & (rank >= 0), rank, IGNORE))
            asked.append(self._branches(rng, scene, thing_boxes, shares, (width, height)))
        inputs = self.processor.image_processor(images=pictures, return_tensors="pt")
        grid = inputs["image_grid_thw"]
        rows, columns = int(grid[0, 1]) // 2, int(grid[0, 2]) // 2
        return Lesson(
            pixels=inputs["pixel_values"],
            grid=grid,
            present=torch.from_numpy(np.stack(present)).float(),
            boxes=torch.from_numpy(np.stack(boxes)),
            looks=torch.from_numpy(np.stack(looks)).long(),
            ranks=torch.from_numpy(np.stack(ranks)).long(),
            ground=self._pack("ground", [branches[: self.branches] for branches in asked], rows, columns),
            describe=self._pack("describe", [branches[:2] for branches in asked[: self.described]], rows, columns),
        )

    def _branches(self, rng, scene: Scene, boxes, shares, resized) -> list[dict]:
        """Several wishes about one picture: the scene's own first, then others about other targets."""
        scenes = [scene]
        others = [i for i in scene.referable() if i != scene.wish.target]
        for target in rng.permutation(others).tolist() if others else []:
            task = OBJECT_TASKS[rng.integers(len(OBJECT_TASKS))]
            if len(scenes) < self.branches and (more := ask(rng, scene, task, target)) is not None:
                scenes.append(more)
        branches = []
        for one in scenes:
            wish = one.wish
            if wish.target is not None:
                box, owner = boxes[wish.target], shares[wish.target]
            elif wish.task == "addition":
                extra = one.extra
                half = extra.size / 2
                box = np.array([extra.x - half, extra.y - half, extra.x + half, extra.y + half], np.float32)
                box = box / np.array([one.width, one.height] * 2, np.float32)
                owner = np.zeros(shares.shape[1])
            else:
                box, owner = np.array([0, 0, 1, 1], np.float32), np.zeros(shares.shape[1])
            instruction = one.instructions[rng.integers(len(one.instructions))]
            answers = {"ground": box_answer(box * np.array([*resized, *resized])), "describe": describe(one)}
            branches.append({"instruction": instruction, "answers": answers, "box": box, "owner": owner})
        return branches

    def _pack(self, job: str, rows_of_branches: list[list[dict]], rows: int, columns: int) -> Batch:
        system, image_end = self.prefixes[job]
        prefix = system + [self.image_token] * (rows * columns) + image_end
        start = len(system)
        head = np.arange(start)
        row, column = (index.ravel() for index in np.mgrid[:rows, :columns])
        image = np.stack([np.full(rows * columns, start), start + row, start + column])
        after = start + max(rows, columns)
        prefix_positions = np.concatenate([np.stack([head] * 3), image, np.full((3, 1), after)], 1)
        packed = []
        for branches in rows_of_branches:
            tokens, positions = list(prefix), [prefix_positions]
            weights, owner = [0.0] * len(prefix), [0] * len(prefix)
            ends = []
            for number, branch in enumerate(branches, 1):
                prompt = self.encode(branch["instruction"]) + self.suffixes[job]
                answer = self.encode(branch["answers"][job]) + self.end
                ends.append(len(tokens) + len(prompt) - 1)
                tokens += prompt + answer
                weights += [0.0] + [self.instruction_weight] * (len(prompt) - 1) + [1.0] * len(answer)
                length = len(prompt) + len(answer)
                positions.append(np.tile(after + 1 + np.arange(length), (3, 1)))
                owner += [number] * length
            packed.append((tokens, weights, np.concatenate(positions, 1), np.array(owner), ends))
        longest = -(-max(len(p[0]) for p in packed) // 16) * 16
        count = len(packed)
        tokens = np.zeros((count, longest), np.int64)
        weights = np.zeros((count, longest), np.float32)
        positions = np.zeros((3, count, longest), np.int64)
        owners = np.full((count, longest), -1, np.int64)
        prompt_ends = []
        for i, (t, w, p, o, ends) in enumerate(packed):
            n = len(t)
            tokens[i, :n], weights[i, :n], positions[:, i, :n], owners[i, :n] = t, w, p, o
            prompt_ends += [(i, end) for end in ends]
        causal = np.tri(longest, dtype=bool)
        seen = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == 0)
        flat = [branch for branches in rows_of_branches for branch in branches]
        return Batch(
            tokens=torch.from_numpy(tokens),
            weights=torch.from_numpy(weights),
            positions=torch.from_numpy(positions),
            visible=torch.from_numpy((seen & causal)[:, None]),
            prompt_ends=torch.tensor(prompt_ends),
            branch_boxes=torch.from_numpy(np.stack([b["box"] for b in flat]).astype(np.float32)),
            branch_owner=torch.from_numpy(np.stack([b["owner"] for b in flat]).astype(np.float32)),
        )


def _shares(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The share of each image token's area that a mask covers, float32 (rows · columns,)."""
    height, width = mask.shape
    edges_y = np.round(np.arange(rows + 1) * height / rows).astype(int)
    edges_x = np.round(np.arange(columns + 1) * width / columns).astype(int)
    sums = np.add.reduceat(np.add.reduceat(mask.astype(np.float32), edges_y[:-1], 0), edges_x[:-1], 1)
    return (sums / np.outer(np.diff(edges_y), np.diff(edges_x))).ravel().astype(np.float32)
