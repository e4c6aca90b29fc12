"""Other editors as baselines: tiny random editors of their real classes, read from folders and run to the end."""

import dataclasses
import inspect
import json
import shutil
import subprocess
import sys

import accelerate
import diffusers
import diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit as fibo
import diffusers.pipelines.flux.pipeline_flux_kontext as kontext
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as qwen
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as qwen_plus
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import save_tiny

import extract.model
from edit.baselines import BASELINES, Baseline
from edit.baselines.recipes import MEGAPIXEL, fibo_prompt, fibo_size, flux2_size, kontext_size
from store.errors import Refusal

INSTRUCTION = "make the second red cube from the left blue"
QWEN = [name for name, recipe in BASELINES.items() if recipe.positions]
OTHERS = [name for name in BASELINES if name not in QWEN]
every = pytest.mark.parametrize("name", list(BASELINES))
ONE_EACH = list({recipe.pipeline: name for name, recipe in BASELINES.items()}.values())
every_pipeline = pytest.mark.parametrize("name", ONE_EACH)
every_qwen = pytest.mark.parametrize("name", [name for name in QWEN if name in ONE_EACH])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, processor, tiny_model):
    """A function that gives the folder of a tiny editor, made once."""
    made = {}

    def find(name):
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name), processor, tiny_model)
        return made[name]

    return find


@pytest.fixture
def small(monkeypatch):
    """The pipelines work at a sixty-fourth of their million pixels (FIBO-Edit a sixteenth); FLUX.2 at any size."""
    for module in (qwen, qwen_plus):
        stock = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, stock=stock: stock(area / 64, ratio))
    eighth = [(w // 128 * 16, h // 128 * 16) for w, h in kontext.PREFERRED_KONTEXT_RESOLUTIONS]
    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", eighth)
    monkeypatch.setitem(fibo.PREFERRED_RESOLUTION, MEGAPIXEL, fibo.PREFERRED_RESOLUTION[256 * 256])


@pytest.fixture
def load(folder_of, small):
    """A function that loads a tiny baseline from its folder."""

    def read(name, **settings):
        return Baseline.load(name, folder_of(name), **{"dtype": torch.float32, "device": "cpu", **settings})

    return read


@pytest.fixture(scope="module")
def picture():
    values = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    return Image.fromarray(values)


def pixels(made):
    return np.asarray(made).astype(int)


@every
def test_every_baseline_runs_from_its_folder_and_gives_rgb_of_the_picture_s_size(name, load, picture):
    made = load(name).edit(picture, INSTRUCTION, seed=3, steps=2)
    assert (made.mode, made.size) == ("RGB", (90, 70))
    assert pixels(made).std() > 5


@every_pipeline
def test_the_picture_made_follows_from_picture_instruction_and_seed(name, load, picture):
    first, again = load(name), load(name)
    made = pixels(first.edit(picture, INSTRUCTION, seed=1, steps=2))
    assert (made == pixels(again.edit(picture, INSTRUCTION, seed=1, steps=2))).all()
    others = [
        first.edit(picture, INSTRUCTION, seed=2, steps=2),
        first.edit(picture, "remove the ball", seed=1, steps=2),
        first.edit(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), INSTRUCTION, seed=1, steps=2),
    ]
    assert all((made != pixels(other)).any() for other in others)


@every_pipeline
def test_the_guidance_of_its_documentation_is_in_force(name, load, picture, monkeypatch):
    baseline = load(name)
    made = pixels(baseline.edit(picture, INSTRUCTION, steps=2))
    monkeypatch.setitem(BASELINES, name, dataclasses.replace(BASELINES[name], guidance=1.5))
    assert (made != pixels(baseline.edit(picture, INSTRUCTION, steps=2))).any()


@every_pipeline
def test_it_takes_the_steps_of_its_documentation_where_none_are_asked_for(name, load, picture, monkeypatch):
    baseline = load(name)
    monkeypatch.setitem(BASELINES, name, dataclasses.replace(BASELINES[name], steps=3))
    baseline.edit(picture, INSTRUCTION)
    assert baseline.pipeline.num_timesteps == 3


@every
def test_the_table_names_keywords_that_the_installed_pipeline_takes(name):
    recipe = BASELINES[name]
    takes = inspect.signature(getattr(diffusers, recipe.pipeline).__call__).parameters
    sizes = recipe.size(900, 700) if recipe.size else {}
    given = {"image", "prompt", "num_inference_steps", "generator", "output_type", recipe.guides, *recipe.also, *sizes}
    assert given <= set(takes)


@every
def test_settings_say_what_was_run_and_are_json(name, load, folder_of, picture):
    recipe, baseline = BASELINES[name], load(name, dtype=torch.bfloat16)
    settings = baseline.settings
    assert baseline.pipeline.transformer.dtype == torch.bfloat16
    assert baseline.edit(picture, INSTRUCTION, steps=2).size == picture.size
    assert settings == json.loads(json.dumps(settings))
    assert settings["pipeline"] == recipe.pipeline and settings["id"] == str(folder_of(name))
    assert (settings["steps"], settings[recipe.guides]) == (recipe.steps, recipe.guidance)
    assert (settings["dtype"], settings["device"], settings["positions"]) == ("bfloat16", "cpu", "stock")
    assert settings["libraries"]["diffusers"] == diffusers.__version__


def test_a_hub_id_is_read_at_one_commit_which_settings_name(folder_of, picture, small, tmp_path, monkeypatch):
    # The hub's own cache holds it, and nobody is asked.
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / f"models--{BASELINES['flux2'].hub_id.replace('/', '--')}"
    shutil.copytree(folder_of("flux2"), kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    baseline = Baseline.load("flux2", dtype=torch.float32, device="cpu")
    assert (baseline.settings["id"], baseline.settings["revision"]) == ("black-forest-labs/FLUX.2-dev", commit)
    by_folder = Baseline.load("flux2", folder_of("flux2"), dtype=torch.float32, device="cpu")
    one, other = (pixels(each.edit(picture, INSTRUCTION, steps=2)) for each in (baseline, by_folder))
    assert (one == other).all()
    with pytest.raises(
        Refusal, match=r"flux-kontext: 'black-forest-labs/FLUX\.1-Kontext-dev' is not a folder or hub id"
    ):
        Baseline.load("flux-kontext", device="cpu")


def test_settings_tell_folders_of_other_weights_apart(own_copy, folder_of):
    def digest(folder):
        return Baseline.load("flux2", folder, device="cpu").settings["sha256"]

    assert digest(own_copy) == digest(folder_of("flux2"))
    moved = own_copy.rename(own_copy.with_name("moved"))
    path = moved / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight * 2 for name, weight in load_file(path).items()}, path, {"format": "pt"})
    assert digest(moved) != digest(folder_of("flux2"))


@every_qwen
def test_mrope_is_the_stock_pipeline_given_embeddings_by_three_dimensional_positions(name, load, picture):
    stock, mrope = load(name), load(name, positions="mrope")
    pipe, plus = stock.pipeline, name != "qwen-image-edit"
    module, area = (qwen_plus, 384 * 384) if plus else (qwen, MEGAPIXEL)
    width, height = module.calculate_dimensions(area, 90 / 70)[:2]
    seen = pipe.image_processor.resize(picture, height, width)
    embeds = []
    for text in (INSTRUCTION, " "):
        text = ("Picture 1: <|vision_start|><|image_pad|><|vision_end|>" if plus else "") + text
        inputs = pipe.processor(
            text=[pipe.prompt_template_encode.format(text)],
            images=seen,
            return_tensors="pt",
            return_mm_token_type_ids=True,
        )
        assert inputs["mm_token_type_ids"].any()
        with torch.no_grad():
            states = pipe.text_encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        embeds.append(states[:, pipe.prompt_template_encode_start_idx :])
    by_hand = pipe(
        image=picture,
        prompt_embeds=embeds[0],
        prompt_embeds_mask=torch.ones(embeds[0].shape[:2], dtype=torch.long),
        negative_prompt_embeds=embeds[1],
        negative_prompt_embeds_mask=torch.ones(embeds[1].shape[:2], dtype=torch.long),
        true_cfg_scale=4.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    by_hand = pixels(by_hand.resize(picture.size, Image.Resampling.LANCZOS))
    made = pixels(mrope.edit(picture, INSTRUCTION, seed=5, steps=2))
    assert (made == by_hand).all()
    assert (made != pixels(stock.edit(picture, INSTRUCTION, seed=5, steps=2))).any()
    assert mrope.settings["positions"] == "mrope"


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("size", [(90, 70), (64, 160), (131, 97)])
def test_the_result_is_made_on_the_grid_that_the_picture_is_read_on(name, size, load):
    # Cells of the result and of the picture carry the same rows and columns, so nothing is cropped or made square.
    baseline, seen = load(name), []
    baseline.pipeline.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["img_ids"]), with_kwargs=True
    )
    baseline.edit(Image.effect_noise(size, 80).convert("RGB"), INSTRUCTION, steps=2)
    ids = seen[0].reshape(-1, seen[0].shape[-1])
    of_result, of_picture = ids[ids[:, 0] == 0], ids[ids[:, 0] > 0]
    assert len(of_result) > 1
    assert torch.equal(of_result[:, 1:], of_picture[:, 1:])


@pytest.mark.parametrize("size", [(131, 97), (90, 70), (1300, 1000)])
def test_flux2_is_given_a_picture_of_which_it_crops_nothing(size, load, monkeypatch):
    baseline, seen = load("flux2"), []

    def preprocess(picture, height, width, resize_mode):
        seen.append((picture.size, (width, height), resize_mode))
        raise ValueError("far enough")

    monkeypatch.setattr(baseline.pipeline.image_processor, "preprocess", preprocess)
    with pytest.raises(Refusal, match="far enough"):
        baseline.edit(Image.new("RGB", size), INSTRUCTION, steps=2)
    given, kept, mode = seen[0]
    assert mode == "crop" and given == kept
    assert given[0] * given[1] == pytest.approx(min(size[0] * size[1], MEGAPIXEL), rel=0.25)


def test_sizes_are_those_that_the_pipelines_prefer():
    assert kontext_size(1920, 1080) == {"width": 1392, "height": 752, "max_area": 1392 * 752}
    assert kontext_size(300, 300) == {"width": 1024, "height": 1024, "max_area": MEGAPIXEL}
    assert fibo_size(600, 400) == {"width": 1248, "height": 832}
    assert flux2_size(640, 480) == {"width": 640, "height": 480}
    assert flux2_size(645, 495) == {"width": 640, "height": 480}
    assert flux2_size(50, 40) == {"width": 64, "height": 64}
    across, down = flux2_size(4000, 3000).values()
    assert across * down <= MEGAPIXEL and across / down == pytest.approx(4 / 3, rel=0.02)


def test_fibo_is_given_json_made_of_the_instruction_or_its_own():
    awkward = 'say "hello" \\ and\nleave — "edit_instruction"'
    assert json.loads(fibo_prompt(awkward)) == {"edit_instruction": awkward}
    own = json.dumps({"edit_instruction": "remove the ball", "lighting": {"conditions": "day"}})
    assert fibo_prompt(own) == own
    assert all(fibo.is_valid_edit_json(fibo_prompt(text)) for text in (awkward, own, "[1]", "null", "7"))


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize(("name", "positions"), [("qwen-image-edit", "mrope"), ("flux2", "stock")])
def test_weights_that_wait_in_main_memory_change_nothing(name, positions, offload, load, picture, monkeypatch):
    # diffusers' own hooks move the weights from and to where they wait, with the CPU in the place of a card.
    stock, by_layer = getattr(diffusers.DiffusionPipeline, f"enable_{offload}_cpu_offload"), accelerate.cpu_offload
    asked = []

    def enable(pipeline, device):
        asked.append(device)
        stock(pipeline, device="cpu")

    plain = load(name, positions=positions).edit(picture, INSTRUCTION, seed=4, steps=2)
    monkeypatch.setattr(extract.model, "find_device", lambda asked: torch.device("cuda"))
    monkeypatch.setattr(diffusers.DiffusionPipeline, f"enable_{offload}_cpu_offload", enable)
    # It takes the CPU's tensors for another device's where the device has a number.
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **given: by_layer(model, "cpu", **given))
    baseline = load(name, positions=positions, device="cuda", offload=offload)
    hooked = [module for module in baseline.pipeline.transformer.modules() if hasattr(module, "_hf_hook")]
    assert len(hooked) > 1 if offload == "sequential" else hooked == [baseline.pipeline.transformer]
    assert (pixels(baseline.edit(picture, INSTRUCTION, seed=4, steps=2)) == pixels(plain)).all()
    assert asked[0] == torch.device("cuda")
    assert (baseline.settings["offload"], baseline.settings["device"]) == (offload, "cuda")


def test_nothing_of_diffusers_is_imported_before_a_baseline_is_loaded():
    code = "import sys, edit, edit.baselines; sys.exit('diffusers' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("instruct-pix2pix", {}, "no baseline 'instruct-pix2pix'.*qwen-image-edit, .*fibo-edit"),
        ("flux2", {"offload": "disk"}, "offload 'disk'.*none, model, sequential"),
        ("flux2", {"offload": "model"}, "offload model is from a GPU.*offload none"),
        ("flux2", {"positions": "mrope"}, "flux2 does not read: give stock"),
        ("qwen-image-edit", {"positions": "4d"}, "positions '4d' are not known: give stock or mrope"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(name, settings, said, tmp_path):
    with pytest.raises(Refusal, match=said):
        Baseline.load(name, tmp_path / "nowhere", **{"device": "cpu", **settings})


def test_a_pipeline_that_the_installed_diffusers_lacks_is_refused_with_the_version_to_install(monkeypatch, folder_of):
    monkeypatch.setitem(BASELINES, "flux2", dataclasses.replace(BASELINES["flux2"], pipeline="Flux9Pipeline"))
    with pytest.raises(Refusal, match=r"no Flux9Pipeline; install diffusers 0\.42"):
        Baseline.load("flux2", folder_of("flux2"), device="cpu")


def test_a_folder_of_another_pipeline_is_refused_with_the_names_that_it_has(folder_of):
    with pytest.raises(Refusal, match=r"holds a QwenImageEditPlusPipeline: that is .*-2509, qwen-image-edit-2511"):
        Baseline.load("qwen-image-edit", folder_of("qwen-image-edit-2509"), device="cpu")


@pytest.mark.parametrize("left", [None, "", "{", "[]", "{}"])
def test_a_folder_without_a_readable_index_is_refused(left, tmp_path):
    if left is not None:
        (tmp_path / "model_index.json").write_text(left)
    with pytest.raises(Refusal, match=r"flux2.*(safetensors|holds a None)"):
        Baseline.load("flux2", tmp_path, device="cpu")


@pytest.fixture
def own_copy(folder_of, tmp_path):
    """A tiny FLUX.2 that may be spoilt."""
    return shutil.copytree(folder_of("flux2"), tmp_path / "flux2")


def test_pickled_weights_are_never_read(own_copy):
    class Evil:
        def __reduce__(self):
            return (own_copy.joinpath("ran").touch, ())

    weights = own_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({**load_file(weights), "evil": Evil()}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(Refusal, match="is not a folder or hub id of a whole Flux2Pipeline in safetensors"):
        Baseline.load("flux2", own_copy, device="cpu")
    assert not (own_copy / "ran").exists()


@pytest.mark.parametrize("library", ["evil", "diffusers"])
def test_code_that_comes_with_the_weights_is_never_run(library, own_copy):
    # A module of a library's name, beside a part, would stand in for the library.
    index = json.loads((own_copy / "model_index.json").read_text())
    kind = index["transformer"][1]
    index["transformer"] = [library, kind]
    (own_copy / "model_index.json").write_text(json.dumps(index))
    ran = own_copy / "ran"
    (own_copy / "transformer" / f"{library}.py").write_text(f"open({str(ran)!r}, 'w')\nclass {kind}: pass\n")
    with pytest.raises(
        Refusal, match=r"transformer .* is from 'evil', code that is never run here|not a folder or hub id"
    ):
        Baseline.load("flux2", own_copy, device="cpu")
    assert not ran.exists()


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", ["short", "lacking", "other"])
def test_weights_that_are_not_whole_are_refused(part, damage, own_copy):
    # By themselves the libraries draw at random what a text encoder's file lacks.
    path = next((own_copy / part).glob("*.safetensors"))
    weights = load_file(path)
    lost = max(name for name, weight in weights.items() if weight.ndim > 1)
    if damage == "lacking":
        del weights[lost]
    elif damage == "other":
        weights[lost] = torch.zeros(3, 5)
    save_file(weights, path, {"format": "pt"})
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-100])
    said = rf"the {part} of .* lacks the weight .*{lost}" if damage == "lacking" else "not .* a whole Flux2Pipeline"
    with pytest.raises(Refusal, match=said):
        Baseline.load("flux2", own_copy, device="cpu")


@pytest.mark.parametrize(
    ("name", "made", "instruction", "steps", "said"),
    [
        ("flux2", ("RGBA", (90, 70)), INSTRUCTION, 2, "mode RGBA: convert it to RGB"),
        ("flux2", ("RGB", (90, 70)), " \n", 2, "empty instruction"),
        ("flux2", ("RGB", (90, 70)), INSTRUCTION, 1, "1 steps.*give 2 or more"),
        ("flux2", ("RGB", (90, 70)), "make [IMG] blue", 2, r"'\[IMG\]', a special token"),
        ("flux2", ("RGB", (900, 70)), INSTRUCTION, 2, "no picture of 900 x 70 .*ratio"),
        ("flux-kontext", ("RGB", (90, 70)), "remove the</s> ball", 2, "'</s>', a special token"),
        ("qwen-image-edit", ("RGB", (90, 70)), "remove <|image_pad|>", 2, r"'<\|image_pad\|>', a special token"),
        ("qwen-image-edit", ("RGB", (9000, 3)), INSTRUCTION, 2, "no picture of 9000 x 3"),
    ],
)
def test_input_that_an_editor_cannot_be_given_is_refused(name, made, instruction, steps, said, load):
    with pytest.raises(Refusal, match=said):
        load(name).edit(Image.new(*made), instruction, steps=steps)


def test_braces_and_quotes_in_an_instruction_are_text(load, picture):
    assert load("qwen-image-edit").edit(picture, 'write "{0} {}" \\ on it', steps=2).size == picture.size


@every_pipeline
def test_a_result_that_is_not_finite_is_refused_and_not_black(name, load, picture):
    baseline = load(name)
    with torch.no_grad():
        for weight in baseline.pipeline.transformer.proj_out.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(Refusal, match=rf"{name} made a picture that is not finite.*seed 7"):
        baseline.edit(picture, INSTRUCTION, seed=7, steps=2)


def test_adapters_on_the_twenty_billion_config_are_240_modules_of_23_592_960_parameters():
    from diffusers import QwenImageTransformer2DModel
    from peft.tuners.lora import LoraLayer

    from edit.config import TrainConfig
    from edit.train import TARGETS, add_lora, trained

    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
        whole = sum(weight.numel() for weight in transformer.parameters())
        add_lora(transformer, TrainConfig())
    adapted = [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]
    config = transformer.peft_config["default"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (16, 16, "gaussian")
    assert config.target_modules == set(TARGETS)
    assert len(adapted) == 240
    assert sum(weight.numel() for weight in trained(transformer)) == 23_592_960
    assert sum(weight.numel() for weight in transformer.parameters() if not weight.requires_grad) == whole
    assert round(whole / 1e9, 1) == 20.4
