"""Models of the recipe, found here or on the hub, and named by what their files hold."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from edit.config import POCKET
from extract.families import family_of
from extract.model import CHECKPOINT_FILES, file_hash
from store.errors import Refusal

HASHED = (".json", ".safetensors", ".txt", ".jinja")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with weights; ``commit`` where the hub gave it."""

    name: str
    folder: Path
    commit: str | None

    @cached_property
    def identity(self) -> dict:
        """What decides the weights, JSON-able: the hub's commit, or the sha256 (hex) of every file."""
        if self.commit:
            return {"name": self.name, "commit": self.commit}
        files = sorted(path for path in self.folder.rglob("*") if path.suffix in HASHED)
        return {"files": {path.relative_to(self.folder).as_posix(): file_hash(path) for path in files}}


def find(setting: str, name: str, index: str = "config.json", pocket: Path | None = None) -> Checkpoint:
    """The checkpoint that a setting names: a folder, a hub id (downloaded to the hub's own cache), or ``pocket``.

    Raises
    ------
    Refusal
        It is none of these, has no ``index`` file, or is not in safetensors.
    """
    folder, commit = pocket if name == POCKET and pocket else Path(name).expanduser(), None
    if not name.strip() or not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=CHECKPOINT_FILES))
            commit = folder.name
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refusal(f"--{setting} {name!r} is neither a folder here nor what the hub gives: {reason}") from error
    if not (folder / index).is_file():
        raise Refusal(f"--{setting} {name!r}: {folder} has no {index}; give a folder or hub id that has one")
    if not any(folder.rglob("*.safetensors")):
        raise Refusal(f"--{setting} {name!r}: {folder} holds no *.safetensors (pickled weights are never read)")
    return Checkpoint(name, folder, commit)


def config_of(setting: str, found: Checkpoint) -> PretrainedConfig:
    """The configuration of a transformers checkpoint (raises `Refusal`)."""
    try:
        return AutoConfig.from_pretrained(found.folder)
    except (OSError, ValueError) as error:
        raise Refusal(f"--{setting} {found.name!r}: transformers does not read its config.json") from error


def find_vision(setting: str, name: str, pocket: Path) -> Checkpoint:
    """A vision-language model of a kind that `extract` knows (raises `Refusal`)."""
    found = find(setting, name, pocket=pocket)
    try:
        family_of(config_of(setting, found))
    except Refusal as refusal:
        raise Refusal(f"--{setting} {name!r}: {refusal}") from refusal
    return found


def find_language(setting: str, name: str) -> Checkpoint:
    """A language model (raises `Refusal`)."""
    found = find(setting, name)
    if (kind := config_of(setting, found).model_type) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Refusal(f"--{setting} {name!r} is a {kind!r}, which transformers does not generate text with")
    return found
