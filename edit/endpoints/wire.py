"""What two kinds of endpoint are sent and answer: OpenAI's chat completions and Gemini's generateContent."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from PIL import Image

Kind = Literal["openai", "gemini"]
URLS = {"openai": "https://api.openai.com/v1", "gemini": "https://generativelanguage.googleapis.com/v1beta"}
"""Where each kind is served by those who made it."""
SHOWN = 160
"""Characters of somebody else's words in a reason."""
MOST_TOKENS = 10**9  # more than any answer's usage


class Answer(NamedTuple):
    """A model's words."""

    text: str
    tokens_in: int
    tokens_out: int
    ended: str | None = None
    """Why the model did not say all, in the endpoint's words; null where it did."""


@dataclass(frozen=True)
class Question:
    """What a model behind an endpoint is asked."""

    text: str
    schema: Mapping[str, Any]
    """JSON schema of the answer."""
    pictures: tuple[Image.Image, ...] = ()
    """Shown before the text, in this order."""
    system: str | None = None
    """How the model is to behave, if that is said apart."""
    seed: int | None = None
    """Of sampling, where the endpoint takes one."""


class Malformed(ValueError):  # noqa: N818 - an answer about an answer
    """What came is not what this kind of endpoint answers; the message says why."""


@dataclass(frozen=True)
class Wire:
    """How a model behind an endpoint is asked."""

    kind: Kind
    base: str
    """URL up to the version, such as https://api.openai.com/v1."""
    model: str
    temperature: float | None
    max_tokens: int

    @property
    def url(self) -> str:
        """Where requests go."""
        if self.kind == "openai":
            return f"{self.base}/chat/completions"
        return f"{self.base}/models/{quote(self.model.removeprefix('models/'), safe='')}:generateContent"

    def headers(self, key: str | None) -> dict[str, str]:
        """Of a request, with the key if there is one."""
        own = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is None:
            return own
        return own | ({"Authorization": f"Bearer {key}"} if self.kind == "openai" else {"x-goog-api-key": key})

    def body(self, question: Question) -> bytes:
        """Of a request: the pictures as PNG, then the text."""
        pictures = [base64.b64encode(png(picture)).decode() for picture in question.pictures]
        chosen = {"temperature": self.temperature, "seed": question.seed}
        sampling = {name: value for name, value in chosen.items() if value is not None}
        made = self._openai if self.kind == "openai" else self._gemini
        return json.dumps(made(question, pictures, sampling)).encode()

    def _openai(self, question: Question, pictures: list[str], sampling: dict[str, Any]) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{one}"}} for one in pictures]
        system = [{"role": "system", "content": question.system}] if question.system else []
        schema = {"name": "answer", "strict": True, "schema": question.schema}
        return {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
            "response_format": {"type": "json_schema", "json_schema": schema},
            "max_completion_tokens": self.max_tokens,
        } | sampling

    def _gemini(self, question: Question, pictures: list[str], sampling: dict[str, Any]) -> dict[str, Any]:
        parts = [{"inline_data": {"mime_type": "image/png", "data": one}} for one in pictures]
        system = {"systemInstruction": {"parts": [{"text": question.system}]}} if question.system else {}
        return system | {
            "contents": [{"role": "user", "parts": [*parts, {"text": question.text}]}],
            "generationConfig": {
                "responseMimeType": "application/json",
                "responseJsonSchema": question.schema,
                "maxOutputTokens": self.max_tokens,
            }
            | sampling,
        }

    def answer(self, body: bytes) -> tuple[Answer, bool]:
        """What the endpoint answered, and whether it said how many tokens that took (they are 0 otherwise).

        Raises
        ------
        Malformed
            It is no JSON, or not of this kind.
        """
        try:
            told = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"its answer is no JSON: {body[:200].decode(errors='replace')}") from error
        try:
            said, ended, usage = _openai_said(told) if self.kind == "openai" else _gemini_said(told)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Malformed(message_in(body) or f"its answer is not of the kind {self.kind}: {told}") from error
        counts = [count if type(count) is int and 0 <= count <= MOST_TOKENS else None for count in usage]
        known = None not in counts and counts[0] > 0
        return Answer(said, *(counts if known else (0, 0)), ended), known


def _openai_said(told: Mapping[str, Any]) -> tuple[str, str | None, tuple[Any, Any]]:
    choice = told["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    ended = None if finish in (None, "stop") else str(finish)
    if refusal := message.get("refusal"):
        ended = f"refusal: {refusal}"
    usage = told.get("usage") or {}
    return _text(content), ended, (usage.get("prompt_tokens"), usage.get("completion_tokens"))


def _gemini_said(told: Mapping[str, Any]) -> tuple[str, str | None, tuple[Any, Any]]:
    usage = told.get("usageMetadata") or {}
    out = usage.get("candidatesTokenCount") or 0
    thought = usage.get("thoughtsTokenCount") or 0  # these are paid as answers are
    tokens = (usage.get("promptTokenCount"), out + thought)
    if not told.get("candidates"):
        return "", f"blocked: {told['promptFeedback']['blockReason']}", tokens
    candidate = told["candidates"][0]
    parts = (candidate.get("content") or {}).get("parts") or []
    said = "".join(_text(part.get("text") or "") for part in parts if not part.get("thought"))
    finish = candidate.get("finishReason")
    return said, None if finish in (None, "STOP") else str(finish), tokens


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def message_in(body: bytes) -> str | None:
    """The message of an error in either kind's JSON; null where there is none."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if isinstance(told, list) and told:  # as Gemini does at times
        told = told[0]
    error = told.get("error") if isinstance(told, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) and message else None


def shown(text: str, length: int = SHOWN) -> str:
    """Somebody else's words on one line, cut to what fits a message."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def png(picture: Image.Image) -> bytes:
    """A picture, without loss and without what is written beside its pixels."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1, icc_profile=None)
    return stream.getvalue()
