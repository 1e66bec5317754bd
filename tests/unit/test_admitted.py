"""Equal programs are looked through once, and never longer than what was found of them holds."""

from dataclasses import replace

import pytest
import torch

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.edits import Ablate, Edit, Patch, Scale
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import DictionaryNotFound, UnknownFeature
from steer_server.program import FeatureEdit, Program, Scope
from steer_server.vllm_plugin import admitted
from steer_server.vllm_plugin.admitted import Admission
from tests.unit.serving import D_MODEL, NAME, card_for, small_dictionary

STORED = small_dictionary()
LAST = STORED.card.n_features - 1


@pytest.fixture
def admission() -> Admission:
    admission = Admission([STORED.card.site], 8)
    admission.add(NAME, STORED)
    return admission


def of_width(n_features: int) -> StoredDictionary:
    dictionary = Dictionary.tied(torch.ones(n_features, D_MODEL), torch.zeros(n_features))
    card = replace(card_for(dictionary), files={"weights.safetensors": f"of {n_features}"})
    return replace(STORED, card=card, dictionary=dictionary)


def program(edit: Edit, scope: Scope | None = None) -> Program:
    return Program((FeatureEdit(NAME, edit, scope or Scope()),))


def test_equal_programs_are_one(admission: Admission) -> None:
    first = admission.admit(program(Scale(1, 2.0)), 4)

    assert admission.admit(program(Scale(1, 2.0)), 9) is first
    assert admission.admit(program(Scale(1, 2.5)), 4).program == program(Scale(1, 2.5))
    assert first.content["features"] == [(0, NAME, 1)]


@pytest.mark.parametrize(
    "relative",
    [
        program(Ablate(1), Scope(positions=frozenset({-1}))),
        program(Patch(1, ((-1, 2.0),))),
    ],
    ids=["scope", "patch"],
)
def test_positions_from_the_end_are_those_of_each_prompt(
    admission: Admission, relative: Program
) -> None:
    short, long = admission.admit(relative, 4), admission.admit(relative, 9)

    assert (short.program, long.program) == (relative.resolve(4), relative.resolve(9))
    assert short.content != long.content
    assert short.digest != long.digest


def test_another_dictionary_of_the_name_is_another_matter(admission: Admission) -> None:
    known = program(Ablate(LAST))
    first = admission.admit(known, 4)

    admission.remove(NAME)
    with pytest.raises(DictionaryNotFound):
        admission.admit(known, 4)
    admission.add(NAME, of_width(LAST))
    with pytest.raises(UnknownFeature):
        admission.admit(known, 4)
    admission.add(NAME, of_width(LAST + 2))
    assert admission.admit(known, 4).digest != first.digest
    # In place of the one that is there.
    admission.add(NAME, of_width(LAST))
    with pytest.raises(UnknownFeature):
        admission.admit(known, 4)


def test_not_all_that_ever_came_is_remembered(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admitted, "_KEPT", 2)
    first = admission.admit(program(Ablate(0)), 4)
    for feature in (1, 2, 3):
        admission.admit(program(Ablate(feature)), 4)

    assert list(admission._known) == [program(Ablate(2)), program(Ablate(3))]
    again = admission.admit(program(Ablate(0)), 4)
    assert again is not first
    assert again.content == first.content


def test_a_long_program_is_not_remembered(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = len(admission.admit(program(Ablate(0)), 4).content["program"])
    monkeypatch.setattr(admitted, "_LONGEST", length)
    admission.admit(program(Ablate(1)), 4)
    admission.admit(program(Ablate(10)), 4)

    assert list(admission._known) == [program(Ablate(0)), program(Ablate(1))]
