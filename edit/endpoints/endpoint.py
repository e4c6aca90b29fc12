"""A model behind an OpenAI-compatible or Gemini endpoint: attempts, costs, a budget; its key is told to nobody."""

import contextlib
import email.utils
import ipaddress
import math
import os
import random
import threading
import time
from typing import Self
from urllib.parse import urlsplit

import httpx2

from edit.endpoints.config import EndpointSettings
from edit.endpoints.wire import URLS, Answer, Kind, Malformed, Question, Wire, message_in, shown
from store.errors import Refusal

MILLION = 1e6
HOPELESS = (401, 402, 403, 404, 405)
"""Statuses that every other question would get, too."""
WAITED_OUT = (408, 425, 429)
"""Statuses under 500 that pass."""
LARGEST_ANSWER = 2**20
"""Bytes of an endpoint's answer."""
SILENT_AFTER = 5
"""Questions in a row that got no answer in all their attempts: the endpoint is gone."""
FIRST_WAIT = 1.0
"""Seconds before the second attempt; doubled before each further one."""
POLL = 0.2
"""Seconds after which it is looked for Ctrl-C, which may not wake who waits for threads."""
PATCH = 28
"""Side in pixels of what an estimate takes for one token, as Qwen2.5-VL does."""
LETTERS = 4
"""Characters of a prompt that an estimate takes for one token."""
USUAL_ANSWER = 100
"""Tokens that an estimate takes an answer to have."""


class Unanswered(Exception):  # noqa: N818 - it ends as a failure of one question
    """One question got no answer; the message says why."""


class Closed(Refusal):
    """No other question would be answered either: a wrong key, a spent budget, an endpoint that is gone."""


class Endpoint:
    """Asks a model behind an endpoint; threads may share it. A context manager, which ends its connections.

    Parameters
    ----------
    kind
        ``openai`` (also vLLM, SGLang, llama.cpp, Ollama, OpenRouter …) or ``gemini``.
    model
        Its name there.
    settings
        See `EndpointSettings`.
    max_tokens
        Longest answer.

    Raises
    ------
    Refusal
        The URL, the model's name or the key cannot be used.
    """

    def __init__(self, kind: Kind, model: str, settings: EndpointSettings, max_tokens: int):
        if not model or not model.isprintable():
            raise Refusal(f"model {model!r}: give the name of a model of the endpoint")
        base, loopback = checked_url(settings.url or URLS[kind], settings.plain_http)
        self.settings = settings
        self.wire = Wire(kind, base, model, settings.temperature, max_tokens)
        self._key = key_from(settings.key_env)
        # Proxies of the environment are for other machines.
        self._client = httpx2.Client(
            headers=self.wire.headers(self._key), timeout=settings.timeout, trust_env=not loopback
        )
        self._stopped = threading.Event()
        self._lock = threading.Condition()
        self.spent = 0.0
        """Money that answers have cost so far."""
        self._answers, self._asking, self._pending, self._silent = 0, 0, 0.0, 0
        self.uncounted = 0
        """Answers that did not say how many tokens they took; they are counted as estimated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        self.stop()
        self._client.close()

    def stop(self) -> None:
        """Begin no further attempt."""
        self._stopped.set()

    def money(self, tokens_in: int, tokens_out: int) -> float:
        """What so many tokens cost."""
        return (tokens_in * self.settings.price_in + tokens_out * self.settings.price_out) / MILLION

    def ask(self, question: Question) -> Answer:
        """Ask, within the budget; what the answer cost is spent, whatever it says.

        Raises
        ------
        Unanswered
            This question got no answer.
        Closed
            No other one would.
        """
        tokens = tokens_of(question)
        reserved = self._reserve(self.money(tokens, USUAL_ANSWER))
        cost, answered = 0.0, False
        try:
            answer, known = self._attempt(self.wire.body(question))
            if not known:
                answer = answer._replace(tokens_in=tokens, tokens_out=-(-len(answer.text) // LETTERS))
            cost, answered = self.money(answer.tokens_in, answer.tokens_out), True
        finally:
            with self._lock:
                self._asking -= 1
                self._pending -= reserved
                self.spent += cost
                self._answers += answered
                self._lock.notify_all()
        with self._lock:
            self._silent = 0
            self.uncounted += not known
        return answer._replace(text=self._without_key(answer.text))

    def _reserve(self, expected: float) -> float:
        """Set money aside for a question: as much as one has cost so far, or is estimated to cost, the larger.

        Where that goes beyond the budget only by what is on its way, the answers are waited for: they may cost less.
        """
        budget = self.settings.budget
        with self._lock:
            while True:
                each = self.spent / self._answers if self._answers else 0.0
                expected = max(expected, each)
                # Those on their way were estimated before it was known what an answer costs.
                pending = max(self._pending, self._asking * each)
                if budget is None or self.spent + pending + expected <= budget:
                    break
                if self.spent + expected > budget or not self._asking:
                    raise Closed(
                        f"--budget {budget:g}: {self.spent:.4f} is spent and the next answer may cost {expected:.4f}; "
                        "what was answered is kept, the same command with a larger budget goes on"
                    )
                if self._stopped.is_set():
                    raise Closed("the run was stopped")
                self._lock.wait(POLL)
            self._asking += 1
            self._pending += expected
        return expected

    def _attempt(self, body: bytes) -> tuple[Answer, bool]:
        """Ask until there is an answer or no use in asking."""
        for attempt in range(1, self.settings.attempts + 1):
            if self._stopped.is_set():
                raise Closed("the run was stopped")
            asked_wait = None
            try:
                status, headers, content = self._send(body)
                if status == httpx2.codes.OK:
                    return self.wire.answer(content)
                trouble = self._words(status, content)
                if status in HOPELESS or 300 <= status < 400:
                    raise Closed(f"{self.wire.url} refuses: {trouble}")
                if status < 500 and status not in WAITED_OUT:
                    raise Unanswered(f"the endpoint refuses this question: {trouble}")
                asked_wait = retry_after(headers.get("Retry-After"), time.time())
            except Malformed as malformed:
                trouble = shown(self._without_key(str(malformed)))
            except httpx2.TimeoutException:
                trouble = f"nothing came within {self.settings.timeout:g} s"
            except httpx2.RequestError as error:
                trouble = shown(self._without_key(f"{type(error).__name__} {error}"))
            if attempt < self.settings.attempts:
                self._stopped.wait(self._wait(attempt, asked_wait))
        reason = f"no answer in {self.settings.attempts} attempts, at last: {trouble}"
        with self._lock:
            self._silent += 1
            gone = self._silent >= SILENT_AFTER
        if gone:
            raise Closed(f"{self.wire.url} left {SILENT_AFTER} questions in a row without an answer ({reason})")
        raise Unanswered(reason)

    def _wait(self, attempt: int, asked: float | None) -> float:
        """Seconds before the next attempt: what the endpoint asked for, else longer each time, never in step."""
        wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1) if asked is None else asked
        return min(wait, self.settings.longest_wait)

    def _send(self, body: bytes) -> tuple[int, httpx2.Headers, bytes]:
        """One attempt, with an end in time and size, which a server that trickles would not have."""
        end, content = time.monotonic() + self.settings.timeout, b""
        with self._client.stream("POST", self.wire.url, content=body) as response:
            for chunk in response.iter_bytes():  # as they come: chunks of a size would be waited for
                content += chunk
                if len(content) > LARGEST_ANSWER:
                    raise Unanswered(f"the endpoint's answer has more than {LARGEST_ANSWER} bytes: it is not read")
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("the answer trickles", request=response.request)
            return response.status_code, response.headers, content

    def _words(self, status: int, content: bytes) -> str:
        """The endpoint's own message on one short line."""
        message = message_in(content) or content[:2000].decode(errors="replace")
        return f"HTTP {status}: {shown(self._without_key(message))}"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def tokens_of(question: Question) -> int:
    """About how many tokens a question has."""
    seen = sum(math.ceil(one.width / PATCH) * math.ceil(one.height / PATCH) for one in question.pictures)
    return seen + -(-len((question.system or "") + question.text) // LETTERS)


def key_from(name: str | None) -> str | None:
    """The API key in an environment variable; null where no variable is named.

    Raises
    ------
    Refusal
        It is not set, or what is there is no key; the message does not show it.
    """
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise Refusal(f"--key-env {name}: the environment has no such variable, or an empty one; export it first")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise Refusal(
            f"--key-env {name}: what the variable holds is no key (blanks or characters that no header takes)"
        )
    return key


def checked_url(url: str, plain_http: bool) -> tuple[str, bool]:
    """A base URL without its last slash, and whether it is of this machine.

    Raises
    ------
    Refusal
        It is no http(s) URL, has a name, password, query or fragment in it, or would send without TLS elsewhere.
    """
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        parts, host = None, None
    if parts is not None and (parts.username is not None or parts.query or parts.fragment):
        raise Refusal("--url has a name, a password or a query in it; give the base URL alone, the key by --key-env")
    if not host or parts.scheme not in ("http", "https") or not url.isprintable() or " " in url:
        raise Refusal(f"--url {url!r} is no URL such as https://api.openai.com/v1")
    loopback = host == "localhost"
    with contextlib.suppress(ValueError):  # of a name
        loopback = loopback or ipaddress.ip_address(host).is_loopback
    if parts.scheme == "http" and not loopback and not plain_http:
        raise Refusal(
            f"--url {url} would send pictures and key without TLS; give https://, or --plain-http to accept it"
        )
    return url.rstrip("/"), loopback


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks to wait, of a number or an HTTP date; null where it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
