"""A judge behind an OpenAI-compatible or Gemini endpoint, whose answers are kept, and what it would cost."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from PIL import Image

from edit.endpoints.endpoint import USUAL_ANSWER, Endpoint, Unanswered, tokens_of
from edit.endpoints.wire import Kind, Question
from edit.judges.cache import AnswerCache, key_of
from edit.judges.config import JudgeEndpoint
from edit.judges.judge import Item, answer_for, verdict_of
from edit.judges.questions import ANSWER_SCHEMA, Failure, Verdict, prompt_for
from extract.omniedit import BadSample


class Estimate(NamedTuple):
    """What judging would ask for and cost, roughly: providers count the tokens of pictures in their own ways."""

    pictures: int
    cached: int
    tokens_in: int
    tokens_out: int
    money: float

    def __str__(self) -> str:
        return (
            f"{self.pictures - self.cached} pictures to ask about, {self.cached} answered before; "
            f"about {self.tokens_in:,} tokens there and {self.tokens_out:,} back, about {self.money:.4f} in money"
        )


class EndpointJudge(Endpoint):
    """A model behind an endpoint as a `edit.judges.judge.Judge`.

    Parameters
    ----------
    kind, model, settings, max_tokens
        As of `edit.endpoints.endpoint.Endpoint`.
    cache
        Of its answers; without one every picture is asked about.
    """

    def __init__(
        self,
        kind: Kind,
        model: str,
        settings: JudgeEndpoint,
        cache: AnswerCache | None = None,
        max_tokens: int = 2048,
    ):
        super().__init__(kind, model, settings, max_tokens)
        self.name, self.cache, self.concurrency = model, cache, settings.concurrency

    def judge(
        self, source: Image.Image, edited: Image.Image, instruction: str, box: Sequence[float] | None = None
    ) -> Verdict | Failure:
        """The model's verdict; see `edit.judges.judge.Judge`."""
        question = self._question(source, edited, instruction, box)
        try:
            answer = answer_for(self.cache, self._asked(question), source, edited, lambda: self.ask(question))
        except Unanswered as unanswered:
            return Failure(str(unanswered))
        return verdict_of(answer, self.money(answer.tokens_in, answer.tokens_out))

    def estimate(self, items: Iterable[Item]) -> Estimate:
        """What judging ``items`` would cost; nothing is asked. Pictures that cannot be read are left out."""
        pictures = cached = tokens_in = tokens_out = 0
        for item in items:
            try:
                source, edited = item.pictures()
            except (BadSample, OSError):
                continue
            question = self._question(source, edited, item.instruction, item.box)
            pictures += 1
            # A damaged file would be asked again.
            if self.cache is not None and self.cache.get(key_of(self._asked(question), source, edited)) is not None:
                cached += 1
                continue
            tokens_in += tokens_of(question)
            tokens_out += USUAL_ANSWER
        return Estimate(pictures, cached, tokens_in, tokens_out, self.money(tokens_in, tokens_out))

    def _question(
        self, source: Image.Image, edited: Image.Image, instruction: str, box: Sequence[float] | None
    ) -> Question:
        prompt = prompt_for(instruction, box, source.size)
        return Question(prompt, ANSWER_SCHEMA, (source, edited), seed=self.settings.sampling_seed)

    def _asked(self, question: Question) -> dict:
        """All that determines an answer beside the pictures."""
        return {"prompt": question.text, "seed": question.seed, **asdict(self.wire)}
