"""The logit lens: the head is the model's own, the numbers are loops over tokens, and other checkpoints are refused."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.states import lens
from analysis.states.lens import Head, Lens, unigram
from extract.model import load_model, weight_hashes
from extract.pocket.build import WEIGHTS
from store.errors import Refusal


def identity_of(folder, model=None):
    return {"model": model or "pocket", "revision": None, "weights": weight_hashes(folder, False)}


@pytest.fixture(scope="module")
def head():
    return Head.of(identity_of(WEIGHTS))


@pytest.fixture(scope="module")
def passed():
    """The pocket model's logits of some text, and its last block's states before and after the norm."""
    model = load_model(WEIGHTS, torch.device("cpu"))
    kept = {}
    decoder = model.base_model.language_model
    decoder.layers[-1].register_forward_hook(lambda module, given, out: kept.update(block=out))
    decoder.norm.register_forward_hook(lambda module, given, out: kept.update(final=out))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(40, 90)[None]).logits[0].float()
    block = kept["block"][0] if isinstance(kept["block"], tuple) else kept["block"]
    return logits, block[0], kept["final"][0]


def test_the_lens_at_final_gives_the_models_own_logits(head, passed):
    logits, _, final = passed
    found = head.logits(final, normed=True)
    assert found.dtype == torch.float32
    # The model rounds its logits to bfloat16: eight bits.
    assert torch.allclose(found, logits, rtol=2**-8, atol=2**-6)


def test_the_last_block_passes_the_models_own_norm_first(head, passed):
    logits, block, _ = passed
    assert torch.allclose(head.logits(block, normed=False), logits, rtol=2**-8, atol=2**-6)
    assert not torch.allclose(head.logits(block, normed=True), logits, rtol=0.1, atol=1)


def test_pieces_of_the_head_and_of_the_tokens_change_nothing_that_matters(head, passed, monkeypatch):
    _, _, final = passed
    whole = head.logits(final, normed=True)
    monkeypatch.setattr(lens, "HEAD_ROWS", 100)
    assert torch.allclose(head.logits(final, normed=True), whole, atol=1e-4)


def heard(head, states_lnw, next_n, layers=("0", "final")):
    one = Lens(head, layers, next_n)
    for layer, states_nw in zip(layers, states_lnw, strict=True):
        one.add(layer, states_nw, slice(0, len(next_n)))
    return one


@pytest.fixture(scope="module")
def asked(head, passed):
    """Two layers asked of 50 tokens, of which every fifth has no next one; with their logits."""
    _, block, final = passed
    next_n = np.arange(41, 91)
    next_n[::5] = -1
    logits = [head.logits(block, False).double().numpy(), head.logits(final, True).double().numpy()]
    return heard(head, [block, final], next_n), next_n, logits


def test_numbers_of_a_layer_are_those_of_a_loop_over_tokens(asked):
    one, next_n, logits = asked
    images_n = np.repeat(np.arange(10), 5)
    found = {(row["layer"], row["metric"]): row for row in one.table(images_n).to_dicts()}
    for place, layer in enumerate(("0", "final")):
        log_p, top1, inverse, entropy, agreement = [], [], [], [], []
        for n, scores in enumerate(logits[place]):
            logs = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
            entropy.append(-(np.exp(logs) * logs).sum())
            agreement.append(scores.argmax() == logits[1][n].argmax())
            if next_n[n] >= 0:
                log_p.append(logs[next_n[n]])
                top1.append(scores.argmax() == next_n[n])
                inverse.append(1 / (1 + (scores > scores[next_n[n]]).sum()))
        wanted = dict(zip(lens.METRICS, (log_p, top1, inverse, entropy, agreement), strict=True))
        for metric, values in wanted.items():
            row = found[layer, metric]
            assert row["value"] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-4)
            assert (row["n"], row["images"]) == (len(values), 10)
            assert row["low"] <= row["value"] <= row["high"]


def test_little_room_for_logits_changes_no_number(head, passed, asked, monkeypatch):
    one, next_n, _ = asked
    monkeypatch.setattr(lens, "LOGIT_BYTES", 4 * head.vocabulary * 7)
    _, block, final = passed
    other = heard(head, [block, final], next_n)
    assert np.allclose(one.log_p, other.log_p, atol=1e-4, equal_nan=True)
    assert (one.top == other.top).all()


def test_readings_are_the_likeliest_tokens_as_text(head, asked):
    one, _, logits = asked
    tokens = pl.DataFrame({"text": list("abc")})
    found = one.readings(tokens)
    assert found.height == 6
    first = found.filter(layer="0").row(1, named=True)
    assert first["top"] == head.say(int(logits[0][1].argmax()))
    assert 0 < first["p"] <= 1


def test_the_unigram_floor_is_counts_plus_one():
    next_n, frequent = np.array([0, 2, -1, 2]), np.array([5, 0, 8, 1])
    found = {row["metric"]: row for row in unigram(next_n, frequent, np.arange(4)).to_dicts()}
    p = (frequent + 1) / (frequent + 1).sum()
    assert found["log_p"]["value"] == pytest.approx(np.mean([np.log(p[0]), np.log(p[2]), np.log(p[2])]), rel=1e-5)
    assert found["top1"]["value"] == pytest.approx(2 / 3)
    assert found["rank_inverse"]["value"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["log_p"]["n"] == 3


@pytest.fixture
def copied(tmp_path):
    """The pocket checkpoint in a folder of its own."""
    return shutil.copytree(WEIGHTS, tmp_path / "model")


def test_a_checkpoint_with_other_bytes_is_refused_by_the_name_of_the_file(copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=r"not the model of the store: model\.safetensors"):
        Head.of(identity_of(WEIGHTS), str(copied))


def test_another_norm_epsilon_is_another_checkpoint(copied):
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match=r"config\.json"):
        Head.of(identity_of(WEIGHTS), str(copied))


def test_norm_and_head_are_found_in_shards_under_old_names_and_only_their_files_are_checked(copied, head, passed):
    tensors = load_file(copied / "model.safetensors")
    (embed,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    (norm,) = [name for name in tensors if lens.WANTED.fullmatch(name) and name.endswith("norm.weight")]
    (copied / "model.safetensors").unlink()
    parts = {
        "model-1.safetensors": {"model.embed_tokens.weight": tensors[embed] * 0 + 1},
        "model-2.safetensors": {"lm_head.weight": tensors[embed], "model.norm.weight": tensors[norm]},
        "model-3.safetensors": {"visual.norm.weight": tensors[norm] * 5},
    }
    for name, held in parts.items():
        save_file({key: value.clone() for key, value in held.items()}, copied / name, {"format": "pt"})
    identity = identity_of(copied)
    identity["weights"]["model-1.safetensors"] = identity["weights"]["model-3.safetensors"] = "not looked at"
    found = Head.of(identity, str(copied))
    _, block, _ = passed
    assert torch.equal(found.logits(block, False), head.logits(block, False))


def test_a_checkpoint_without_a_head_is_refused(copied):
    save_file({"model.norm.weight": torch.ones(128)}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match="no tensors of a final norm and a head"):
        Head.of(identity_of(copied), str(copied))


def test_a_store_of_random_weights_has_no_head():
    with pytest.raises(Refusal, match="--no-lens"):
        Head.of({"model": "pocket", "weights": {"config.json": "…"}})


def test_a_folder_that_is_gone_is_refused_and_the_hub_is_not_asked(monkeypatch):
    with pytest.raises(Refusal, match="there is none of that name here: give --checkpoint"):
        Head.of(identity_of(WEIGHTS, "my-own-model"))
