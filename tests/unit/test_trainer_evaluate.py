"""What the trainer says of a dictionary: quality, statistics, logit effects."""

import pytest
import torch
from torch import Tensor

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import QUANTILES, Example
from steer_server.dictionary.site import Site
from tests.unit.trainer_model import write_model
from trainer.errors import BadConfig
from trainer.evaluate import describe, evaluate, evaluate_together
from trainer.interpret import Survey, _varied, logit_effects
from trainer.model import load_model, read_sites, site_hook
from trainer.stop import Stop

pytestmark = pytest.mark.usefixtures("one_thread")

SITE = Site.parse("resid_post.1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load_model(str(write_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def contexts() -> Tensor:
    return torch.randint(2, 20, (6, 32), generator=torch.Generator().manual_seed(3))


def identity() -> Dictionary:
    """ReLU features e_i and -e_i: together they reconstruct everything."""
    return Dictionary.tied(torch.cat([torch.eye(16), -torch.eye(16)]), torch.zeros(32))


def test_a_perfect_dictionary_costs_nothing(model: torch.nn.Module, contexts: Tensor) -> None:
    quality = evaluate(model, SITE, identity(), contexts, 1, float("inf"), Stop())

    assert quality.delta_ce == pytest.approx(0.0, abs=1e-6)
    assert quality.fvu == pytest.approx(0.0, abs=1e-9)
    assert quality.l0 == 16
    assert quality.pca_fvu == pytest.approx(0.0, abs=1e-9)
    assert quality.tokens == 6 * 31
    assert quality.kl == pytest.approx(0.0, abs=1e-6)
    assert quality.ce_recovered == pytest.approx(1.0, abs=1e-5)
    assert quality.dense_share == 1.0


def test_a_zero_dictionary_costs_what_zeroing_the_site_costs(
    model: torch.nn.Module, contexts: Tensor
) -> None:
    silent = Dictionary.tied(torch.eye(16), torch.full((16,), -1e9))

    def zero(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], dim=1)

    def loss() -> float:
        with torch.inference_mode():
            logits = model(input_ids=contexts).logits[:, 1:-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), contexts[:, 2:].flatten()
        ).item()

    plain = loss()
    with site_hook(model, SITE, zero):
        zeroed = loss()
    quality = evaluate(model, SITE, silent, contexts, 1, float("inf"), Stop())

    assert zeroed != pytest.approx(plain, abs=1e-3)
    assert quality.delta_ce == pytest.approx(zeroed - plain, abs=1e-5)
    assert quality.dead_share == 1.0
    assert quality.dense_share == 0.0
    assert quality.l0 == 0.0
    assert quality.fvu >= 1.0
    assert quality.ce == pytest.approx(plain, abs=1e-5)
    assert quality.ce_recovered == pytest.approx(0.0, abs=1e-4)


def test_kl_is_that_of_the_two_distributions(model: torch.nn.Module, contexts: Tensor) -> None:
    half = Dictionary.tied(torch.cat([torch.eye(16)[:8], -torch.eye(16)[:8]]), torch.zeros(16))

    def halve(x: Tensor) -> Tensor:
        first = torch.cat([x[:, 1:, :8], torch.zeros_like(x[:, 1:, 8:])], dim=2)
        return torch.cat([x[:, :1], first], dim=1)

    with torch.inference_mode():
        plain = model(input_ids=contexts).logits[:, 1:-1].double().softmax(dim=-1)
        with site_hook(model, SITE, halve):
            other = model(input_ids=contexts).logits[:, 1:-1].double().softmax(dim=-1)
    expected = (plain * (plain / other).log()).sum(dim=-1).mean().item()

    quality = evaluate(model, SITE, half, contexts, 1, float("inf"), Stop())

    assert expected > 1e-3
    assert quality.kl == pytest.approx(expected, rel=1e-3)
    assert f"{quality.kl:.3f}" in describe(quality)


def test_dictionaries_of_a_site_are_evaluated_in_few_runs_of_the_model_as_each_alone(
    model: torch.nn.Module, contexts: Tensor
) -> None:
    half = Dictionary.tied(torch.cat([torch.eye(16)[:8], -torch.eye(16)[:8]]), torch.zeros(16))
    silent = Dictionary.tied(torch.eye(16), torch.full((16,), -1e9))
    dictionaries = [identity(), half, silent]
    alone = [evaluate(model, SITE, d, contexts, 1, float("inf"), Stop()) for d in dictionaries]
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    handle = model.register_forward_pre_hook(count)
    try:
        together = evaluate_together(model, SITE, dictionaries, contexts, 1, float("inf"), Stop())
    finally:
        handle.remove()

    assert together == alone
    batches = -(-len(contexts) // 4)
    assert runs == batches * (2 + len(dictionaries))


def test_activations_longer_than_the_bound_are_left_as_they_are(
    model: torch.nn.Module, contexts: Tensor
) -> None:
    silent = Dictionary.tied(torch.eye(16), torch.full((16,), -1e9))
    norms = read_sites(model, [SITE], contexts)[0][:, 1:].norm(dim=-1)
    bound = norms.median().item()

    quality = evaluate(model, SITE, silent, contexts, 1, bound, Stop())

    assert quality.tokens == int((norms <= bound).sum())


def test_the_fvu_is_the_share_of_variance_that_is_missing(
    model: torch.nn.Module, contexts: Tensor
) -> None:
    half = Dictionary.tied(torch.cat([torch.eye(16)[:8], -torch.eye(16)[:8]]), torch.zeros(16))
    x = read_sites(model, [SITE], contexts)[0][:, 1:].flatten(0, 1)
    missing = x[:, 8:].square().sum() / (x - x.mean(dim=0)).square().sum()

    quality = evaluate(model, SITE, half, contexts, 1, float("inf"), Stop())

    assert quality.fvu == pytest.approx(missing.item(), rel=1e-4)
    assert f"{quality.fvu:.3f}" in describe(quality)


def test_statistics_are_those_of_the_non_zero_activations() -> None:
    survey = Survey(identity())
    x = torch.randn(900, 16, generator=torch.Generator().manual_seed(0)) * 3
    for piece in (slice(0, 450), slice(450, 900)):
        survey.add(x[piece], torch.arange(900)[piece], length=30)
    statistics = survey.statistics()

    f = x[:, 0][x[:, 0] > 0]
    expected = torch.quantile(f, torch.tensor(QUANTILES))
    assert statistics.density[0].item() == pytest.approx(len(f) / 900)
    assert statistics.mean[0].item() == pytest.approx(f.mean().item(), rel=1e-5)
    assert statistics.max[0] == f.max()
    torch.testing.assert_close(statistics.quantiles[0], expected, rtol=0.05, atol=0.02)


def test_a_feature_that_never_fired_has_zeros() -> None:
    survey = Survey(Dictionary.tied(torch.eye(4), torch.full((4,), -1e9)))
    survey.add(torch.randn(60, 4), torch.arange(60), length=30)

    statistics = survey.statistics()

    assert not any(table.any() for table in statistics)


def test_examples_show_different_words_before_more_of_the_same() -> None:
    def example(word: str, peak: float) -> Example:
        return Example(("so", word), (0.1, peak))

    candidates = [
        example(" rain", 9.0),
        example("Rain", 8.0),
        example(" Rain", 7.0),
        example("snow", 6.0),
    ]

    assert _varied(candidates) == [candidates[0], candidates[1], candidates[3]]


def test_logit_effects_are_those_of_the_norm_and_the_head(model: torch.nn.Module) -> None:
    direction = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    rms = direction.square().mean(dim=1, keepdim=True).sqrt()
    inner = model.get_submodule("model.norm").get_parameter("weight")
    head = model.get_submodule("lm_head").get_parameter("weight")

    effects = logit_effects(model, SITE, direction)

    torch.testing.assert_close(effects, (direction / rms * inner) @ head.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_logit_effects_inside_a_sublayer_go_through_its_projection(
    model: torch.nn.Module, bias: bool
) -> None:
    projection = model.get_submodule("model.layers.1.mlp.down_proj")
    direction = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    written = direction @ projection.get_parameter("weight").T
    if bias:
        projection.bias = torch.nn.Parameter(torch.randn(16), requires_grad=False)

    effects = logit_effects(model, Site.parse("mlp_act.1"), direction)
    projection.bias = None

    assert effects.shape == (2, 20)
    torch.testing.assert_close(effects, logit_effects(model, SITE, written))


@pytest.mark.parametrize(("site", "width"), [("mlp_act.1", 32), ("attn_z.1", 16)])
def test_inside_a_sublayer_the_projections_input_is_replaced(
    model: torch.nn.Module, contexts: Tensor, site: str, width: int
) -> None:
    child = "mlp.down_proj" if width == 32 else "self_attn.o_proj"
    projection = model.get_submodule(f"model.layers.1.{child}")
    whole = Dictionary.tied(
        torch.cat([torch.eye(width), -torch.eye(width)]), torch.zeros(2 * width)
    )
    silent = Dictionary.tied(torch.eye(width), torch.full((width,), -1e9))

    def zero(_module: object, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        return (torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], dim=1),)

    def loss() -> float:
        with torch.inference_mode():
            logits = model(input_ids=contexts).logits[:, 1:-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), contexts[:, 2:].flatten()
        ).item()

    plain = loss()
    handle = projection.register_forward_pre_hook(zero)
    zeroed = loss()
    handle.remove()
    perfect = evaluate(model, Site.parse(site), whole, contexts, 1, float("inf"), Stop())
    empty = evaluate(model, Site.parse(site), silent, contexts, 1, float("inf"), Stop())

    assert zeroed != pytest.approx(plain, abs=1e-3)
    assert perfect.delta_ce == pytest.approx(0.0, abs=1e-6)
    assert perfect.fvu == pytest.approx(0.0, abs=1e-9)
    assert empty.delta_ce == pytest.approx(zeroed - plain, abs=1e-5)


def test_a_dictionary_of_another_width_than_its_sites_is_refused(
    model: torch.nn.Module, contexts: Tensor
) -> None:
    site = Site.parse("mlp_act.1")

    with pytest.raises(BadConfig, match=r"x of width 16, that at mlp_act\.1 has 32"):
        evaluate(model, site, identity(), contexts, 1, float("inf"), Stop())
