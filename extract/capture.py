"""One pass of a VLM that keeps the hidden states of named layers and the instruction's attention rows.

The vision tower and the decoder run once, with the decoder's own SDPA attention, and nothing above the last wanted
block is computed. Layers are named as in [ABP]: ``embed`` is what enters block 0, ``0 … L-1`` are the outputs of the
blocks, ``final`` is block ``L-1`` after the final norm (Hugging Face's last hidden state; ``L-1`` is before it).

Shape suffixes: b batch, l layer, t token (key), q query token, h head, d width.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from extract.families import family_of

EMBED, FINAL = "embed", "final"
KERNEL = "sdpa_with_rows"


@dataclass
class RowRecorder:
    """Which attention rows of which blocks to recompute, and the place where they go."""

    query_bq: torch.Tensor
    valid_bq: torch.Tensor
    blocks: tuple[int, ...]
    heads: bool
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    _masks: tuple[torch.Tensor | None, torch.Tensor] | None = None

    def record(self, block: int, query_bhtd: torch.Tensor, key_bhtd: torch.Tensor, mask: torch.Tensor | None, scale):
        """Recompute the wanted rows of one block from its rotated queries and keys, softmax in float32."""
        batch, heads, _, width = query_bhtd.shape
        groups, keys = key_bhtd.shape[1], key_bhtd.shape[2]
        n_query = self.query_bq.shape[1]
        wanted = self.query_bq[:, None, :, None].expand(batch, heads, n_query, width)
        wanted = query_bhtd.gather(2, wanted).float().mul_(scale)
        # Query heads of one key head lie side by side (repeat_interleave), so keys need not be repeated.
        wanted = wanted.view(batch, groups, heads // groups * n_query, width)
        scores = (wanted @ key_bhtd.float().transpose(2, 3)).view(batch, heads, n_query, keys)
        rows_bhqt = self._masked(scores, mask).softmax(-1)
        self.rows[block] = rows_bhqt if self.heads else rows_bhqt.mean(1)

    def _masked(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The scores with -inf where a row may not look; every block of a pass has the same mask."""
        if self._masks is None or self._masks[0] is not mask:
            if mask is None:
                kept = torch.arange(scores.shape[3], device=scores.device) <= self.query_bq[:, None, :, None]
            else:
                index = self.query_bq[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
                kept = mask.expand(len(index), -1, -1, -1).gather(2, index)
            self._masks = mask, ~kept if kept.dtype == torch.bool else kept
        held = self._masks[1]
        return scores.masked_fill_(held, -torch.inf) if held.dtype == torch.bool else scores.add_(held)

    def stacked(self, blocks: Sequence[int]) -> torch.Tensor:
        """The rows of ``blocks``, ``[b, l, q, t]`` or ``[b, l, h, q, t]``; those that nobody asked for are zero."""
        stacked = torch.stack([self.rows[block] for block in blocks], dim=1)
        unasked = ~self.valid_bq[(slice(None), None, *([None] * self.heads), slice(None), None)]
        # Filled, not multiplied: a row that may attend to nothing is NaN.
        return stacked.masked_fill_(unasked, 0)


def attend_with_rows(
    module, query, key, value, attention_mask, scaling=None, rows: RowRecorder | None = None, **kwargs
):
    """Transformers' SDPA attention, which also serves a `RowRecorder` that came down as a keyword."""
    if rows is not None and module.layer_idx in rows.blocks:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows.record(module.layer_idx, query, key, attention_mask, scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(KERNEL, attend_with_rows)
# Without a mask function of the same name transformers builds no mask at all, and padding is attended to.
AttentionMaskInterface.register(KERNEL, sdpa_mask)


@dataclass(frozen=True)
class Pass:
    """What one pass gives.

    Attributes
    ----------
    hidden
        ``[l, b, t, d]`` in the model's dtype; ``layers`` names the first axis. Padded positions hold whatever
        the model computed there. ``[l, n, d]`` where ``keep`` chose tokens.
    rows
        ``[b, l, q, t]`` (mean over heads) or ``[b, l, h, q, t]``, float32, or null; ``row_layers`` names the layer
        axis. Rows beyond a sample's own queries are zero.
    query
        ``[b, q]`` int64: the position of each query token in the sequence, -1 beyond a sample's own queries.
    """

    layers: tuple[str, ...]
    hidden: torch.Tensor
    row_layers: tuple[str, ...] = ()
    rows: torch.Tensor | None = None
    query: torch.Tensor | None = None


class _Done(Exception):  # noqa: N818 - it ends a pass early, nothing is wrong
    """The last wanted block has run."""


_one_pass_at_a_time = threading.RLock()


def layer_names(model: nn.Module) -> list[str]:
    """All names of layers that a pass can keep, in order: ``embed, 0, …, L-1, final``."""
    return [EMBED, *map(str, range(len(_core(model).language_model.layers))), FINAL]


def look(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> BaseModelOutputWithPooling:
    """What the vision tower makes of a batch's pictures; `single_pass` and `extract.decoding.ask` take it."""
    core = _core(model)
    return family_of(core.config).look(core, inputs)


def embed(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], features: BaseModelOutputWithPooling | None = None
) -> tuple[torch.Tensor, dict]:
    """The decoder's input ``[b, t, d]`` (token embeddings, with the vision tower's output at the image tokens), and
    what else the decoder has to be given by keyword (`Family.embed`: Qwen3-VL's DeepStack features).
    """
    core = _core(model)
    return family_of(core.config).embed(core, inputs, features)


@torch.no_grad()
def single_pass(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    layers: Sequence[str],
    rows: Literal["mean", "heads"] | None = None,
    query_mask: torch.Tensor | None = None,
    row_layers: Sequence[str] | None = None,
    inputs_embeds: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    features: BaseModelOutputWithPooling | None = None,
) -> Pass:
    """Run the model once over ``inputs`` and keep the named layers.

    Parameters
    ----------
    model
        A ``Qwen2_5_VLForConditionalGeneration`` or its inner model, in evaluation mode.
    inputs
        ``input_ids``, ``attention_mask`` ``[b, t]``, ``position_ids`` ``[3, b, t]``, ``pixel_values`` and
        ``image_grid_thw``, on the model's device. Positions are demanded because the model would guess them.
    layers
        Names from `layer_names`, in the order in which they are wanted.
    rows, query_mask, row_layers
        The attention rows of the tokens where ``query_mask`` ``[b, t]`` is true, in the blocks ``row_layers``
        (default: the blocks among ``layers``), averaged over heads or per head.
    inputs_embeds
        ``[b, t, d]``: use these in place of `embed`, as ablations of image tokens do; the tower is not run.
    keep
        int64 ``[n]``: of the batch's tokens, counted over rows (``b * t + i``), those whose states are kept, in this
        order. All of them, as a padded batch, if not given.
    features
        What `look` gave for the same pictures: the tower is not run again, ``pixel_values`` are not needed, and the
        states are the same bit for bit.

    Raises
    ------
    ValueError
        A layer has no such name, nothing is wanted, or rows are wanted of no tokens.
    """
    core = _core(model)
    decoder = core.language_model
    names = layer_names(model)
    kept = tuple(layers)
    row_names = tuple(name for name in kept if name.isdecimal()) if row_layers is None else tuple(row_layers)
    row_names = row_names if rows else ()
    if unknown := [name for name in (*kept, *row_names) if name not in names]:
        raise ValueError(f"no layer {unknown[0]!r}: this model has {', '.join(names)}")
    if wrong := {EMBED, FINAL} & set(row_names):
        raise ValueError(f"{wrong.pop()!r} has no attention; rows come from 0 … {names[-2]}")
    if not kept and not row_names:
        raise ValueError("no layer is wanted")

    states, further = embed(model, inputs, features) if inputs_embeds is None else (inputs_embeds, {})
    hidden = states.new_empty(len(kept), *(states.shape if keep is None else (len(keep), states.shape[2])))
    places = {name: [place for place, other in enumerate(kept) if other == name] for name in kept}

    def hold(name: str, value: torch.Tensor) -> None:
        for place in places.get(name, ()):
            if keep is None:
                hidden[place].copy_(value)
            else:
                torch.index_select(value.flatten(0, 1), 0, keep, out=hidden[place])

    recorder = _recorder(rows, query_mask, tuple(map(int, row_names))) if rows else None
    hold(EMBED, states)
    last = max(names.index(name) - 1 for name in (*kept, *row_names))
    if last >= 0:
        with _one_pass_at_a_time, _attention_kernel(decoder, KERNEL if recorder else None), ExitStack() as hooks:
            for block, module in enumerate(decoder.layers[: last + 1]):
                hooks.callback(module.register_forward_hook(_keeper(hold, block, last)).remove)
            try:
                output = decoder(
                    inputs_embeds=states,
                    attention_mask=inputs["attention_mask"],
                    position_ids=inputs["position_ids"],
                    use_cache=False,
                    **further,
                    **({"rows": recorder} if recorder else {}),
                )
                hold(FINAL, output.last_hidden_state)
            except _Done:
                pass
    if recorder is None:
        return Pass(kept, hidden)
    stacked = recorder.stacked([int(name) for name in row_names])
    query = recorder.query_bq.masked_fill(~recorder.valid_bq, -1)
    return Pass(kept, hidden, row_names, stacked, query)


def _core(model: nn.Module) -> nn.Module:
    """The model without its language-model head."""
    return model.base_model


def _recorder(rows: str, query_mask: torch.Tensor | None, blocks: tuple[int, ...]) -> RowRecorder:
    """A recorder for the true positions of ``query_mask``, gathered to the front of ``[b, q]``."""
    if query_mask is None or not query_mask.any():
        raise ValueError("attention rows are wanted of no token: query_mask is empty")
    if rows not in ("mean", "heads"):
        raise ValueError(f"rows is {rows!r}: 'mean' or 'heads' or None")
    count = query_mask.sum(1)
    order = (~query_mask.bool()).int().argsort(dim=1, stable=True)[:, : int(count.max())]
    valid = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return RowRecorder(order.masked_fill(~valid, 0), valid, blocks, rows == "heads")


def _keeper(hold, block: int, last: int):
    """A forward hook that keeps one block's output and, where nothing above is wanted, ends the pass.

    The last block's index is smaller than ``last`` when ``final`` is wanted, so the norm still runs then.
    """

    def hook(module: nn.Module, args: tuple, output) -> None:
        hold(str(block), output[0] if isinstance(output, tuple) else output)
        if block == last:
            raise _Done

    return hook


@contextmanager
def _attention_kernel(decoder: nn.Module, kernel: str | None):
    """Let the decoder use ``kernel`` (null: its own) and give it back its own, whatever happens."""
    own = decoder.config._attn_implementation
    if kernel is None:
        yield
        return
    decoder.config._attn_implementation = kernel
    try:
        yield
    finally:
        decoder.config._attn_implementation = own
