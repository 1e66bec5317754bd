"""Who shares KV blocks by name, and who no longer does once a row among them was left unedited."""

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.engine import EngineCoreRequest

from steer_server.vllm_plugin import salts
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.salts import Salts


class Requests:
    """A front-end's salts, and the accounts of the requests that got one."""

    def __init__(self) -> None:
        self.salts = Salts()
        self.accounts: dict[str, Account] = {}

    def give(
        self,
        name: str,
        edits: str = "edits",
        tokens: tuple[int, ...] = (1, 2),
        lora: LoRARequest | None = None,
        images: tuple[tuple[int, str], ...] = (),
    ) -> str:
        """The salt of a new request with a prompt of two tokens; what follows was generated."""
        one = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(tokens[:2]),
            mm_features=[
                MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, 1))
                for offset, name in images
            ],
            sampling_params=SamplingParams(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=lora,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.accounts[name] = Account(list(tokens[:2]), [], token_ids=list(tokens[2:]))
        return self.salts.give(one, edits, self.accounts[name])

    def spoil(self, name: str, position: int) -> list[str]:
        found = self.salts.spoil(name, position)
        return [name for name, account in self.accounts.items() if account in found]


@pytest.fixture
def requests() -> Requests:
    return Requests()


def test_equal_edits_get_equal_salts_and_no_two_front_ends_the_same(requests: Requests) -> None:
    assert requests.give("a") == requests.give("b")
    assert requests.give("c", "others") != requests.give("d")
    assert Requests().give("a") != requests.give("e")


def test_a_spoilt_salt_is_given_to_nobody_any_more_and_the_new_one_is_shared(
    requests: Requests,
) -> None:
    spoilt, other = requests.give("a"), requests.give("c", "others")
    requests.give("b")

    assert requests.spoil("a", 1) == ["b"]

    fresh = requests.give("d")
    assert fresh == requests.give("e") != spoilt
    assert requests.give("f", "others") == other
    # The fresh salt has nothing to do with what fails under the old one.
    assert requests.spoil("b", 1) == ["a"]
    assert requests.give("g") == fresh


def test_only_who_reads_the_same_tokens_up_to_the_row_can_have_taken_it(requests: Requests) -> None:
    tokens = {"a": (1, 2, 3, 4), "b": (1, 2, 3, 5), "c": (1, 2, 4, 4), "d": (1, 2), "e": (0, 2, 3)}
    for name, own in tokens.items():
        requests.give(name, tokens=own)

    assert requests.spoil("a", 3) == []
    assert requests.spoil("a", 2) == ["b"]
    assert requests.spoil("a", 1) == ["b", "c", "d"]
    # It has said so, and of what follows nothing new can be said.
    assert requests.spoil("a", 2) == []


def test_adapters_share_no_rows(requests: Requests) -> None:
    one, other = (LoRARequest(name, number, f"/{name}") for number, name in enumerate("xy", 1))
    spoilt, apart = requests.give("a", lora=one), requests.give("b", lora=other)
    requests.give("none")
    requests.give("c", lora=one)

    assert requests.spoil("a", 1) == ["c"]
    assert requests.give("d", lora=one) != spoilt
    assert requests.give("e", lora=other) == apart


def test_of_rows_before_their_images_prompts_share_all_and_behind_them_nothing(
    requests: Requests,
) -> None:
    tokens = (1, 2, 3, 4)
    images = {"a": "x", "b": "y", "c": "x"}
    salts = {requests.give(k, tokens=tokens, images=((2, v),)) for k, v in images.items()}
    salts.add(requests.give("none", tokens=tokens))

    assert len(salts) == 1
    assert requests.spoil("a", 3) == ["c"]
    assert requests.spoil("a", 1) == ["b", "c", "none"]
    assert requests.give("d", tokens=tokens, images=((2, "z"),)) not in salts


def test_the_late_report_of_a_request_that_was_aborted_spoils_its_salt(requests: Requests) -> None:
    spoilt = requests.give("a", tokens=(1, 2, 3))
    requests.salts.end(["a", "no program"])
    requests.give("b", tokens=(1, 2, 3))
    requests.give("c", tokens=(1, 2, 4))

    assert requests.spoil("a", 2) == ["b"]
    assert requests.give("d") != spoilt
    assert requests.spoil("unknown", 1) == []


def test_what_is_kept_does_not_grow(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salts, "_RENAMED", 3)
    monkeypatch.setattr(salts, "_ENDED", 3)
    names = [f"{n}" for n in range(9)]
    old = {requests.give(name, f"edits {name}") for name in names}
    for name in names:
        requests.spoil(name, 1)
    requests.salts.end(names)

    kept = requests.salts
    assert len(kept._renamed) <= 3
    assert len(kept._ended) <= 3
    assert not kept._given
    assert all(given.account not in requests.accounts.values() for given in kept._ended.values())
    assert not old & {requests.give(f"new {name}", f"edits {name}") for name in names}
