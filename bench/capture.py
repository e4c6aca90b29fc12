"""One pass that keeps states and attention rows, and transformers' own way to them, over the decoder alone."""

import copy

import torch

from bench.measure import Row, Turns, time_row
from bench.pocket import Pocket
from extract.capture import embed, single_pass


@torch.no_grad()
def measure(pocket: Pocket, turns: Turns) -> list[Row]:
    """Rows of one padded batch; the vision tower runs before, so that it thins no difference."""
    model, layers = pocket.extractor.model, pocket.plan.layers
    batch = max(pocket.batches(), key=lambda one: one.inputs["input_ids"].numel())
    inputs, asked = batch.inputs, batch.query_mask
    states, _ = embed(model, inputs)
    decoder = model.model.language_model
    eager = copy.deepcopy(decoder)
    eager.config._attn_implementation = "eager"
    given = {
        "inputs_embeds": states,
        "attention_mask": inputs["attention_mask"],
        "position_ids": inputs["position_ids"],
        "use_cache": False,
    }
    stock = eager(**given, output_attentions=True, output_hidden_states=True)
    if len(stock.attentions) != len(decoder.layers) or stock.attentions[0] is None:
        raise RuntimeError("the stock decoder gave no attention: the eager row would be of something else")
    bare = "decoder alone, SDPA"
    contenders = {
        bare: lambda: decoder(**given),
        f"states of {len(layers)} layers": lambda: single_pass(model, inputs, layers, inputs_embeds=states),
        "states + mean attention rows": lambda: single_pass(model, inputs, layers, "mean", asked, inputs_embeds=states),
        "stock eager, all states + attentions": lambda: eager(
            **given, output_attentions=True, output_hidden_states=True
        ),
    }
    seconds = turns.take(contenders)
    rows = [time_row("capture", name, seconds[name], bare, seconds[bare]) for name in contenders if name != bare]
    without, with_rows = "whole pass, states", "whole pass, states + mean attention rows"
    seconds = turns.take(
        {
            without: lambda: single_pass(model, inputs, layers),
            with_rows: lambda: single_pass(model, inputs, layers, "mean", asked),
        }
    )
    return [*rows, time_row("capture", with_rows, seconds[with_rows], without, seconds[without], goal=1.1)]
