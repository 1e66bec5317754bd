"""Whether a dictionary fits a GPU, without one: what torch would say of its memory is made up."""

import pytest
import torch
from torch import Tensor

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.site import Site
from steer_server.errors import OutOfMemory
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.residents import Residents

SITE = Site.parse("resid_post.0")
D_MODEL, N_FEATURES = 64, 4096
MIB = 2**20
NEEDED = 4 * N_FEATURES * (2 * D_MODEL + 2)
WEIGHTS = torch.zeros(D_MODEL, N_FEATURES)
DICTIONARY = Dictionary(
    WEIGHTS, torch.zeros(N_FEATURES), WEIGHTS.T, torch.zeros(D_MODEL), Activation.RELU
)


@pytest.fixture
def residents(monkeypatch: pytest.MonkeyPatch) -> Residents:
    """Of a GPU with 8 MiB free once torch lets go of 5 that it does not use."""
    free = [3 * MIB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 80 * MIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(8 * MIB))
    bank = Bank(4, D_MODEL, torch.device("cpu"))
    return Residents([SITE], [0], {0: bank}, torch.device("cuda"))


def make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "to", lambda tensor, *where: tensor)


def test_a_dictionary_fits_into_what_torch_and_the_device_have(
    residents: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room(monkeypatch)
    residents.kept_free = 8 * MIB - NEEDED

    residents.add("d", SITE, DICTIONARY)

    assert "d" in residents


def test_what_the_model_needs_for_a_step_is_left_alone(
    residents: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room(monkeypatch)
    residents.kept_free = 8 * MIB - NEEDED + 1

    with pytest.raises(OutOfMemory, match="MiB are free beside 5 MiB for the model's steps"):
        residents.add("d", SITE, DICTIONARY)

    assert "d" not in residents


def test_a_device_that_is_full_after_all_is_told_so(
    residents: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: Tensor, *where: torch.device) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 MiB")

    monkeypatch.setattr(Tensor, "to", full)

    with pytest.raises(OutOfMemory, match="'d' does not fit the GPU: tried to allocate"):
        residents.add("d", SITE, DICTIONARY)

    assert "d" not in residents
