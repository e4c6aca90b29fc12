"""Training an editor: what is cached, what is learned, and that an interruption changes nothing."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_editor import SAMPLES, tiny_editor, tiny_study

import store
from edit import cache
from edit import train as training
from edit.ahead import read_ahead
from edit.config import TrainConfig
from edit.editor import Editor, Settings, call_at, pack
from edit.frames import for_single_frames
from edit.overlay import Overlay
from edit.pairs import Pairs
from edit.pocket.build import SETTINGS, build_vae
from edit.stages import lora_settings
from edit.states import StoredStates
from edit.train import Batch, Batches, draw, flow_loss, rate, train
from extract.model import file_hash
from store.errors import Refusal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return tiny_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def editor_folder(tmp_path_factory):
    return tiny_editor(tmp_path_factory.mktemp("editor") / "tiny")


def stock_pipeline(folder):
    parts = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
    return QwenImageEditPipeline.from_pretrained(folder, dtype=torch.float32, **parts)


@pytest.fixture(scope="module")
def config(study, editor_folder):
    return TrainConfig(
        store=str(study / "store.zarr"),
        data=str(study / "scenes"),
        editor=str(editor_folder),
        steps=6,
        warmup=2,
        learning_rate=1e-2,
        checkpoint_every=2,
        validate_every=3,
        validation=1,
        threads=1,
    )


def at(config, path, **more):
    return dataclasses.replace(config, out=path, **more)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train(at(config, out))
    return out


# The editor


def test_single_frames_go_through_the_same_weights_to_the_same_pictures():
    torch.manual_seed(0)
    vae, frames = build_vae().eval(), torch.rand(2, 3, 1, 32, 48) * 2 - 1
    names = list(vae.state_dict())
    with torch.no_grad():
        expected = vae.encode(frames).latent_dist.mode()
        back = vae.decode(expected).sample
        flat = for_single_frames(vae)
        assert torch.allclose(flat.encode(frames).latent_dist.mode(), expected, atol=1e-5)
        assert torch.allclose(flat.decode(expected).sample, back, atol=1e-5)
    assert list(flat.state_dict()) == names
    with pytest.raises(ValueError, match="single frames"):
        flat.encode(torch.zeros(1, 3, 5, 32, 32))


def test_at_another_size_the_stock_code_does_what_it_does(editor_folder, monkeypatch):
    pipe = stock_pipeline(editor_folder)
    pipe.set_progress_bar_config(disable=True)
    given = {
        "image": Image.effect_noise((90, 70), 80).convert("RGB"),
        "prompt_embeds": torch.randn(1, 7, 128, generator=torch.Generator().manual_seed(1)),
        "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
        "num_inference_steps": 2,
        "true_cfg_scale": 1.0,
        "output_type": "np",
    }
    made = call_at(QwenImageEditPipeline, SETTINGS)(pipe, generator=torch.Generator().manual_seed(3), **given).images
    size = SETTINGS.working_size(90, 70)
    monkeypatch.setattr(stock, "calculate_dimensions", lambda area, ratio: (*size, None))
    expected = pipe(generator=torch.Generator().manual_seed(3), **given).images
    assert made.shape[1:3] == (size[1], size[0]) and np.array_equal(made, expected)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 1000), (1920, 1080), (50, 4000)])
def test_the_stock_settings_work_at_the_size_that_the_stock_code_takes(size):
    assert Settings().working_size(*size) == stock.calculate_dimensions(1024 * 1024, size[0] / size[1])[:2]


def test_latents_are_the_pipelines_own(editor_folder):
    editor = Editor.load(editor_folder, torch.float32)
    picture = Image.effect_noise(SETTINGS.working_size(200, 150), 90).convert("RGB")
    made = editor.latents([picture])
    vae = AutoencoderKLQwenImage.from_pretrained(editor_folder, subfolder="vae")
    frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(made, vae.encode(frame).latent_dist.mode()[:, :, 0], atol=1e-4)
    assert editor.decode(made)[0].size == picture.size


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "tmp"])
def test_a_folder_that_is_no_editor_is_refused(folder, tmp_path):
    with pytest.raises(Refusal, match="no editor that can be loaded"):
        Editor.load(tmp_path if folder == "tmp" else folder)


# What it learns


class Velocity(torch.nn.Module):
    """Knows the target, and so the velocity."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, hidden_states, timestep, **_):
        count = self.target.shape[1]
        noisy = hidden_states[:, :count].float()
        velocity = (noisy - self.target) / timestep.float()[:, None, None]
        return (torch.cat([velocity, hidden_states[:, count:].float()], 1),)


def random_batch(seed=0, b=2):
    generator = torch.Generator().manual_seed(seed)
    source, target = (torch.randn(b, 16, 8, 12, generator=generator) for _ in range(2))
    return Batch(source, target, torch.randn(b, 5, 128, generator=generator), torch.ones(b, 5, dtype=torch.bool))


def test_who_knows_the_velocity_has_no_loss_and_steps_to_the_target():
    batch = random_batch()
    model = Velocity(pack(batch.target))
    noise, sigma = draw(0, 0, 0, batch.target)
    assert flow_loss(model, batch, noise, sigma).max() < 1e-8
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    at_t = pack(noise)
    for t in scheduler.timesteps:
        at_t = scheduler.step(model(at_t, t.expand(2) / 1000)[0], t, at_t, return_dict=False)[0]
    assert torch.allclose(at_t, pack(batch.target), atol=1e-5)


def test_the_loss_is_the_plain_one_by_numpy():
    batch = random_batch(3)
    noise, sigma = draw(1, 2, 3, batch.target)

    def model(hidden_states, **given):
        assert given["img_shapes"] == [[(1, 4, 6), (1, 4, 6)]] * 2 and given["encoder_hidden_states_mask"] is None
        return (0.5 * hidden_states,)

    def tokens(x):  # 2 × 2 cells a token, channel by channel
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)

    source, target, drawn = (tokens(x.numpy()) for x in (batch.source, batch.target, noise))
    along = sigma.numpy()[:, None, None]
    noisy = (1 - along) * target + along * drawn
    error = ((0.5 * noisy - (drawn - target)) ** 2).mean(2)
    assert np.allclose(flow_loss(model, batch, noise, sigma).numpy(), error.mean(1), rtol=1e-5)
    weight = 1 + 4.0 * (((target - source) ** 2).mean(2) > 0.1)
    expected = (error * weight / weight.mean(1, keepdims=True)).mean(1)
    assert np.allclose(flow_loss(model, batch, noise, sigma, 4.0).numpy(), expected, rtol=1e-5)


def test_noise_and_times_are_those_of_their_step_and_process():
    like = torch.zeros(3, 16, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(draw(0, 5, 1, like), draw(0, 5, 1, like), strict=True))
    for other in ((1, 5, 1), (0, 6, 1), (0, 5, 0)):
        assert not torch.equal(draw(0, 5, 1, like)[0], draw(*other, like)[0])
    times = torch.cat([draw(0, step, 0, like)[1] for step in range(2000)])
    assert times.min() > 0 and times.max() < 1 and abs(times.mean() - 0.5) < 0.02 and abs(times.std() - 0.208) < 0.01


def test_the_rate_rises_for_the_warm_up_and_falls_to_nothing():
    config = TrainConfig(steps=100, warmup=10)
    rates = [rate(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[10] == 1 and rates[55] == pytest.approx(0.5) and rates[99] < 0.001


def test_a_lora_is_trained_and_the_rest_is_left_as_it_was(config, trained, editor_folder):
    adapters = load_file(trained / training.LORA_WEIGHTS)
    assert len(adapters) == 2 * 2 * 4  # A and B, two blocks, four layers each
    assert {name.rsplit(".", 2)[1] for name in adapters} == {"lora_A", "lora_B"}
    assert any(value.abs().max() > 0 for name, value in adapters.items() if "lora_B" in name)
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == [3, 6] and all(np.isfinite(line["held_out"]) for line in lines[1:])
    assert lora_settings(trained)["overlay"] == Overlay().as_dict() | {"colour": list(Overlay().colour)}
    sheet = Image.open(trained / "validation" / "step-000006.png")
    opened = store.open(config.store)
    first = training.choose(opened, config)[1][0]
    width, height = SETTINGS.working_size(*opened.samples.select("width", "height").row(first))
    assert sheet.size == (3 * width, height)  # before, wanted, made


def test_the_lora_loads_in_stock_diffusers_and_gives_what_was_validated(config, trained, editor_folder):
    stock_pipe = stock_pipeline(editor_folder)
    plain = stock_pipe.transformer.state_dict()
    stock_pipe.load_lora_weights(trained, weight_name=training.LORA_WEIGHTS)
    with_lora = stock_pipe.transformer
    batch = random_batch()
    noise, sigma = draw(0, 0, 0, batch.target)
    with torch.no_grad():
        loaded = flow_loss(with_lora, batch, noise, sigma)
        editor = Editor.load(editor_folder, torch.float32)
        before = flow_loss(editor.pipeline.transformer, batch, noise, sigma)
        training.add_lora(editor.pipeline.transformer, config)
        adapters = load_file(trained / training.LORA_WEIGHTS)
        for name, value in editor.pipeline.transformer.named_parameters():
            if "lora" in name:
                value.copy_(adapters["transformer." + name.replace(".default", "")])
        ours = flow_loss(editor.pipeline.transformer, batch, noise, sigma)
    assert torch.allclose(loaded, ours, atol=1e-5) and not torch.allclose(loaded, before, atol=1e-3)
    assert all(
        torch.equal(plain[n], v)
        for n, v in Editor.load(editor_folder, torch.float32).pipeline.transformer.state_dict().items()
    )


class Killed(BaseException):
    pass


def test_an_interrupted_training_ends_with_the_same_weights(config, trained, tmp_path, monkeypatch):
    save = training.save_checkpoint

    def save_and_die(path, step, *more):
        save(path, step, *more)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train(at(config, tmp_path))
    assert not (tmp_path / training.LORA_WEIGHTS).exists()
    train(at(config, tmp_path))
    again, whole = (load_file(out / training.LORA_WEIGHTS) for out in (tmp_path, trained))
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    starts = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "from_step" in line]
    assert [start["from_step"] for start in starts] == [0, 4]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rank": 3}, "rank 16 .now 3"),
        ({"learning_rate": 1e-5}, "learning_rate"),
        ({"seed": 9}, "seed"),
        ({"overlay": Overlay(width=0.05)}, "overlay"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(config, trained, tmp_path, other, said):
    (tmp_path / "checkpoint.safetensors").write_bytes((trained / "checkpoint.safetensors").read_bytes())
    with pytest.raises(Refusal, match=f"other settings, {said}"):
        train(at(config, tmp_path, **other))


def test_a_checkpoint_of_another_editor_of_the_same_name_is_refused(config, trained, tmp_path):
    weights = next(Path(config.editor).glob("vae/*.safetensors"))
    before = weights.read_bytes()
    (tmp_path / "checkpoint.safetensors").write_bytes((trained / "checkpoint.safetensors").read_bytes())
    changed = load_file(weights)
    next(iter(changed.values())).view(-1)[0] += 1
    try:
        save_file(changed, weights)
        file_hash.cache_clear()
        with pytest.raises(Refusal, match="weights of the editor"):
            train(at(config, tmp_path))
    finally:
        weights.write_bytes(before)
        file_hash.cache_clear()


def test_four_bits_need_a_gpu_and_say_so(config, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(Refusal, match="nf4 need a CUDA device"):
            train(at(config, tmp_path, base="nf4"))
        return
    train(at(config, tmp_path, base="nf4", steps=2))
    assert (tmp_path / training.LORA_WEIGHTS).is_file()


@pytest.mark.parametrize("base", ["fp8", "float32"])
def test_frozen_weights_may_be_held_otherwise(config, tmp_path, base):
    train(at(config, tmp_path, base=base, steps=2))
    adapters = load_file(tmp_path / training.LORA_WEIGHTS)
    assert any(value.abs().max() > 0 for name, value in adapters.items() if "lora_B" in name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_can_be_trained_and_their_average_is_kept(config, tmp_path, editor_folder, optimizer):
    train(at(config, tmp_path, train="all", optimizer=optimizer, average=0.5, accumulate=2, steps=3))
    made = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    before = load_file(editor_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert made.keys() == before.keys()
    assert sum(not torch.equal(made[name], before[name]) for name in made) > len(made) / 2


# What is read from disk


def test_states_come_in_the_order_of_the_sequence(study):
    opened = store.open(study / "store.zarr")
    states, mask = StoredStates(opened, ["3", "final"]).read([4, 1])
    table = opened.tokens.collect().sort("sample", "position")
    for row, sample in enumerate((4, 1)):
        own = table.filter(sample=sample)
        read = {kind: opened.read([sample], ["3", "final"], kind)[0][0] for kind in ("image", "text")}
        counts = dict.fromkeys(read, 0)
        assert int(mask[row].sum()) == own.height
        for place, kind in enumerate(own["kind"].to_list()):
            kind = "image" if kind == "image" else "text"
            assert torch.equal(states[row, :, place], read[kind][:, counts[kind]])
            counts[kind] += 1
        assert not states[row, :, own.height :].any()


def test_batches_are_of_one_size_and_every_epoch_has_each_sample_once(study, config, trained):
    opened = store.open(study / "store.zarr")
    editor = Editor.load(config.editor)
    samples, _ = training.choose(opened, config)
    kept = cache.load(trained / "latents", opened, editor, samples, cache.Drawn(Overlay()))
    states = StoredStates(opened, ["final"])
    batches = Batches(config, kept, states, 0, 1)
    first, second = batches.epoch(0), batches.epoch(1)
    assert first != second and first == batches.epoch(0)
    assert all(len({kept.sizes[sample] for sample in batch}) == 1 for batch in first)
    flat = [sample for batch in first for sample in batch]
    assert len(flat) == len(set(flat)) and set(flat) <= set(samples)
    halves = [
        list(Batches(dataclasses.replace(config, batch_size=1), kept, states, rank, 2)(0, 3, CPU)) for rank in (0, 1)
    ]
    whole = list(batches(0, 3, CPU))
    for number, batch in enumerate(whole):
        assert torch.equal(batch.target, torch.cat([half[number].target for half in halves]))
    later = next(iter(batches(2, 3, CPU)))
    assert torch.equal(later.source, whole[2].source)


def test_a_gpu_is_read_ahead_of_and_a_cpu_is_not():
    begun = []

    def read(job):
        begun.append(job)
        return 10 * job

    ahead = read_ahead(read, range(6), 3, torch.device("cuda"))
    assert next(ahead) == 0
    assert set(begun) <= set(range(4)) and list(ahead) == [10, 20, 30, 40, 50], "no more than so many ahead"
    begun.clear()
    in_turn = read_ahead(read, range(6), 3, CPU)
    assert next(in_turn) == 0 and begun == [0] and list(in_turn) == [10, 20, 30, 40, 50]


def test_latents_are_encoded_once_and_never_taken_for_others(study, config, trained, monkeypatch):
    opened = store.open(study / "store.zarr")
    editor = Editor.load(config.editor)
    samples, _ = training.choose(opened, config)
    pairs = Pairs(opened, config.data)
    asked = []
    monkeypatch.setattr(Editor, "latents", lambda *given: asked.append(given))
    cache.build(trained / "latents", opened, pairs, editor, samples, cache.Drawn(Overlay()))
    assert not asked
    folder = cache.folder_of(trained / "latents", opened, editor, samples, cache.Drawn(Overlay()))
    assert folder.is_dir()
    others = [
        cache.folder_of(trained, opened, editor, samples, None),
        cache.folder_of(trained, opened, editor, samples, cache.Drawn(Overlay(width=0.05))),
        cache.folder_of(trained, opened, editor, samples, cache.Drawn(Overlay(), 0.5)),
        cache.folder_of(trained, opened, editor, samples[1:], cache.Drawn(Overlay())),
        cache.folder_of(
            trained, opened, Editor(editor.pipeline, Settings(area=96 * 96)), samples, cache.Drawn(Overlay())
        ),
    ]
    with torch.no_grad():
        next(editor.pipeline.vae.parameters()).add_(1)
    others.append(cache.folder_of(trained, opened, editor, samples, cache.Drawn(Overlay())))
    assert len({folder.name, *(one.name for one in others)}) == 7


def test_bystanders_frames_are_those_of_other_samples_and_no_target_has_one(study, config, tmp_path):
    opened = store.open(study / "store.zarr")
    editor, samples = Editor.load(config.editor), training.choose(opened, config)[0]
    drawn = cache.Drawn(Overlay(), 0.5)
    boxes, own = drawn.boxes(opened, samples), cache.Drawn(Overlay()).boxes(opened, samples)
    assert 0 < len(boxes) < len(own) == len(samples) and boxes == drawn.boxes(opened, samples)
    assert sum(boxes[sample] == own[sample] for sample in boxes) < len(boxes) / 2
    kept = {}
    for share in (0.5, None):
        given = cache.Drawn(Overlay(), share) if share else None
        cache.build(tmp_path, opened, Pairs(opened, config.data), editor, samples, given)
        kept[share] = cache.load(tmp_path, opened, editor, samples, given)
    for sample in samples:
        (with_frame, target), (without, same) = (one.read([sample]) for one in kept.values())
        assert torch.equal(target, same)
        assert torch.equal(with_frame, without) == (sample not in boxes)


def test_pairs_that_cannot_be_had_are_named_and_the_rest_is_encoded(study, config, tmp_path):
    import polars as pl

    scenes = tmp_path / "scenes"
    scenes.mkdir()
    (path,) = (study / "scenes").glob("*.parquet")
    table = pl.read_parquet(path)
    broken = [b"no picture" if number == 3 else one["bytes"] for number, one in enumerate(table["edited_img"])]
    struct = pl.Series("edited_img", [{"bytes": one, "path": None} for one in broken])
    table.with_columns(struct).filter(pl.int_range(pl.len()) != 5).write_parquet(scenes / path.name)
    opened = store.open(study / "store.zarr")
    editor, overlay = Editor.load(config.editor), Overlay()
    cache.build(tmp_path, opened, Pairs(opened, scenes), editor, range(8), cache.Drawn(overlay))
    kept = cache.load(tmp_path, opened, editor, range(8), cache.Drawn(overlay))
    assert set(kept.sizes) == {0, 1, 2, 4} and set(kept.missing) == {3, 5, 6, 7}
    assert "cannot be decoded" in kept.missing[3] and "another picture" in kept.missing[5]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layer": "42"}, "no layer '42'"),
        ({"tasks": ("swap", "sing")}, "no samples of the task 'sing'"),
        ({"data": "/nowhere"}, "no data at /nowhere"),
        ({"store": "/nowhere"}, "not a store"),
        ({"batch_size": 1000}, "smaller --batch-size"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(config, tmp_path, wrong, said):
    with pytest.raises(Refusal, match=said):
        train(at(config, tmp_path, **wrong))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"average": 1.0}, "--average"),
        ({"train": "all", "base": "nf4"}, "nf4"),
        ({"bystanders": 0.5}, "--bystanders is for --train all"),
        ({"train": "all", "bystanders": 1.5}, "--bystanders 1.5"),
        ({"optimizer": "muon"}, "muon"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(Refusal, match=said):
        TrainConfig(**wrong)


def test_there_are_as_many_pairs_as_scenes(study):
    opened = store.open(study / "store.zarr")
    pairs = list(Pairs(opened, study / "scenes").read(range(SAMPLES)))
    assert all(pair.source.size == pair.target.size and pair.box is not None for pair in pairs)


# Several processes


def together(config, out, *more, **environment):
    """Two processes that train, as `accelerate launch` starts them."""
    given = {"store": config.store, "data": config.data, "editor": config.editor, "out": out, "steps": 4, "warmup": 1}
    given |= {"checkpoint-every": 2, "validate-every": 2, "validation": 1, "threads": 1, "batch-size": 1}
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "edit", "train", *more]
    command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return subprocess.run([sys.executable, *command], env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "all"])
def test_two_processes_train_one_editor(config, tmp_path, train):
    out = tmp_path / "out"
    done = together(config, out, "--train", train, ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 2, 4]
    made = out / (training.LORA_WEIGHTS if train == "lora" else "transformer/diffusion_pytorch_model.safetensors")
    assert all(value.isfinite().all() for value in load_file(made).values())


@pytest.mark.slow
def test_processes_that_do_not_know_of_each_other_are_refused(config, tmp_path):
    done = together(config, tmp_path / "out")
    assert done.returncode and "set ACCELERATE_USE_CPU=1" in done.stderr
    assert not (tmp_path / "out" / "log.jsonl").exists()
