"""What a feature does and what causes it, against whole runs of the model with one feature ablated."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.edits import Ablate, edit_delta
from steer_server.dictionary.files import StoredDictionary, load
from steer_server.dictionary.site import Site
from tests.unit.trainer_model import tiny_config, write_model
from trainer.model import load_model, read_sites, site_hook
from trainer.paper.cases.activity import survey
from trainer.paper.cases.causes import Feature, causes, spread, strongest
from trainer.paper.cases.effects import LIKELY, Effect, as_json, effect, target
from trainer.paper.rest import Rest, depth, read_until
from trainer.run import run
from trainer.stop import Stop
from trainer.structure import decoder_layers

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = ("resid_post.1", "attn_out.2", "mlp_out.2", "resid_post.2")


class World(NamedTuple):
    model: nn.Module
    stored: dict[str, StoredDictionary]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("cases")
    config = tiny_config(write_model(folder / "model"), folder)
    configs = [
        replace(config, site=site, out=str(folder / site), skip_positions=1) for site in SITES
    ]
    run(configs, folder / "runs", Stop())
    stored = {site: load(folder / site) for site in SITES}
    return World(load_model(str(folder / "model")), stored)


def contexts(count: int = 6, length: int = 12) -> Tensor:
    return torch.randint(2, 20, (count, length), generator=torch.Generator().manual_seed(3))


def ablated(stored: StoredDictionary, feature: int):
    """A change of the site by the shared arithmetic, everywhere but at position 0."""

    def change(x: Tensor) -> Tensor:
        flat = x[:, 1:].flatten(0, 1)
        delta = edit_delta(stored.dictionary, flat, [Ablate(feature)])
        return torch.cat([x[:, :1], x[:, 1:] + delta.view_as(x[:, 1:])], dim=1)

    return change


def busy(stored: StoredDictionary, world: World, sequences: Sequence[Tensor]) -> int:
    """The feature that is most active at the sequences' ends."""
    total = torch.zeros(stored.card.n_features)
    for tokens in sequences:
        (x,) = read_sites(world.model, [stored.card.site], tokens[None])
        total += stored.dictionary.encode(x[0, -1])
    assert total.max() > 0
    return int(total.argmax())


def test_nothing_after_the_last_sites_layer_runs(world: World) -> None:
    sites = [Site.parse(site) for site in SITES[:3]]
    # The first time, the model runs to be understood.
    expected = read_sites(world.model, sites, contexts())
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(decoder_layers(world.model))
    ]

    found = read_until(world.model, sites, contexts())
    for handle in handles:
        handle.remove()

    assert ran == [0, 1, 2]
    for x, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(x, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("site", "later"),
    [
        ("resid_post.1", "mlp_out.2"),
        ("attn_out.2", "resid_post.2"),
        ("mlp_out.2", "resid_post.3"),
        ("resid_post.0", "attn_out.3"),
    ],
)
def test_a_later_site_is_as_in_a_whole_run(world: World, site: str, later: str) -> None:
    tokens, lengths = contexts(3, 9), torch.tensor([9, 5, 7])
    start, end = Site.parse(site), Site.parse(later)
    rest = Rest(world.model, start, tokens, lengths)
    x = rest.x + torch.randn(rest.x.shape, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 1])
    expected: list[Tensor] = []
    edited = site_hook(world.model, start, lambda _: x)
    with torch.no_grad(), edited, site_hook(world.model, end, expected.append):
        logits = world.model(input_ids=tokens).logits

    with torch.no_grad():
        found = rest.at(end, x[order], order)
        ends = rest.logits(x[order], order)

    torch.testing.assert_close(found, expected[0][order], rtol=1e-4, atol=1e-5)
    own = logits[torch.arange(3), lengths - 1][order]
    torch.testing.assert_close(ends, own, rtol=1e-4, atol=1e-4)
    assert all(type(layer).__name__ != "_Returns" for layer in decoder_layers(world.model))


def test_sites_are_in_the_order_in_which_they_are_computed() -> None:
    names = ["mlp_out.2", "resid_post.1", "attn_z.2", "resid_post.2", "mlp_act.2", "attn_out.2"]

    ordered = sorted(names, key=lambda name: depth(Site.parse(name)))

    assert ordered == [
        "resid_post.1",
        "attn_z.2",
        "attn_out.2",
        "mlp_act.2",
        "mlp_out.2",
        "resid_post.2",
    ]


def test_an_effect_is_that_of_the_ablation_in_a_whole_run(world: World) -> None:
    stored = world.stored["resid_post.2"]
    sequences = [contexts()[0, :7], contexts()[1, :12], contexts()[2, :4]]
    feature = busy(stored, world, sequences)

    found = effect(world.model, stored, feature, sequences)

    logits, changes = [], []
    for tokens in sequences:
        with torch.no_grad():
            before = world.model(input_ids=tokens[None]).logits[0, -1]
            with site_hook(world.model, stored.card.site, ablated(stored, feature)):
                after = world.model(input_ids=tokens[None]).logits[0, -1]
        logits.append(after - before)
        changes.append(after.log_softmax(-1) - before.log_softmax(-1))
    assert torch.stack(logits).abs().max() > 0.01
    torch.testing.assert_close(found.logits, torch.stack(logits).mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.each, torch.stack(changes), rtol=1e-3, atol=1e-4)
    mean = torch.stack(changes).mean(0)
    torch.testing.assert_close(found.log_probabilities, mean, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found.placebo, found.log_probabilities, atol=1e-3)


def test_the_placebo_is_the_active_feature_whose_part_is_closest_in_length(world: World) -> None:
    stored, tokens = world.stored["resid_post.2"], contexts()[0, :8]
    (x,) = read_sites(world.model, [stored.card.site], tokens[None])
    f = stored.dictionary.encode(x[0, -1])
    lengths = f * stored.dictionary.rows.decoder.norm(dim=1)
    feature, *others = sorted(f.nonzero().squeeze(1).tolist(), key=lambda i: lengths[i])
    assert len(others) > 1
    closest = min(others, key=lambda i: abs(lengths[i] - lengths[feature]))

    found = effect(world.model, stored, feature, [tokens]).placebo

    expected = effect(world.model, stored, closest, [tokens]).log_probabilities
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_token_of_an_effect_is_a_likely_one() -> None:
    changes = torch.tensor([-0.5, -3.0, -1.0, 0.2])
    before = torch.tensor([0.5, LIKELY / 2, 0.4, 0.1])
    found = Effect(changes, changes, changes / 10, before, torch.stack([changes, changes + 2]))

    token, change = target(found)
    told = as_json(found, token, ["a", "b", "c", "d"])

    assert (token, change) == (2, -1.0)
    assert told["rank"] == 2
    assert told["falls"] == 0.5
    assert told["placebo"] == pytest.approx(-0.1)
    assert told["visible"] == 3
    assert [name for name, _ in told["logits"]["down"]] == ["b", "c", "a"]
    assert [name for name, _ in told["log_probabilities"]["down"]] == ["c", "a"]
    assert [name for name, _ in told["log_probabilities"]["up"]] == ["d"]


@pytest.mark.parametrize(
    ("of", "source"),
    [
        ("resid_post.2", "resid_post.1"),
        ("resid_post.2", "attn_out.2"),
        ("resid_post.2", "mlp_out.2"),
        ("mlp_out.2", "resid_post.1"),
        ("mlp_out.2", "attn_out.2"),
        ("attn_out.2", "resid_post.1"),
    ],
)
def test_causes_are_those_of_ablating_each_feature_in_a_whole_run(
    world: World, of: str, source: str
) -> None:
    later, earlier = world.stored[of], world.stored[source]
    sequences = [contexts()[0, :6], contexts()[1, :10]]
    feature = busy(later, world, sequences)

    def level(tokens: Tensor) -> float:
        (x,) = read_sites(world.model, [later.card.site], tokens[None])
        return later.dictionary.encode(x[0, -1])[feature].item()

    before = [level(tokens) for tokens in sequences]
    expected = torch.zeros(earlier.card.n_features)
    for number in range(earlier.card.n_features):
        with site_hook(world.model, earlier.card.site, ablated(earlier, number)):
            falls = [was - level(tokens) for was, tokens in zip(before, sequences, strict=True)]
        expected[number] = sum(falls) / sum(before)

    found = causes(world.model, Feature(later, feature), earlier, sequences)

    every = torch.zeros_like(expected)
    every[found.features] = found.falls
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(every, expected, rtol=1e-3, atol=1e-4)
    best = int(expected.argmax())
    assert strongest(found, 1)[0][0] == best
    again = causes(world.model, Feature(later, feature), earlier, sequences, [best])
    assert again.features.tolist() == [best]
    assert again.falls.item() == pytest.approx(expected[best].item(), rel=1e-3)
    assert spread(found)["active"] == len(found.features)


def test_a_survey_finds_all_activations(world: World) -> None:
    wanted = [world.stored[site] for site in ("resid_post.2", "attn_out.2")]
    text = contexts(40, 12).int()

    (own, other), coordinates = survey(world.model, wanted, text, Stop())

    for stored, activity in zip(wanted, (own, other), strict=True):
        (x,) = read_sites(world.model, [stored.card.site], text.long())
        f = stored.dictionary.encode(x)
        f[:, 0] = 0
        f[x.norm(dim=-1) > stored.card.training["max_norm"]] = 0
        for feature in range(stored.card.n_features):
            places, values = activity.of(feature)
            expected = f[:, :, feature].flatten()
            assert places.tolist() == expected.nonzero().squeeze(1).tolist()
            torch.testing.assert_close(values, expected[places.long()], rtol=1e-4, atol=1e-5)
    (x,) = read_sites(world.model, [wanted[0].card.site], text.long())
    places, values = coordinates.of(5)
    torch.testing.assert_close(values, x.flatten(0, 1)[places.long(), 5], rtol=1e-5, atol=1e-6)
    assert (values > 0).all()
    assert own.tokens == 40 * 11
    assert own.density(0) == len(own.of(0)[0]) / own.tokens


def test_features_of_a_top_k_dictionary_are_ablated_as_they_are_chosen(world: World) -> None:
    stored = world.stored["resid_post.2"]
    rows = stored.dictionary.W_dec
    chosen = Dictionary(rows.T, torch.zeros(24), rows, torch.zeros(16), Activation.TOP_K, k=3)
    sparse = replace(stored, dictionary=chosen)
    tokens = contexts()[0, :9]
    feature = busy(sparse, world, [tokens])

    found = effect(world.model, sparse, feature, [tokens])

    with torch.no_grad():
        before = world.model(input_ids=tokens[None]).logits[0, -1]
        with site_hook(world.model, stored.card.site, ablated(sparse, feature)):
            after = world.model(input_ids=tokens[None]).logits[0, -1]
    torch.testing.assert_close(found.logits, after - before, rtol=1e-3, atol=1e-4)


def test_sinks_are_not_ablated(world: World) -> None:
    stored = world.stored["resid_post.2"]
    tokens = contexts()[0, :8]
    feature = busy(stored, world, [tokens])
    training = stored.card.training | {"max_norm": 0.0}
    of_nothing = replace(stored, card=replace(stored.card, training=training))

    found = effect(world.model, of_nothing, feature, [tokens])

    assert found.logits.abs().max() == 0
