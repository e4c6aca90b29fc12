"""Text and bytes that go safely into HTML."""

import base64
import html
import json
import math
import re
from collections.abc import Mapping
from typing import Any

ABSENT = "–"
"""What is shown where a value is null; a number that is none is shown as NaN."""
# What ends a sentence is followed by a capital: not the stop of a number, of a file's name, of "e.g. this".
SENTENCE = re.compile(r"(?<=[^\s.][.!?])\s+(?=[A-Z“\"])")

SHORTEST_LEAD = 25


def escaped(value: Any) -> str:
    """``value`` as text for an element or a quoted attribute; a dash for null. NUL, which HTML cannot hold, is �."""
    return ABSENT if value is None else html.escape(str(value).replace("\0", "\ufffd"), quote=True)


def prose(text: str) -> str:
    """Paragraphs of an author's text: an empty line parts them, `backticks` mark code; nothing else is markup."""
    paragraphs = [escaped(part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    return "\n".join(f'<p dir="auto">{marked(part)}</p>' for part in paragraphs)


def marked(text: str) -> str:
    """Text that is escaped already, with its `backticks` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def lead(answer: str) -> tuple[str, str]:
    """The first sentence of an answer, and the rest of it; a word or two ("No.") take the next sentence along."""
    answer = answer.strip()
    for end in SENTENCE.finditer(answer):
        if end.start() >= SHORTEST_LEAD:
            return answer[: end.start()], answer[end.end() :]
    return answer, ""


def data_uri(content: bytes, kind: str) -> str:
    """``content`` as an address that holds it, of media type ``kind``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def download(content: bytes, kind: str, file: str, label: str) -> str:
    """Return a link that saves ``content`` under the name ``file``."""
    return f'<a class="get" download="{escaped(file)}" href="{data_uri(content, kind)}">{escaped(label)}</a>'


def plain(value: Any) -> Any:
    """``value`` as JSON can say it: mappings, lists, text, whole and finite numbers; all else as its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    return str(value)


def as_json(value: Any) -> bytes:
    """``value`` as JSON that any reader takes, in the order it has."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False).encode("utf-8", "replace")
