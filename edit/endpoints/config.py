"""How models behind endpoints are reached."""

import math
from dataclasses import dataclass

from store.errors import Refusal


@dataclass(frozen=True)
class EndpointSettings:
    """How an endpoint is reached, what it costs, and how long it is waited for."""

    url: str | None = None
    """Base URL of the endpoint up to its version, such as http://127.0.0.1:8000/v1; OpenAI's or Google's own where
    not given."""
    key_env: str | None = None
    """Name of the environment variable with the API key; no key is sent where not given."""
    temperature: float | None = 0.0
    """Sampling temperature; None leaves it out, for models that take none."""
    timeout: float = 120.0
    """Seconds in which one attempt has to be answered."""
    attempts: int = 6
    """Attempts for one answer; further ones only where waiting helps (429, 5xx, timeouts, lost connections)."""
    longest_wait: float = 60.0
    """Longest wait in seconds between two attempts, whatever the endpoint asks for."""
    price_in: float = 0.0
    """Price of a million tokens that are sent, in any currency."""
    price_out: float = 0.0
    """Price of a million tokens that are answered."""
    budget: float | None = None
    """Money after which nothing more is asked; needs the prices."""
    plain_http: bool = False
    """Allow a URL without TLS on another machine: pictures and key go there readable for all between."""

    def __post_init__(self):
        """Refuse numbers that make no sense."""
        if self.attempts < 1:
            raise Refusal(f"--attempts {self.attempts}: give 1 or more")
        for name in ("timeout", "longest_wait", "price_in", "price_out", "budget", "temperature"):
            value = getattr(self, name)
            lowest = name in ("timeout", "budget") and value == 0
            if value is not None and (not math.isfinite(value) or value < 0 or lowest):
                raise Refusal(f"--{name.replace('_', '-')} {value}: give a number over 0")
        if self.budget is not None and not (self.price_in or self.price_out):
            raise Refusal(f"--budget {self.budget} without prices: give --price-in and --price-out as well")
