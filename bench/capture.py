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
    batch = pocket.first_batch()
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
    return [time_row("capture", name, seconds[name], bare, seconds[bare]) for name in contenders if name != bare]
