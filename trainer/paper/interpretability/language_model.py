"""Explanations and simulations by a language model behind an OpenAI-compatible endpoint, as in the paper.

The explainer answers a chat. The simulator must give log-probabilities of its prompt, which completions do with
`echo`; vLLM has it, chat endpoints have not. All activations of a fragment come from one prompt in which they are unknown:
at each, the model's probabilities of the numbers from 0 to 10 make an expected value. Where the model's tokenizer splits
"10", the numbers end at 9.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.errors import BadConfig, TrainerError
from trainer.paper.interpretability import prompts
from trainer.paper.interpretability.explainers import Explanation, Simulation, Tokens
from trainer.paper.interpretability.records import LEVELS, Record

if TYPE_CHECKING:
    from openai import OpenAI

In = TypeVar("In")
Out = TypeVar("Out")
_LOGPROBS = 20
"""As many as vLLM gives unless told otherwise; OpenAI's code asked for 15."""
_AT_ONCE = 8
_WORDS = 60
_SECONDS = 600.0


class Endpoint:
    """One model behind one URL. The key is the environment's OPENAI_API_KEY."""

    def __init__(self, url: str, model: str) -> None:
        try:
            import openai
        except ImportError as error:
            raise BadConfig(
                "a language model as explainer needs the package openai: pip install 'steer[explain]'"
            ) from error
        self.model = model
        self._failure = openai.OpenAIError
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client: OpenAI = openai.OpenAI(base_url=url, api_key=key, timeout=_SECONDS)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The answer, most likely token by token."""
        answer = self._ask(
            self._client.chat.completions.create,
            messages=messages,
            max_tokens=_WORDS,
            temperature=0.0,
        )
        return answer.choices[0].message.content or ""

    def after(self, prompt: str) -> Mapping[str, float]:
        """Log-probabilities of the most likely next tokens."""
        answer = self._ask(
            self._client.completions.create,
            prompt=prompt,
            max_tokens=1,
            temperature=0.0,
            logprobs=_LOGPROBS,
        )
        return answer.choices[0].logprobs.top_logprobs[0]

    def within(self, prompt: str) -> tuple[list[str], list[Mapping[str, float] | None]]:
        """The prompt's tokens, each with what the model held likely in its place."""
        answer = self._ask(
            self._client.completions.create,
            prompt=prompt,
            max_tokens=1,
            temperature=0.0,
            logprobs=_LOGPROBS,
            echo=True,
        )
        found = answer.choices[0].logprobs
        if found is None or len(found.tokens or []) < 3:
            raise TrainerError(
                f"{self._client.base_url} gives no log-probabilities of the prompt's tokens for {self.model!r}; a "
                "simulator needs completions with echo and logprobs, which vLLM's server has"
            )
        # The last is the one token that had to be generated.
        return found.tokens[:-1], found.top_logprobs[:-1]

    def _ask(self, function: Callable[..., Any], **fields: Any) -> Any:
        try:
            return function(model=self.model, **fields)
        except self._failure as error:
            raise TrainerError(
                f"the language model {self.model!r} at {self._client.base_url} did not answer: {error}"
            ) from error


class LanguageModel:
    """An explainer whose explanations are simulated by a language model, too."""

    name = "llm"

    def __init__(self, explainer: Endpoint, simulator: Endpoint) -> None:
        self._explainer = explainer
        self._simulator = Simulator(simulator)
        self.about = (
            f"llm: {explainer.model} explains, {simulator.model} simulates by log-probabilities of the numbers from 0 to "
            f"{self._simulator.levels}"
        )

    def explain(self, train: Sequence[Record], largest: float) -> Explanation:
        answer = self._explainer.chat(prompts.explaining(train, largest))
        return _Text(prompts.explained(answer), self._simulator)


class Simulator:
    """Reads numbers and answers out of a model's log-probabilities."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    @cached_property
    def levels(self) -> int:
        """The largest number that is one token: 10, or 9."""
        tokens, _ = self._endpoint.within(prompts.line("a", str(LEVELS)) + "\n")
        return LEVELS if str(LEVELS) in tokens else LEVELS - 1

    def activations(self, explanation: str, tokens: Tokens) -> Simulation:
        """Of every token, from one prompt."""
        seen, likely = self._endpoint.within(prompts.simulating(explanation, tokens))
        places = unknowns(seen, len(tokens))
        found = [numbers(likely[place] or {}, self.levels) for place in places]
        # As in the paper's code, a place where no number is likely counts as 0.
        expected = [sum(value * p for value, p in zip(*pair, strict=True)) for pair in found]
        return Simulation(expected, [pair[0] for pair in found], [pair[1] for pair in found])

    def yes(self, question: str) -> float:
        """How likely Yes is, of Yes and No."""
        return yes(self._endpoint.after(question))


class _Text:
    threshold = 0.5

    def __init__(self, text: str, simulator: Simulator) -> None:
        self.text = text
        self._simulator = simulator

    def simulate(self, sequences: Sequence[Tokens]) -> list[Simulation]:
        return _all(lambda tokens: self._simulator.activations(self.text, tokens), sequences)

    def detects(self, sequences: Sequence[Tokens]) -> list[float]:
        return _all(
            self._simulator.yes, [prompts.detecting(self.text, tokens) for tokens in sequences]
        )

    def agrees(self, sequences: Sequence[Tokens], marks: Sequence[Sequence[bool]]) -> list[float]:
        pairs = zip(sequences, marks, strict=True)
        return _all(self._simulator.yes, [prompts.agreeing(self.text, *pair) for pair in pairs])


def unknowns(tokens: Sequence[str], count: int) -> list[int]:
    """Where the last `count` unknown activations begin; TrainerError if the tokenizer hides them."""
    places = [
        place
        for place in range(1, len(tokens))
        if tokens[place - 1].endswith("\t")
        and tokens[place]
        and prompts.UNKNOWN.startswith(tokens[place])
    ]
    if len(places) < count:
        raise TrainerError(
            f"only {len(places)} of {count} activations can be found in the simulator's tokens; its tokenizer joins a tab with "
            "what follows it. Choose another simulator"
        )
    return places[-count:]


def numbers(likely: Mapping[str, float], levels: int) -> tuple[list[float], list[float]]:
    """The numbers from 0 to `levels` among likely tokens, and their probabilities, which add up to 1."""
    found = {
        float(token): math.exp(logprob)
        for token, logprob in likely.items()
        if token.isascii() and token.isdigit() and str(int(token)) == token and int(token) <= levels
    }
    total = sum(found.values())
    return list(found), [p / total for p in found.values()] if total else []


def yes(likely: Mapping[str, float]) -> float:
    """The probability of Yes among tokens that say Yes or No, in whatever case; 0.5 if none does."""
    said = {"yes": 0.0, "no": 0.0}
    for token, logprob in likely.items():
        word = token.strip().lower()
        if word in said:
            said[word] += math.exp(logprob)
    total = sum(said.values())
    return said["yes"] / total if total else 0.5


def _all(ask: Callable[[In], Out], questions: Sequence[In]) -> list[Out]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, questions))
