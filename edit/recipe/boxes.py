"""A vision-language model that boxes what the instruction is about, and how its boxes compare with the true ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from edit.recipe.checkpoints import Checkpoint
from edit.recipe.stages import Given, Made, Work
from extract.boxes import KEPT_CHARACTERS, generate_boxes
from extract.families import Box, family_of
from extract.model import load_model, load_processor
from extract.omniedit import BadSample, Checks, checked_box
from extract.prompts import ground_template
from extract.review.agreement import mean_iou
from extract.scoring import score_boxes
from extract.sequence import conditioner_for

LONGEST = 400  # tokens of an answer [ABP]; it ends as soon as its box is complete
NOWHERE = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class VisionBoxer:
    """A vision-language model asked for the box, as `extract.boxes` asks and reads it: greedy decoding."""

    found: Checkpoint
    device: torch.device

    def describe(self) -> dict[str, Any]:
        """Its files and the question."""
        family = family_of(AutoConfig.from_pretrained(self.found.folder))
        return {"model": self.found.identity, "template": ground_template(family), "longest": LONGEST}

    def load(self) -> Work:
        """The model on its device."""
        config = AutoConfig.from_pretrained(self.found.folder)
        sequence = conditioner_for(load_processor(self.found.folder), config, "ground", "sequential")
        model = load_model(self.found.folder, self.device)

        def box(given: Given) -> Made:
            # One at a time: in a batch, padding would change last bits, and a resumed run batches otherwise.
            asked = given.picture("source"), given.told["instructions"][0]
            (answer,) = generate_boxes(model, sequence, [asked], LONGEST)
            if answer.problem is not None:
                raise BadSample(str(answer.problem), answer.text[:KEPT_CHARACTERS])
            found = checked_box(list(answer.box), *asked[0].size, Checks())
            return Made({"box": found, "answer": answer.text[:KEPT_CHARACTERS]})

        return box


def compare(given: Sequence[Box | None], truth: Sequence[Box]) -> dict[str, Any] | None:
    """Boxes against true ones, one without a box counting as a miss; null where there are none.

    Returns
    -------
    dict
        ``n``; ``mean_iou`` with ``mean_iou_interval`` (95 %, bootstrap over pictures); ``iou50``, the share with an
        IoU of a half or more, with ``iou50_interval`` (95 %, Wilson); ``no_box``, the share without a box.
    """
    if not truth:
        return None
    mean, *ends = mean_iou([(box or NOWHERE, true) for box, true in zip(given, truth, strict=True)])
    scored = score_boxes(given, truth)
    return {
        "n": len(truth),
        "mean_iou": mean,
        "mean_iou_interval": ends,
        "iou50": scored["iou50"],
        "iou50_interval": [scored["low"], scored["high"]],
        "no_box": scored["no_box"],
    }
