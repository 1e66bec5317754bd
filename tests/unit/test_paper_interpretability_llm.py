"""The language model's side against a real HTTP server that answers as vLLM's does, with numbers known beforehand."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest

from trainer.errors import TrainerError
from trainer.paper.interpretability import prompts
from trainer.paper.interpretability.language_model import (
    Endpoint,
    LanguageModel,
    numbers,
    unknowns,
    yes,
)
from trainer.paper.interpretability.records import Record

TRAIN = [Record((" cat", "\n", "a\tb"), (8.0, 0.0, 4.0)), Record((" the", " cat"), (0.0, 8.0))]


class Answers(BaseHTTPRequestHandler):
    """Holds 10 likely after a cat and 0 elsewhere; says Yes to texts about cats. Tokens are words, digits, spaces."""

    split_ten = False
    chats: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            self.chats.append(body)
            message = {"role": "assistant", "content": "this feature looks for cats.\nAnd so on"}
            answer: dict[str, Any] = {"choices": [{"index": 0, "message": message}]}
        else:
            answer = {"choices": [self.complete(body)]}
        content = json.dumps({"id": "1", "model": body["model"], "created": 0} | answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        likely = {" Yes": math.log(0.6), "no": math.log(0.2)}
        if "Text: " in prompt and "cat" not in prompt.split("Text: ")[1]:
            likely = {" No": math.log(0.9), "Yes": math.log(0.1)}
        tokens: list[str] = []
        before: list[dict[str, float] | None] = []
        if body.get("echo"):
            number = r"\d" if self.split_ten else r"\d+"
            tokens = re.findall(rf"\t|\n|{number}|[^\d\s]+| +", prompt)
            before = [self.at(tokens, place) for place in range(len(tokens))]
        logprobs = {"tokens": [*tokens, "10"], "top_logprobs": [*before, likely]}
        return {"index": 0, "text": "10", "finish_reason": "length", "logprobs": logprobs}

    @staticmethod
    def at(tokens: list[str], place: int) -> dict[str, float] | None:
        if place < 2:
            return None
        level = "10" if tokens[place - 2] == "cat" else "0"
        return {"unknown": math.log(0.5), level: math.log(0.3), "1": math.log(0.1), "11": -3.0}

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet."""


@contextmanager
def serving(**attributes: Any) -> Iterator[str]:
    handler = type("Handler", (Answers,), {"chats": [], **attributes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_explanation_and_simulation_come_from_the_endpoints() -> None:
    chats: list[Any] = []
    with serving(chats=chats) as url:
        endpoint = Endpoint(url, "judge")
        model = LanguageModel(endpoint, endpoint)
        explanation = model.explain(TRAIN, 8.0)
        found, other = explanation.simulate([["the", " cat", "\n", "."], [" dog", "!"]])
        detected = explanation.detects([[" my", " cat"], [" my", " dog"]])
        agreed = explanation.agrees([[" my", " cat"]], [[False, True]])

    assert explanation.text == "cats"
    assert found.expected == pytest.approx([0.25, 7.75, 0.25, 0.25])
    assert found.values == [[0.0, 1.0], [10.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    assert found.probabilities[1] == pytest.approx([0.75, 0.25])
    assert other.expected == pytest.approx([0.25, 0.25])
    assert detected == pytest.approx([0.75, 0.1])
    assert agreed == pytest.approx([0.75])
    assert "from 0 to 10" in model.about
    (chat,) = chats
    assert " cat\t10\n\\n\t0\na\\tb\t5\n<end>" in chat["messages"][-1]["content"]


def test_a_tokenizer_that_splits_ten_leaves_the_numbers_to_nine() -> None:
    with serving(split_ten=True) as url:
        endpoint = Endpoint(url, "judge")

        assert "from 0 to 9" in LanguageModel(endpoint, endpoint).about


def test_an_endpoint_that_is_not_there_is_named() -> None:
    with serving() as url:
        pass
    endpoint = Endpoint(url, "judge")
    endpoint._client.max_retries = 0

    with pytest.raises(TrainerError, match=r"'judge' at .*127\.0\.0\.1.* did not answer"):
        endpoint.chat([{"role": "user", "content": "hello"}])


def test_numbers_are_read_as_openais_code_reads_them() -> None:
    likely = {"unknown": -0.2, "0": -2.0, "3": -3.1, "10": -4.5, " 1": -1.0, "11": -3.0, "07": -1.0}

    values, probabilities = numbers(likely, 10)

    weights = [math.exp(-2.0), math.exp(-3.1), math.exp(-4.5)]
    assert values == [0.0, 3.0, 10.0]
    assert probabilities == pytest.approx([w / sum(weights) for w in weights])
    assert numbers(likely, 9)[0] == [0.0, 3.0]
    assert numbers({"unknown": -0.1}, 10) == ([], [])
    assert yes({"maybe": -0.1}) == 0.5


def test_unknown_activations_are_the_last_ones_after_a_tab() -> None:
    tokens = ["a", "\t", "un", "known", "\n", "unknown", "\t", "0", "\n", "b", "\t", "unknown"]

    assert unknowns(tokens, 2) == [2, 11]
    assert unknowns(tokens, 1) == [11]
    with pytest.raises(TrainerError, match="only 2 of 3 activations"):
        unknowns(tokens, 3)


def test_prompts_end_where_the_answer_begins() -> None:
    simulating = prompts.simulating("cats", [" a", "\tb"])

    assert simulating.endswith("looks for: cats\nActivations:\n<start>\n a\tunknown\n\\tb\tunknown")
    assert re.search(r"unknown\n.*\t[1-9]", simulating)
    assert prompts.marked(["a", " b", " c", " d"], [True, False, True, True]) == "<<a>> b<< c d>>"
    assert prompts.detecting("cats", ["a", " b"]).endswith(
        "Text: a b\n\nQuestion: Does the text contain what the feature looks for? Answer Yes or No.\nAnswer:"
    )
    assert prompts.explained("") == ""
