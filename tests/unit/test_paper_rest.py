"""Running the rest of a model gives what the whole model with a hook gives, in every family."""

import pytest
import torch

from steer_server.dictionary.site import Site
from tests.unit.test_trainer_structure import FAMILIES
from trainer.model import site_hook
from trainer.paper.rest import Rest

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8], [30, 2, 11, 7, 0, 0]])
LENGTHS = torch.tensor([6, 4])


@pytest.mark.parametrize("stream", ["resid_post", "mlp_out", "attn_out", "attn_z"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_a_model_is_the_whole_model_with_a_hook(family: str, stream: str):
    model = FAMILIES[family].model()
    site = Site(stream, 1)
    rest = Rest(model, site, TOKENS, LENGTHS)
    generator = torch.Generator().manual_seed(0)
    x = rest.x + torch.randn(rest.x.shape, generator=generator)

    with torch.no_grad(), site_hook(model, site, lambda _: x):
        wanted = model(input_ids=TOKENS, use_cache=False).logits.log_softmax(dim=-1)
    found = rest.log_probabilities(x[[1, 0, 1]], torch.tensor([1, 0, 1]))

    assert torch.allclose(found, wanted[[1, 0, 1], [3, 5, 3]], atol=1e-4)
    assert not torch.allclose(found[1], rest.unedited[0], atol=1e-2)


def test_the_gradient_is_that_of_the_whole_model():
    model = FAMILIES["llama"].model().double()
    site = Site("mlp_out", 1)
    rest = Rest(model, site, TOKENS, LENGTHS)
    x = rest.x.double().requires_grad_()

    (found,) = torch.autograd.grad(
        rest.log_probabilities(x, torch.arange(2))[:, 7].sum(), x, retain_graph=False
    )

    with site_hook(model, site, lambda _: x):
        logits = model(input_ids=TOKENS, use_cache=False).logits.log_softmax(dim=-1)
    (wanted,) = torch.autograd.grad(logits[[0, 1], [5, 3], 7].sum(), x)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_layers_are_all_there_again_even_after_an_error():
    model = FAMILIES["gpt2"].model()
    before = list(model.transformer.h)
    rest = Rest(model, Site("resid_post", 1), TOKENS, LENGTHS)

    with pytest.raises(RuntimeError):
        rest.log_probabilities(torch.zeros(2, 6, 5), torch.arange(2))

    assert list(model.transformer.h) == before
