"""What the front-end keeps of requests that vLLM is done with."""

import json

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from steer_server.dictionary.edits import Ablate
from steer_server.errors import EditNotApplied, EditTooLarge, InvalidRequest, SteerError
from steer_server.program import EVERYWHERE, FeatureEdit, Program, Scope
from steer_server.vllm_plugin import KEY
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.frontend import DISTRIBUTION, FORCED, LIVE, Frontend
from steer_server.vllm_plugin.ledger import EditTally
from steer_server.vllm_plugin.report import EditBlock, EditRuns, StepReport
from tests.unit.serving import NAME, small_dictionary


def request(
    name: str, length: int = 4, scope: Scope = EVERYWHERE, first: int = 5
) -> EngineCoreRequest:
    program = Program((FeatureEdit(NAME, Ablate(1), scope),))
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(range(first, first + length)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=4, extra_args={KEY: program}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def report(name: str) -> StepReport:
    """Of a step in which the edit ran on the prompt but for position 0, and past its limit at one token."""
    runs = EditRuns(*np.array([[0], [0], [3], [1], [0]], np.int32))
    numbers = np.array([2], np.uint32), np.array([0.5], np.float32), np.array([0.3], np.float32)
    block = EditBlock(runs.pack(), *(array.tobytes() for array in numbers))
    return StepReport([name], limited=[(0, 1)], edits=[block])


def test_an_account_closes_whole_after_its_request_was_forgotten() -> None:
    stored = small_dictionary()
    accounts: dict[str, Account] = {}
    frontend = Frontend([stored.card.site], 8, accounts.__setitem__)
    frontend.admission.add(NAME, stored)
    frontend.admit(request("slow reader"), 0, {})
    # The second is of a request that nobody knows any more.
    for name in ("slow reader", "aborted"):
        frontend._enter({"load": ([1], 0), "reports": [report(name).to_wire()]})
    frontend.admit(request("next"), 0, {"next": None})

    assert list(frontend.accounts) == ["next"]
    accounts["slow reader"].take()
    assert accounts["slow reader"].limited_tokens == 1
    (edit,) = accounts["slow reader"].close()
    assert (edit.tokens_in_scope, edit.tokens_changed) == (3, 2)
    assert np.isclose(edit.mean_relative_size, 0.5 / 3)


def test_equal_programs_of_prompts_of_two_lengths_share_nothing_that_depends_on_it() -> None:
    stored = small_dictionary()
    frontend = Frontend([stored.card.site], 8)
    frontend.admission.add(NAME, stored)
    short, long = (request(f"{n}", n, Scope(prompt=False)) for n in (4, 9))
    for one in (short, long):
        frontend.admit(one, 0, {"4": None, "9": None})

    brought = [one.sampling_params.extra_args[KEY] for one in (short, long) if one.sampling_params]
    assert [content["prompt_length"] for content in brought] == [4, 9]
    assert brought[0]["program"] is brought[1]["program"]
    assert short.cache_salt != long.cache_salt


class Fleet:
    """Requests with one program at a front-end, and the reports that reach it."""

    def __init__(self) -> None:
        stored = small_dictionary()
        self.accounts: dict[str, Account] = {}
        self.frontend = Frontend([stored.card.site], 8, self.accounts.__setitem__)
        self.frontend.admission.add(NAME, stored)

    def send(self, name: str, length: int = 8, first: int = 5, running: str = "") -> str | None:
        """Its `cache_salt`; the others that vLLM has in hand are the `running` ones, or all."""
        one = request(name, length, first=first)
        known = running.split(",") if running else [*self.accounts, name]
        self.frontend.admit(one, 0, dict.fromkeys(known))
        return one.cache_salt

    def report(self, step: StepReport) -> None:
        self.frontend._enter({"load": ([1], 0), "reports": [step.to_wire()]})


@pytest.mark.parametrize(
    ("failure", "kind"), [("missed", EditNotApplied), ("too_large", EditTooLarge)]
)
def test_who_took_a_row_that_was_left_unedited_from_the_cache_fails_as_its_owner_does(
    failure: str, kind: type[SteerError]
) -> None:
    fleet = Fleet()
    names = ["owner", "took it", "took rows before it", "other prompt", "took none"]
    salts = {name: fleet.send(name, first=6 if name == "other prompt" else 5) for name in names}
    skipped = [(1, 0, 6), (2, 0, 5), (3, 0, 6)]
    fleet.report(StepReport(names, skipped=skipped, **{failure: [(0, 5, "why")]}))

    for name in ("owner", "took it"):
        with pytest.raises(kind, match="why"):
            fleet.accounts[name].take()
    for name in ("took rows before it", "other prompt", "took none"):
        fleet.accounts[name].take()
    assert len(set(salts.values())) == 1
    assert fleet.send("late") not in salts.values()


def test_who_takes_such_a_row_after_it_is_known_fails_too() -> None:
    fleet = Fleet()
    for name in ("owner", "began before", "owner of later rows"):
        fleet.send(name)
    fleet.report(StepReport(["owner"], too_large=[(0, 6, "later"), (0, 5, "why")]))
    fleet.report(StepReport(["owner of later rows"], too_large=[(0, 7, "later")]))
    assert fleet.accounts["began before"].take() is None
    fleet.report(StepReport(["began before"], skipped=[(0, 0, 6)]))

    with pytest.raises(EditTooLarge, match="why"):
        fleet.accounts["began before"].take()
    # Nothing has come since, and it must not end well.
    with pytest.raises(EditTooLarge, match="why"):
        fleet.accounts["began before"].take()
    with pytest.raises(EditTooLarge, match="why"):
        fleet.accounts["began before"].close()


def test_the_late_report_of_an_aborted_request_counts_for_the_cache_too() -> None:
    fleet = Fleet()
    spoilt = fleet.send("aborted")
    fleet.send("equal", running="equal")
    assert list(fleet.frontend.accounts) == list(fleet.frontend._salts._given) == ["equal"]
    step = StepReport(["aborted", "equal"], skipped=[(1, 0, 6)], too_large=[(0, 5, "why")])
    fleet.report(step)

    with pytest.raises(EditTooLarge, match="why"):
        fleet.accounts["equal"].take()
    assert fleet.send("late") != spoilt


def test_who_took_a_row_of_a_step_under_way_at_its_owners_end_fails_too() -> None:
    fleet = Fleet()
    for name, length in (("owner", 8), ("longer", 10)):
        fleet.send(name, length)
    fleet.frontend.end(["owner"])
    # vLLM computed a row more before it knew; whether "longer" goes on as the owner did is not known here.
    fleet.report(StepReport(["owner", "longer"], skipped=[(1, 0, 9)], too_large=[(0, 8, "why")]))

    with pytest.raises(EditTooLarge):
        fleet.accounts["longer"].take()


def test_a_live_request_shares_with_nobody_and_is_not_remembered_for_it() -> None:
    fleet = Fleet()
    live = request("live")
    assert live.sampling_params is not None
    live.sampling_params.extra_args[LIVE] = True  # type: ignore[index]

    fleet.frontend.admit(live, 0, {})

    assert live.cache_salt != fleet.send("other", 4)
    assert list(fleet.frontend._salts._given) == ["other"]


def test_a_callers_own_salt_cannot_name_the_blocks_of_a_program() -> None:
    stored = small_dictionary()
    program = Program((FeatureEdit(NAME, Ablate(1)),))
    known = program.cache_salt(program.digest({NAME: stored.card.arithmetic}), 4)
    frontend = Frontend([stored.card.site], 8)
    frontend.admission.add(NAME, stored)
    victim = request("victim", 4, Scope())
    frontend.admit(victim, 0, {})

    assert known is not None
    assert victim.cache_salt is not None
    assert victim.cache_salt.startswith(known)
    assert len(victim.cache_salt) - len(known) == 32


@pytest.mark.parametrize("beside", [LIVE, FORCED, DISTRIBUTION])
def test_what_only_the_server_says_of_a_program_is_refused_beside_a_clients(beside: str) -> None:
    fleet = Fleet()
    one, other = request("text"), request("program")
    text = json.dumps({"edits": [{"dictionary": NAME, "feature": 1, "ablate": {}}]})
    for item, program in ((one, text), (other, Program((FeatureEdit(NAME, Ablate(1)),)))):
        assert item.sampling_params
        item.sampling_params.extra_args = {KEY: program, beside: 1}

    with pytest.raises(InvalidRequest, match=beside):
        fleet.frontend.admit(one, 0, {})
    fleet.frontend.admit(other, 0, {})

    assert list(fleet.accounts) == ["program"]


def test_a_prompt_that_comes_as_a_stream_is_refused_with_edits_and_only_then() -> None:
    stored = small_dictionary()
    frontend = Frontend([stored.card.site], 8)
    frontend.admission.add(NAME, stored)
    streamed = request("streamed")
    streamed.resumable = True

    with pytest.raises(InvalidRequest, match="come whole"):
        frontend.admit(streamed, 0, {})
    streamed.sampling_params = SamplingParams(max_tokens=4)
    frontend.admit(streamed, 0, {})


def test_vllm_does_not_copy_a_program_for_each_request() -> None:
    brought = request("r").sampling_params
    assert brought is not None

    copied = brought.clone()

    assert copied.extra_args is not brought.extra_args
    assert (copied.extra_args or {})[KEY] is (brought.extra_args or {})[KEY]


def test_tallies_of_an_edit_add_up() -> None:
    account = Account([5, 6, 7, 8], [Program((FeatureEdit(NAME, Ablate(1)),))], token_ids=[9])
    account.enter(EditTally(0, 2, [0], [1], [0.5], [0.3]))
    account.enter(EditTally(0, 1, [0], [1], [1.0], [0.2]))

    (edit,) = account.close()

    assert (edit.tokens_in_scope, edit.tokens_changed) == (3, 2)
    assert (edit.mean_relative_size, edit.max_relative_size) == (0.5, 0.3)
