"""Who shares KV blocks by name, and who no longer does once a row among them was left unedited."""

import pytest

from steer_server.vllm_plugin import salts
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.salts import Salts


def account(*tokens: int) -> Account:
    """Of a prompt of two tokens and what was generated."""
    return Account(tokens[:2], [], token_ids=list(tokens[2:]))


def test_equal_keys_get_equal_salts_and_no_two_front_ends_the_same() -> None:
    mine, others, any_ = Salts(), Salts(), account(1, 2)

    assert mine.give("a", "key", any_) == mine.give("b", "key", any_)
    assert mine.give("c", "other", any_) != mine.give("d", "key", any_)
    assert others.give("a", "key", any_) != mine.give("e", "key", any_)


def test_a_spoilt_salt_is_given_to_nobody_any_more_and_the_new_one_is_shared() -> None:
    given = Salts()
    accounts = {name: account(1, 2, 3) for name in "abcdef"}
    spoilt = given.give("a", "key", accounts["a"])
    given.give("b", "key", accounts["b"])
    other = given.give("c", "another", accounts["c"])

    assert given.spoil("a", 1) == [accounts["b"]]

    fresh = given.give("d", "key", accounts["d"])
    assert fresh == given.give("e", "key", accounts["e"]) != spoilt
    assert given.give("f", "another", accounts["f"]) == other
    # Its later rows fail, too. The fresh salt has nothing to do with them.
    assert given.spoil("b", 2) == [accounts["a"]]
    assert given.give("g", "key", accounts["d"]) == fresh


def test_only_who_reads_the_same_tokens_up_to_the_row_can_have_taken_it() -> None:
    given = Salts()
    accounts = [account(1, 2, 3, 4), account(1, 2, 3, 5), account(1, 2, 4, 4), account(1, 2)]
    for number, one in enumerate(accounts):
        given.give(f"{number}", "key", one)

    assert given.spoil("0", 1) == accounts[1:]
    assert given.spoil("0", 2) == accounts[1:2]
    assert given.spoil("0", 3) == []


def test_the_late_report_of_a_request_that_was_aborted_spoils_its_salt() -> None:
    given, equal = Salts(), account(1, 2)
    spoilt = given.give("a", "key", account(1, 2))
    given.end(["a", "no program"])
    given.give("b", "key", equal)

    assert given.spoil("a", 1) == [equal]
    assert given.give("c", "key", equal) != spoilt
    assert given.spoil("unknown", 1) == []


def test_what_is_kept_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salts, "_RENAMED", 3)
    monkeypatch.setattr(salts, "_ENDED", 3)
    given = Salts()
    old = [given.give(f"{n}", f"key {n}", account(1, 2)) for n in range(9)]
    for n in range(9):
        given.spoil(f"{n}", 1)
    given.end(f"{n}" for n in range(9))

    assert len(given._renamed) <= 3
    assert len(given._ended) <= 3
    assert not given._given
    new = {given.give(f"new {n}", f"key {n}", account(1, 2)) for n in range(9)}
    assert not set(old) & new
