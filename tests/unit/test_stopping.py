"""The text of a generation that ends where a feature is active."""

import numpy as np
import pytest

from steer_server.api.stopping import Stopper
from steer_server.generation import ActivationRows, StepOutput
from steer_server.program import Condition
from tests.unit.fake_engine import CharTokenizer

PROMPT = 3


def row(position: int, value: float) -> ActivationRows:
    """Of the one feature that is asked for."""
    active = [value] if value else []
    return ActivationRows(
        0,
        "d",
        np.array([position], np.uint32),
        np.array([0, len(active)], np.uint32),
        np.array([7] * len(active), np.uint32),
        np.array(active, np.float32),
        None,
    )


class LeadingSpace(CharTokenizer):
    """Leaves out a space at the beginning, as SentencePiece's do without a prompt."""

    def decode(self, token_ids):
        return super().decode(token_ids).removeprefix(" ")


@pytest.mark.parametrize("tokenizer", [CharTokenizer(), LeadingSpace()])
def test_what_was_held_back_for_a_stop_text_comes_with_the_end(tokenizer: CharTokenizer) -> None:
    stopper = Stopper([Condition("d", 7)], 0, PROMPT, tokenizer)
    # Of " abc" two characters are held back, as if a stop text of three might have begun.
    first = StepOutput(0, (ord(" "), ord("a")), "")
    second = StepOutput(2, (ord("b"), ord("c")), " a", activations=(row(PROMPT, 0.0),))
    last = StepOutput(4, (ord("d"),), "b", activations=(row(PROMPT + 3, 1.0),))

    assert [stopper.cut(output)[1] for output in (first, second)] == [None, None]
    cut, number = stopper.cut(last)

    assert (number, cut.token_ids, cut.text) == (0, (), "bc")
