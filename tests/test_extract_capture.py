"""Capture equals the stock classes: hidden states of every layer, and the attention rows of the instruction."""

import pytest
import torch
from PIL import Image

from extract.capture import embed, layer_names, single_pass
from extract.prompts import editing_template
from extract.sequence import Conditioner

SAMPLES = [
    (Image.effect_noise((150, 90), 80).convert("RGB"), "make the second red cube from the left blue"),
    (Image.effect_noise((90, 200), 80).convert("RGB"), "remove the ball"),
    (Image.effect_noise((130, 130), 80).convert("RGB"), "swap the rightmost cat for a small dog, please"),
]
ALIKE = [SAMPLES[0]] * 2  # one length: no padding, transformers builds no mask


@pytest.fixture(scope="module", params=[(4, 2), (4, 4), (4, 1)], ids=["gqa", "mha", "mqa"])
def model(request, tiny_model):
    heads, kv_heads = request.param
    return tiny_model(heads=heads, kv_heads=kv_heads)


@pytest.fixture(scope="module")
def gqa(tiny_model):
    return tiny_model()


def make_batch(processor, model, samples, positions="mrope"):
    return Conditioner(processor, editing_template(), positions, model.config).batch(samples)


def stock(model, inputs, **wanted):
    with torch.no_grad():
        return model.model(**inputs, use_cache=False, **wanted)


def like_eager(model, tiny_config):
    """The same weights in a model with eager attention."""
    text = model.config.text_config
    config = tiny_config(heads=text.num_attention_heads, kv_heads=text.num_key_value_heads)
    config._attn_implementation = "eager"
    eager = type(model)(config).eval().to(model.dtype)
    eager.load_state_dict(model.state_dict())
    return eager


def eager_rows(model, tiny_config, batch):
    """Per layer, per sample: the eager attention ``[h, q, t]`` of the instruction's tokens."""
    attention = stock(like_eager(model, tiny_config), batch.inputs, output_attentions=True).attentions
    return [[layer[number][:, asked].float() for number, asked in enumerate(batch.query_mask)] for layer in attention]


@pytest.mark.parametrize("samples", [SAMPLES, ALIKE], ids=["padded", "unpadded"])
@pytest.mark.parametrize("rows", [None, "mean"])
def test_states_equal_the_stock_class_bit_for_bit(processor, model, samples, rows):
    batch = make_batch(processor, model, samples)
    names = layer_names(model)
    assert names == ["embed", "0", "1", "2", "3", "final"]
    before_norm = []
    hook = model.model.language_model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    expected = stock(model, batch.inputs, output_hidden_states=True).hidden_states
    hook.remove()
    captured = single_pass(model, batch.inputs, names, rows, batch.query_mask)
    assert captured.layers == tuple(names)
    hidden = dict(zip(names, captured.hidden, strict=True))
    for index, name in enumerate(["embed", "0", "1", "2"]):
        torch.testing.assert_close(hidden[name], expected[index], rtol=0, atol=0)
    torch.testing.assert_close(hidden["3"], before_norm[0], rtol=0, atol=0)
    torch.testing.assert_close(hidden["final"], expected[4], rtol=0, atol=0)
    assert not torch.equal(hidden["3"], hidden["final"])


@pytest.mark.parametrize("samples", [SAMPLES, ALIKE], ids=["padded", "unpadded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rows_equal_eager_attention(processor, model, tiny_config, samples, dtype, tolerance):
    batch = make_batch(processor, model, samples)
    model = type(model)(model.config).eval().to(dtype) if dtype != torch.float32 else model
    per_head = single_pass(model, batch.inputs, ["0", "1", "2", "3"], "heads", batch.query_mask)
    mean = single_pass(model, batch.inputs, ["0", "1", "2", "3"], "mean", batch.query_mask)
    for layer, expected in enumerate(eager_rows(model, tiny_config, batch)):
        for number, rows_hqt in enumerate(expected):
            count = rows_hqt.shape[1]
            torch.testing.assert_close(per_head.rows[number, layer, :, :count], rows_hqt, rtol=0, atol=tolerance)
            torch.testing.assert_close(mean.rows[number, layer, :count], rows_hqt.mean(0), rtol=0, atol=tolerance)
            assert mean.query[number, :count].equal(batch.query_mask[number].nonzero()[:, 0])
            assert (mean.query[number, count:] == -1).all()
            assert (mean.rows[number, layer, count:] == 0).all()


@pytest.mark.parametrize("samples", [SAMPLES, ALIKE], ids=["padded", "unpadded"])
def test_rows_sum_to_one_over_the_past_and_are_zero_elsewhere(processor, gqa, samples):
    batch = make_batch(processor, gqa, samples)
    captured = single_pass(gqa, batch.inputs, ["0", "3"], "heads", batch.query_mask)
    real = captured.query >= 0
    rows_qlht = captured.rows.permute(0, 3, 1, 2, 4)[real]
    torch.testing.assert_close(rows_qlht.sum(-1), torch.ones(rows_qlht.shape[:-1]))
    keys = torch.arange(rows_qlht.shape[-1])
    future = keys > captured.query[real][:, None]
    padded = batch.inputs["attention_mask"].repeat_interleave(real.sum(1), dim=0) == 0
    assert (rows_qlht.permute(1, 2, 0, 3)[:, :, future | padded] == 0).all()


@pytest.mark.parametrize("rows", ["mean", "heads"])
def test_a_padded_batch_gives_what_each_sample_gives_alone(processor, gqa, rows):
    names = layer_names(gqa)
    together = make_batch(processor, gqa, SAMPLES)
    captured = single_pass(gqa, together.inputs, names, rows, together.query_mask)
    for number, sample in enumerate(SAMPLES):
        alone = make_batch(processor, gqa, [sample])
        single = single_pass(gqa, alone.inputs, names, rows, alone.query_mask)
        tokens, queries = single.hidden.shape[2], single.rows.shape[-2]
        torch.testing.assert_close(captured.hidden[:, number, :tokens], single.hidden[:, 0], rtol=1e-4, atol=1e-4)
        same = captured.rows[number, ..., :queries, :tokens]
        torch.testing.assert_close(same, single.rows[0], rtol=0, atol=1e-5)


def test_of_chosen_tokens_alone_the_states_are_kept_in_the_order_asked(processor, gqa):
    batch = make_batch(processor, gqa, SAMPLES)
    whole = single_pass(gqa, batch.inputs, layer_names(gqa)).hidden
    keep = torch.randperm(whole.shape[1] * whole.shape[2])[:50]
    chosen = single_pass(gqa, batch.inputs, layer_names(gqa), keep=keep).hidden
    assert chosen.equal(whole.flatten(1, 2)[:, keep])


def test_only_the_blocks_up_to_the_last_wanted_run(processor, gqa):
    batch = make_batch(processor, gqa, SAMPLES)
    decoder, ran = gqa.model.language_model, []
    modules = [*decoder.layers, decoder.norm]
    hooks = [m.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(modules)]

    def blocks(*layers, **settings):
        ran.clear()
        single_pass(gqa, batch.inputs, layers, **settings)
        return list(ran)

    assert blocks("embed") == []
    assert blocks("1", "0") == [0, 1]
    assert blocks("0", rows="mean", query_mask=batch.query_mask, row_layers=["2"]) == [0, 1, 2]
    assert blocks("3") == [0, 1, 2, 3]
    assert blocks("final") == [0, 1, 2, 3, 4]
    for hook in hooks:
        hook.remove()


def test_layers_come_in_the_order_asked_for(processor, gqa):
    batch = make_batch(processor, gqa, ALIKE)
    one = single_pass(gqa, batch.inputs, ["2", "embed"], "mean", batch.query_mask, row_layers=["2", "0"])
    other = single_pass(gqa, batch.inputs, ["embed", "2"], "mean", batch.query_mask, row_layers=["0", "2"])
    assert one.hidden.flip(0).equal(other.hidden)
    assert one.rows.flip(1).equal(other.rows)


def test_the_model_is_left_as_found_even_after_an_error(processor, gqa):
    batch = make_batch(processor, gqa, ALIKE)
    decoder = gqa.model.language_model
    boom = decoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        single_pass(gqa, batch.inputs, ["3"], "mean", batch.query_mask)
    boom.remove()
    single_pass(gqa, batch.inputs, ["1"], "mean", batch.query_mask)
    assert decoder.config._attn_implementation == "sdpa"
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in decoder.modules())


def test_the_vision_tower_runs_once_and_not_at_all_when_embeddings_are_given(processor, gqa):
    batch = make_batch(processor, gqa, SAMPLES)
    ran = []
    hook = gqa.model.visual.register_forward_pre_hook(lambda *_: ran.append(1))
    whole = single_pass(gqa, batch.inputs, ["embed", "3"], "mean", batch.query_mask)
    assert len(ran) == 1
    given = single_pass(gqa, batch.inputs, ["3"], inputs_embeds=whole.hidden[0])
    hook.remove()
    assert len(ran) == 1
    assert given.hidden[0].equal(whole.hidden[1])
    with torch.no_grad():
        assert embed(gqa, batch.inputs)[0].equal(whole.hidden[0])


def test_sequential_positions_are_what_a_forgetful_caller_gets_and_differ_from_the_models_own(processor, gqa):
    mrope = make_batch(processor, gqa, SAMPLES)
    sequential = make_batch(processor, gqa, SAMPLES, "sequential")
    own = single_pass(gqa, mrope.inputs, ["final"]).hidden[0]
    plain = single_pass(gqa, sequential.inputs, ["final"]).hidden[0]
    inputs = {n: t for n, t in mrope.inputs.items() if n not in ("position_ids", "mm_token_type_ids")}
    real = mrope.inputs["attention_mask"].bool()
    gqa.model.rope_deltas = None
    torch.testing.assert_close(plain[real], stock(gqa, inputs).last_hidden_state[real], rtol=0, atol=0)
    inputs["mm_token_type_ids"] = mrope.inputs["mm_token_type_ids"]
    torch.testing.assert_close(own[real], stock(gqa, inputs).last_hidden_state[real], rtol=0, atol=0)
    gqa.model.rope_deltas = None
    assert (own - plain)[real].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": ["4"]}, "no layer '4'"),
        ({"layers": []}, "no layer is wanted"),
        ({"layers": ["0"], "rows": "mean"}, "query_mask"),
        ({"layers": ["0"], "rows": "sum", "query_mask": torch.ones(2, 3)}, "'mean' or 'heads'"),
        ({"layers": ["0"], "rows": "mean", "row_layers": ["final"]}, "no attention"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(gqa, settings, says):
    with pytest.raises(ValueError, match=says):
        single_pass(
            gqa, {"attention_mask": None, "position_ids": None}, inputs_embeds=torch.zeros(2, 3, 64), **settings
        )
