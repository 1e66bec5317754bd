"""A generation that ends where a feature is active."""

from collections.abc import Sequence

import numpy as np

from steer_server.generation import ActivationRows, StepOutput, Tokenizer
from steer_server.program import Condition, ReadOut


class Stopper:
    """Finds the first generated token on which one of some conditions holds, and cuts off what follows it.

    A token's activations come with the token that was drawn after it, so that one has to go.
    """

    def __init__(
        self,
        conditions: Sequence[Condition],
        first_read_out: int,
        prompt_length: int,
        tokenizer: Tokenizer,
    ) -> None:
        """Its `read_outs` have to be in the program, from number `first_read_out` on."""
        self.read_outs = tuple(
            ReadOut(condition.dictionary, features=(condition.feature,), prompt=False)
            for condition in conditions
        )
        self._conditions = conditions
        self._first = first_read_out
        self._prompt_length = prompt_length
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._text = ""

    def cut(self, output: StepOutput) -> tuple[StepOutput, int | None]:
        """The output as far as it counts, and the number of the condition that held; None if none did."""
        if not self._conditions:
            return output, None
        found = min((hit for rows in output.activations for hit in self._hits(rows)), default=None)
        if found is None:
            self._token_ids += output.token_ids
            self._text += output.text
            return output, None
        position, number = found
        kept = max(0, position + 1 - self._prompt_length - output.first_index)
        token_ids = output.token_ids[:kept]
        cut = output._replace(
            token_ids=token_ids,
            text=self._text_of(token_ids),
            logprobs=output.logprobs[:kept],
            activations=tuple(rows.split(position + 1)[0] for rows in output.activations),
        )
        return cut, number

    def _hits(self, rows: ActivationRows) -> list[tuple[int, int]]:
        """(position, number of the condition) where one holds."""
        number = rows.read_out - self._first
        if not 0 <= number < len(self._conditions):
            return []
        # One feature is read, so a row has one value or none.
        where = np.repeat(rows.positions, np.diff(rows.row_splits))
        held = where[rows.values > self._conditions[number].above]
        return [(int(position), number) for position in held[:1]]

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """What is missing of the text up to them: vLLM holds back what may yet become a stop text."""
        whole = self._tokenizer.decode([*self._token_ids, *token_ids]).rstrip("\ufffd")
        # Some tokenizers print the space before the first word only after a prompt.
        for sent in (self._text, self._text.removeprefix(" ")):
            if whole.startswith(sent):
                return whole[len(sent) :]
        return ""
