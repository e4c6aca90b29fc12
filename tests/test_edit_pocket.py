"""The pocket editor's making: crops, losses, an autoencoder whose training can be interrupted, a pipeline to train."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline
from safetensors.torch import load_file

from edit.editor import Editor, Settings
from edit.frames import for_single_frames
from edit.pocket import vae as making
from edit.pocket.build import SETTINGS, BuildConfig, build, build_transformer, build_vae, history
from edit.pocket.vae import Crops, Optimizer, VaeConfig, decode, encode, losses_of, train_vae
from store.errors import Refusal


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(making, "VALIDATION", 2)
    return {"steps": 4, "batch_size": 4, "crop": 32, "checkpoint_every": 2, "warmup": 1}


def test_crops_are_those_of_their_step_and_some_have_boxes():
    config = VaeConfig(steps=6, batch_size=8)
    whole = list(Crops(config, 0))
    assert all(batch.shape == (8, 3, 64, 64) and batch.min() >= -1 and batch.max() <= 1 for batch in whole)
    assert torch.equal(next(iter(Crops(config, 4))), whole[4]) and not torch.equal(whole[0], whole[1])
    red = [((one[0] > 0.99) & (one[1] < -0.99) & (one[2] < -0.99)).sum() for batch in whole for one in batch]
    assert 3 <= sum(count > 20 for count in red) <= 40


def test_the_losses_are_those_of_plain_numpy():
    torch.manual_seed(0)
    vae, frames = for_single_frames(build_vae()), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        found = {name: float(value) for name, value in losses_of(vae, frames).items()}
        mean = encode(vae, frames)[:, :16]
        error = (decode(vae, mean) - frames).numpy()
    edges = np.abs(np.diff(error, axis=2)).mean() + np.abs(np.diff(error, axis=3)).mean()
    expected = {"l1": np.abs(error).mean(), "l2": (error**2).mean(), "edges": edges, "size": (mean.numpy() ** 2).mean()}
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_step_changes_what_a_frame_meets_and_nothing_else():
    torch.manual_seed(0)
    vae = for_single_frames(build_vae())
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    optimizer = Optimizer(vae, 1e-2)
    sum(losses_of(vae, torch.rand(2, 3, 32, 32) * 2 - 1).values()).backward()
    optimizer.step()
    kernels = [name for name, value in before.items() if value.ndim == 5 and value.shape[2] == 3]
    for name in kernels:
        changed = (vae.state_dict()[name] != before[name]).flatten(3).any(3).any(0).any(0)
        assert changed.tolist() == [False, False, "time_conv" not in name], name
    assert len(kernels) > 20 and all(parameter.grad is None for parameter in vae.parameters())


def test_an_interrupted_training_ends_with_the_same_autoencoder(quick, tmp_path, monkeypatch):
    train_vae(VaeConfig(tmp_path / "whole", **quick))
    save = making.save_checkpoint

    def save_and_die(path, step, *more):
        save(path, step, *more)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(making, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_vae(VaeConfig(tmp_path / "parts", **quick))
    train_vae(VaeConfig(tmp_path / "parts", **quick))
    whole, parts = (load_file(tmp_path / n / "vae/diffusion_pytorch_model.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    log = [json.loads(line) for line in (tmp_path / "parts" / "vae.jsonl").read_text().splitlines()]
    assert [line.get("from_step", line.get("step")) for line in log] == [0, 2, 2, 4]
    stored = AutoencoderKLQwenImage.from_pretrained(tmp_path / "whole" / "vae")
    assert len(stored.config.latents_std) == 16 and min(stored.config.latents_std) > 0
    start, again = tmp_path / "start", tmp_path / "again"
    build(BuildConfig(tmp_path / "whole" / "vae", out=start))
    build(BuildConfig(tmp_path / "whole" / "vae", start / "transformer", out=again, seed=1))
    editor, other = Editor.load(start), Editor.load(again)
    assert editor.settings == SETTINGS and isinstance(editor.pipeline, QwenImageEditPipeline)
    drawn, taken = (one.pipeline.transformer.state_dict() for one in (editor, other))
    assert all(torch.equal(drawn[name], taken[name]) for name in drawn)


def test_a_training_log_comes_behind_that_of_the_editor_it_began_with(tmp_path):
    logs = {}
    for name, began in (("first", "start"), ("base", "taught")):
        told = [{"from_step": 0, "editor": str(tmp_path / began)}, {"step": 2, "loss": 0.1}]
        logs[name] = "".join(json.dumps(line) + "\n" for line in told)
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(logs[name])
    (tmp_path / "taught" / "transformer").mkdir(parents=True)
    assert history(tmp_path / "base" / "log.jsonl") == logs["base"]
    (tmp_path / "taught" / "transformer" / "log.jsonl").write_text(history(tmp_path / "first" / "log.jsonl"))
    assert history(tmp_path / "base" / "log.jsonl") == logs["first"] + logs["base"]


def test_parts_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(Refusal, match="train them first"):
        build(BuildConfig(tmp_path / "nowhere", out=tmp_path / "editor"))
    assert not (tmp_path / "editor").exists()


def test_the_editor_is_small_enough_to_ship():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in made.parameters()) for made in (build_vae(), build_transformer(128))]
    assert 2 * sum(sizes) < 25e6, "bytes in bfloat16"
    assert Settings().area == 64 * SETTINGS.area
