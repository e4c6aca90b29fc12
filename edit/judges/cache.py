"""Answers on the disk, under a hash of everything that determines them: what was asked once is not asked again."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from edit.endpoints.wire import Answer
from store.errors import Refusal
from store.places import as_refusal


def key_of(asked: Mapping[str, Any], source: Image.Image, edited: Image.Image) -> str:
    """A name (hex) for a question: ``asked`` (who, how, in what words; JSON-able) about the pixels of two pictures."""
    found = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for picture in (source, edited):
        found.update(f"\n{picture.mode} {picture.width} {picture.height}\n".encode())
        found.update(picture.tobytes())
    return found.hexdigest()


class AnswerCache:
    """A folder of small JSON files, one an answer; threads and processes may share it.

    Raises
    ------
    Refusal
        The folder cannot be made or written.
    """

    def __init__(self, folder: Path):
        self.folder = folder.expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(f"--cache {self.folder} cannot be made: {error.strerror}; give another folder") from error

    def path_of(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Answer | None:
        """The answer of a key; null where there is none, or, with a warning, where its file is damaged."""
        path = self.path_of(key)
        try:
            stored = json.loads(path.read_bytes())
            answer = Answer(**stored["answer"])
            if stored["key"] != key or stored["checksum"] != _checksum(answer):
                raise ValueError("its content is not what was written")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            warnings.warn(f"{path} is damaged ({error}): it is asked again", stacklevel=2)
            return None
        return answer

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer: temporary file → fsync → rename.

        Raises
        ------
        Refusal
            It cannot be written.
        """
        path = self.path_of(key)
        content = json.dumps({"key": key, "answer": answer._asdict(), "checksum": _checksum(answer)}, indent=1)
        temporary = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except OSError as failure:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            refusal = as_refusal(failure, path)
            if refusal is failure:
                refusal = Refusal(f"--cache {self.folder} cannot be written: {failure.strerror}; give another folder")
            raise refusal from failure


def _checksum(answer: Answer) -> str:
    return hashlib.sha256(json.dumps(answer).encode()).hexdigest()[:16]
