"""Who shares KV blocks by name, and who no longer does once a row among them was left unedited."""

import pytest

from steer_server.vllm_plugin import salts
from steer_server.vllm_plugin.salts import Salts


def test_equal_keys_get_equal_salts_and_no_two_front_ends_the_same() -> None:
    mine, others = Salts(), Salts()

    assert mine.give("a", "key") == mine.give("b", "key") != mine.give("c", "other")
    assert others.give("a", "key") != mine.give("d", "key")


def test_a_spoilt_salt_is_given_to_nobody_any_more_and_the_new_one_is_shared() -> None:
    given = Salts()
    spoilt, other = given.give("a", "key"), given.give("other", "another")
    given.give("b", "key")

    assert given.spoil("a") == ["a", "b"]

    fresh = given.give("c", "key")
    assert fresh == given.give("d", "key") != spoilt
    assert given.give("e", "another") == other
    # Its later rows fail, too. The fresh salt has nothing to do with them.
    assert given.spoil("b") == ["a", "b"]
    assert given.give("f", "key") == fresh


def test_the_late_report_of_a_request_that_was_aborted_spoils_its_salt() -> None:
    given = Salts()
    spoilt = given.give("a", "key")
    given.end(["a", "no program"])
    given.give("b", "key")

    assert given.spoil("a") == ["b"]
    assert given.give("c", "key") != spoilt
    assert given.spoil("unknown") == []


def test_what_is_kept_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salts, "_KEPT", 3)
    given = Salts()
    old = [given.give(f"{n}", f"key {n}") for n in range(9)]
    for n in range(9):
        given.spoil(f"{n}")
    given.end(f"{n}" for n in range(9))

    assert len(given._renamed) <= 3
    assert len(given._ended) <= 3
    assert not given._given
    assert not set(old) & {given.give(f"new {n}", f"key {n}") for n in range(9)}
