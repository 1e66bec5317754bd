"""Patching by hand on a tiny model, and the prompts."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.site import Site
from tests.unit.trainer_model import write_model
from trainer.errors import BadConfig
from trainer.model import read_sites, site_hook
from trainer.paper.ioi.baselines import diff_mean, signed
from trainer.paper.ioi.patching import Bench, Patching
from trainer.paper.ioi.prompts import Prompt, draw, names

pytestmark = pytest.mark.usefixtures("one_thread")

SITE = Site("resid_post", 1)
PROMPTS = [
    Prompt("", (2, 5, 9, 3), (2, 6, 9, 3), 5, 6, 1),
    Prompt("", (4, 8, 3, 7, 5, 2), (4, 8, 3, 10, 5, 2), 7, 10, 3),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    generator = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=1)
    return Dictionary.tied(rows, torch.full((40,), -0.1))


def by_hand(model, dictionary: Dictionary, chosen: list[int]) -> tuple[float, float]:
    """KL and edit of one prompt after the other, without padding."""
    kls, edits = [], []
    for prompt in PROMPTS:
        base, other = (torch.tensor([ids]) for ids in (prompt.tokens, prompt.counterfactual))
        x, there = (read_sites(model, [SITE], ids)[0].clone() for ids in (base, other))
        f, target = dictionary.encode(x), dictionary.encode(there)
        delta = (target - f)[..., chosen] @ dictionary.W_dec[chosen]
        with torch.no_grad():
            q = model(input_ids=other).logits[0, -1].log_softmax(-1)
            with site_hook(model, SITE, lambda x, delta=delta: x + delta):
                p = model(input_ids=base).logits[0, -1].log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum())
        edits.append(delta[0].norm(dim=-1))
    return torch.stack(kls).mean().item(), torch.cat(edits).mean().item()


@pytest.mark.parametrize("chosen", [[], [3], [1, 7, 20, 33], list(range(40))])
def test_an_effect_is_that_of_each_prompt_alone(model, dictionary: Dictionary, chosen: list[int]):
    patching = Patching(Bench(model, SITE, PROMPTS), dictionary)

    (effect,) = patching.effects([chosen])

    assert effect == pytest.approx(by_hand(model, dictionary, chosen), abs=1e-5)


def test_a_feature_that_never_differs_changes_nothing(model, dictionary: Dictionary):
    patching = Patching(Bench(model, SITE, PROMPTS), dictionary)
    others = [feature for feature in range(40) if feature not in patching.differing]

    some, with_others = patching.effects([patching.differing[:3], patching.differing[:3] + others])

    assert others
    assert with_others == some


def test_features_that_change_are_counted_prompt_by_prompt(model, dictionary: Dictionary):
    patching = Patching(Bench(model, SITE, PROMPTS), dictionary)
    alone = [
        len(Patching(Bench(model, SITE, [prompt]), dictionary).differing) for prompt in PROMPTS
    ]

    found = patching.changed([range(40), []])

    assert found == [sum(alone) / 2, 0.0]
    assert 0 < sum(alone) / 2 < len(patching.differing)


def test_the_identity_dictionary_carries_everything_over(model):
    patching = Patching(Bench(model, SITE, PROMPTS), Dictionary.directions(torch.eye(16)))

    nothing, everything = patching.effects([[], range(16)])

    assert everything.kl == pytest.approx(0.0, abs=1e-5)
    assert nothing.kl > 0.001
    assert nothing.edit == 0.0


def test_attribution_sorts_by_what_a_small_patch_would_do(model, dictionary: Dictionary):
    bench = Bench(model, SITE, PROMPTS)
    patching = Patching(bench, dictionary)
    patching.change *= 1e-2

    order = patching.by_attribution(steps=1)

    alone = [effect.kl for effect in patching.effects([[feature] for feature in order])]
    inversions = sum(a > b + 1e-7 for a, b in pairwise(alone))
    assert sorted(order) == patching.differing
    assert inversions <= len(order) // 10


def test_prompts_differ_from_their_counterfactuals_in_one_name():
    tokenizer = AutoTokenizer.from_pretrained("models/SmolLM2-135M-Instruct")
    known = names(tokenizer, 20)

    prompts = draw(tokenizer, known, 40, "a")

    for number, prompt in enumerate(prompts):
        pairs = list(zip(prompt.tokens, prompt.counterfactual, strict=True))
        subject = prompt.text.removesuffix(" to").rsplit(". ", 1)[-1]
        assert [at for at, (a, b) in enumerate(pairs) if a != b] == [prompt.at]
        assert pairs[prompt.at] == (prompt.answer, prompt.other)
        assert tokenizer.decode([prompt.answer]).strip() in known
        assert tokenizer.decode([prompt.answer]) not in f" {subject.split(', ')[-1]}"
        first = min(prompt.text.index(name) for name in known if f"{name} " in prompt.text)
        comes_first = prompt.text[first:].startswith(tokenizer.decode([prompt.answer]).strip())
        assert comes_first == (number % 2 == 0)
    assert draw(tokenizer, known, 40, "a") == prompts
    assert draw(tokenizer, known, 40, "b") != prompts


def test_more_names_than_the_model_has_are_refused():
    tokenizer = AutoTokenizer.from_pretrained("models/SmolLM2-135M-Instruct")

    with pytest.raises(BadConfig, match=r"ioi\.names is 500; from 3 to \d+ names"):
        names(tokenizer, 500)


def test_signs_apart_carry_over_what_the_rotation_does(model):
    generator = torch.Generator().manual_seed(5)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    whole = Dictionary(
        rotation.T, torch.zeros(16), rotation, torch.randn(16), Activation.IDENTITY, 1.0, True
    )
    bench = Bench(model, SITE, PROMPTS)

    apart, together = Patching(bench, signed(whole)), Patching(bench, whole)

    assert apart.effects([[2, 5, 18, 21]])[0] == pytest.approx(
        together.effects([[2, 5]])[0], abs=1e-4
    )
    assert apart.effects([[2]])[0] != pytest.approx(together.effects([[2]])[0], abs=1e-4)


def test_the_difference_of_means_moves_a_name_to_the_other(model):
    bench = Bench(model, SITE, PROMPTS)
    dictionary = diff_mean(bench)
    x = bench.rest.x[0, 1]
    names = sorted({5, 6, 7, 10})
    mean = torch.stack(
        [
            bench.rest.x[0, 1],
            bench.counterfactual_x[0, 1],
            bench.rest.x[1, 3],
            bench.counterfactual_x[1, 3],
        ]
    ).mean(dim=0)

    assert dictionary.n_features == len(names)
    own = torch.nn.functional.normalize(x - mean, dim=0)
    assert torch.allclose(dictionary.W_dec[names.index(5)], own, atol=1e-5)
    # Coefficients of the projection: what is left is orthogonal to every direction.
    left = x - dictionary.decode(dictionary.encode(x))
    assert (dictionary.W_dec @ left).abs().max() < 1e-3 * x.norm()
