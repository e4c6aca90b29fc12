"""Finding a checkpoint, loading it, and saying exactly what it is."""

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from extract.config import POCKET, RANDOM_WEIGHTS, ExtractConfig
from extract.control import CONTROL_SEED
from extract.families import FAMILIES, family_of
from extract.pocket.build import WEIGHTS
from extract.sequence import Conditioner
from store.errors import Refusal

ATTENTION_KERNEL = "sdpa"
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "pillow")
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def find_checkpoint(model: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: ``pocket``, a local folder, or a hub id (downloaded to the hub's own cache).

    Raises
    ------
    Refusal
        It is none of these, of a family that is not known here, or not in safetensors.
    """
    folder = WEIGHTS if model == POCKET else Path(model).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=CHECKPOINT_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refusal(
                f"--model {model!r} is neither 'pocket', a folder here nor a model that the hub gives: {reason}"
            ) from error
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise Refusal(f"--model {model!r}: {folder} has no config.json that transformers reads") from error
    if kind not in FAMILIES:
        raise Refusal(f"--model {model!r} is a {kind!r}; this version extracts from {', '.join(FAMILIES)}")
    if not any(folder.glob("*.safetensors")):
        raise Refusal(f"--model {model!r}: {folder} holds no *.safetensors (pickled weights are never read)")
    return folder


def find_device(asked: str, local: int = 0) -> torch.device:
    """Where a model runs (``asked``: auto, cuda or cpu); of several GPUs, that of a machine's ``local``-th process.

    Raises
    ------
    Refusal
        A GPU is asked for and torch sees none.
    """
    available = "cuda" if torch.cuda.is_available() else "cpu"
    kind = available if asked == "auto" else asked
    if kind == "cuda" and available == "cpu":
        raise Refusal("--device cuda: torch sees no CUDA device on this machine; --device cpu works everywhere")
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def load_processor(folder: Path, max_pixels: int | None = None) -> ProcessorMixin:
    """The checkpoint's processor, shrinking pictures to ``max_pixels`` where that is given.

    Raises
    ------
    Refusal
        The family cannot shrink pictures to that area.
    """
    family = family_of(AutoConfig.from_pretrained(folder))
    processor = family.processor_class.from_pretrained(folder)
    if max_pixels is not None:
        family.shrink(processor, max_pixels)
    return processor


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The checkpoint in ``dtype`` on ``device``, in evaluation mode."""
    transformers.utils.logging.disable_progress_bar()
    model = family_of(AutoConfig.from_pretrained(folder)).model_class.from_pretrained(
        folder, dtype=dtype, attn_implementation=ATTENTION_KERNEL, use_safetensors=True
    )
    return model.to(device).eval()


def draw_model(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = CONTROL_SEED
) -> PreTrainedModel:
    """The checkpoint's architecture on ``device``, in evaluation mode, its weights drawn anew by the class itself.

    They are made where they are used, in ``dtype``, so that the largest model fits; the same seed, device and version
    of torch give the same bits. Nobody else's random numbers are touched.

    Raises
    ------
    Refusal
        The class's initialisation leaves weights that are not finite, or embeddings that are zero throughout.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = family_of(config).model_class._from_config(config, dtype=dtype, attn_implementation=ATTENTION_KERNEL)
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken is None and not model.get_input_embeddings().weight.any():
        broken = "the embedding of tokens"
    if broken is not None:
        raise Refusal(f"--control random-weights: {type(model).__name__} of {folder} leaves {broken} without values")
    return model.to(device).eval()


def model_for(config: ExtractConfig, folder: Path, device: torch.device) -> PreTrainedModel:
    """The model that an extraction runs: the checkpoint's, or the control's."""
    made = draw_model if config.control == RANDOM_WEIGHTS else load_model
    return made(folder, device, getattr(torch, config.dtype))


@cache
def file_hash(path: Path) -> str:
    """The sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_hashes(folder: Path, drawn: bool) -> dict[str, str]:
    """The sha256 (hex) by name of the files that decide the weights; of ``drawn`` ones that is the configuration."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    return {name: file_hash(folder / name) for name in names if not drawn or name == "config.json"}


def processor_settings(conditioner: Conditioner) -> dict:
    """The image processor's settings that pixels depend on, JSON-able."""
    image = conditioner.processor.image_processor
    described = {name: getattr(image, name) for name in conditioner.family.settings}
    for name in ("size", "crop_size"):
        if name in described:
            described[name] = {edge: int(value) for edge, value in dict(described[name]).items() if value is not None}
    return json.loads(json.dumps(described, default=lambda v: list(v) if isinstance(v, tuple) else str(v)))


def library_versions(conditioner: Conditioner) -> dict[str, str]:
    """Versions of the libraries that matter; an editor's way with the picture is diffusers'."""
    return {name: version(name) for name in (*LIBRARIES, *(["diffusers"] if conditioner.editor else []))}


def identity(folder: Path, conditioner: Conditioner, config: ExtractConfig, device: torch.device) -> dict:
    """Everything that determines the bytes of the states, JSON-able; two stores of one identity may be joined.

    A control's has a key ``control`` with its name and seed; of drawn weights no checkpoint's hash is named.
    """
    editor = conditioner.editor
    control = {} if config.control == "none" else {"control": {"name": config.control, "seed": CONTROL_SEED}}
    return {
        "model": config.model if config.model == POCKET or not Path(config.model).exists() else Path(config.model).name,
        "revision": config.revision,
        "weights": weight_hashes(folder, config.control == RANDOM_WEIGHTS),
        "tokenizer": file_hash(folder / "tokenizer.json"),
        "processor": processor_settings(conditioner),
        "conditioning": "native" if editor is None else editor.name,
        "template": conditioner.template,
        "positions": conditioner.positions,
        "attention_kernel": ATTENTION_KERNEL,
        "queries": config.queries,
        "dtype": config.dtype,
        "device": device.type,
        # Padding and the split of work over threads change the last bit of a sum.
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "libraries": library_versions(conditioner),
        **control,
    }
