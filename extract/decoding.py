"""Greedy decoding of one batch: no answer goes on after what was asked for, none is computed after it ended.

Transformers' ``generate`` ends a batch with its slowest sample and would read every answer from its start at every
step to see whether it is complete. The tokens here are the ones that it gives.

Shape suffixes: b samples of the batch that still speak, t token, a axis of the positions.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling

from extract.sequence import Batch

END_OF_TURN = "<|im_end|>"
CLOSING = "])"


@dataclass(frozen=True)
class Said:
    """One answer: its text without special tokens, how many tokens it took, and whether it came to an end."""

    text: str
    tokens: int
    finished: bool
    """It is complete, or the model ended its turn; false where the longest answer cut it off."""


class _Speech:
    """The tokens of one answer so far.

    A complete answer ends with a closing bracket and has no other one in what makes it complete. So only a token
    with a bracket can complete it, and the part to be searched begins at the token with the bracket before.
    """

    def __init__(self, tokenizer, ends: set[int], complete: re.Pattern | None):
        self.tokenizer, self.ends, self.complete = tokenizer, ends, complete
        self.ids: list[int] = []
        self.searched = 0
        self.finished = False

    def hear(self, token_id: int, closes: bool) -> None:
        """Take the next token, of which it is known whether there is a closing bracket in it."""
        self.ids.append(token_id)
        if token_id in self.ends:
            self.finished = True
        elif self.complete is not None and closes:
            tail = self.tokenizer.decode(self.ids[self.searched :], skip_special_tokens=True)
            self.finished = self.complete.search(tail) is not None
            self.searched = len(self.ids) - 1


@torch.no_grad()
def ask(
    model: nn.Module,
    batch: Batch,
    tokenizer,
    max_new_tokens: int,
    complete: re.Pattern | None = None,
    features: BaseModelOutputWithPooling | None = None,
) -> list[Said]:
    """The model's greedy answers to one batch; the checkpoint's own sampling settings play no part.

    Parameters
    ----------
    model
        A vision-language model with its head, such as ``Qwen2_5_VLForConditionalGeneration``, in evaluation mode.
    batch
        Padded on the left; its ``position_ids`` are used, and counted on from.
    tokenizer
        Whose ``<|im_end|>`` or end of sequence ends an answer.
    max_new_tokens
        Longest answer.
    complete
        An answer in which this is found is long enough; null lets it go on to the end of the turn. What is found has
        to end with a closing bracket and to have no other in it.
    features
        What the inner model's ``get_image_features`` gave for the same pictures in the same order: the vision tower is
        not run again, and the answers are the same bit for bit.
    """
    batch = batch.to(model.device)
    inputs, mask = dict(batch.inputs), batch.inputs["attention_mask"]
    if features is not None:
        inputs.pop("pixel_values", None)
        inputs["mm_encoder_outputs"] = {"image": features}
    length = mask.shape[1]
    mask_bt = pad(mask, (0, max_new_tokens), value=1)
    flat = inputs["position_ids"].ndim == 2  # of families with one axis of positions
    positions_abt = inputs["position_ids"][None] if flat else inputs["position_ids"]
    last_ab1 = positions_abt.amax((0, 2))[:, None].expand(*positions_abt.shape[:2], 1)
    # Not every family's turns end with a token of their own.
    ends = {tokenizer.get_added_vocab().get(END_OF_TURN, tokenizer.eos_token_id), tokenizer.eos_token_id}
    answers = [_Speech(tokenizer, ends, complete) for _ in range(len(mask))]
    speaking = answers  # the rows of the tensors, some of them finished
    closes = cache(lambda token_id: any(bracket in tokenizer.decode([token_id]) for bracket in CLOSING))
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    for step in range(1, max_new_tokens + 1):
        ids_b = output.logits[:, -1].float().argmax(-1)
        for one, token_id in zip(speaking, ids_b.tolist(), strict=True):
            if not one.finished:
                one.hear(token_id, closes(token_id))
        left = [row for row, one in enumerate(speaking) if not one.finished]
        if not left or step == max_new_tokens:
            break
        # Copying the cache costs a third of a step: done when the batch halves it pays even for the last few tokens.
        if 2 * len(left) <= len(speaking):
            speaking = [speaking[row] for row in left]
            rows = torch.tensor(left, device=ids_b.device)
            ids_b, mask_bt, last_ab1 = ids_b[rows], mask_bt[rows], last_ab1[:, rows]
            output.past_key_values.batch_select_indices(rows)
        output = model(
            input_ids=ids_b[:, None],
            attention_mask=mask_bt[:, : length + step],
            position_ids=(last_ab1[0] if flat else last_ab1) + step,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    texts = tokenizer.batch_decode([one.ids for one in answers], skip_special_tokens=True)
    return [Said(text, len(one.ids), one.finished) for text, one in zip(texts, answers, strict=True)]
