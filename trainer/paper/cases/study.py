"""The case studies of one dictionary: what is computed, in which parts, on which text."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steer_server.dictionary.files import StoredDictionary
from trainer.errors import BadConfig
from trainer.paper.cases.activates import (
    LEAST,
    Kinds,
    Rating,
    commonest,
    fullest_at,
    histogram,
    ratings,
    strongest_at,
)
from trainer.paper.cases.activity import Activity, survey
from trainer.paper.cases.causes import Feature, causes, spread, strongest
from trainer.paper.cases.effects import as_json, effect, target
from trainer.paper.lab import Lab
from trainer.paper.rest import depth, read_until

MONOSEMANTIC = 0.5
"""Share of a feature's strong activations that must be on one kind of token."""
_LOOKED_AT = 8
"""Contexts in which a candidate is tried."""
LEAST_FALL = 0.02
"""Of a cause that is shown."""


class Study:
    """Of `settings.dictionary`; every method gives JSON values, from the results if they are there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.settings = lab.config.cases
        self.stored = lab.dictionary(self.settings.dictionary)
        self.parents = [lab.dictionary(folder) for folder in self.settings.parents]
        self.model_of = lab.model_of
        late = [p for p in self.parents if depth(p.card.site) >= depth(self.stored.card.site)]
        if late:
            raise BadConfig(
                f"the dictionary in {late[0].folder} is of {late[0].card.site}, which is not before "
                f"{self.stored.card.site}; parents are of earlier sites"
            )

    @cached_property
    def contexts(self) -> Tensor:
        return self.lab.heldout(self.settings.tokens, self.settings.context)

    @cached_property
    def half(self) -> int:
        """Tokens in which features are found; what they do is measured in those behind."""
        return len(self.contexts) // 2 * self.contexts.shape[1]

    @cached_property
    def kinds(self) -> Kinds:
        return Kinds(self.lab.texts)

    @cached_property
    def kinds_of_text(self) -> Tensor:
        return self.kinds.of[self.contexts.flatten().long()]

    @cached_property
    def _surveyed(self) -> tuple[list[Activity], Activity]:
        model = self.model_of(self.stored)
        return survey(model, [self.stored, *self.parents], self.contexts, self.lab.stop)

    def activity(self, stored: StoredDictionary) -> Activity:
        return self._surveyed[0][[self.stored, *self.parents].index(stored)]

    @cached_property
    def _base(self) -> dict[str, Any]:
        text = hashlib.sha256(self.contexts.numpy().tobytes()).hexdigest()
        return {
            "model": self.stored.card.model.revision,
            "dictionary": self.stored.sha256,
            "text": text,
            "seed": self.lab.config.seed,
        }

    def _part(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        self.lab.stop.check("the parts that are done are kept")
        return self.lab.results("cases").get(name, self._base | dict(settings), compute)

    def sample(
        self, stored: StoredDictionary, feature: int, first: int, end: int, most: int
    ) -> list[Tensor]:
        """Sequences up to tokens number first..end where the feature has at least half of its maximum, at random."""
        activity = self.activity(stored)
        places, values = activity.of(feature)
        places = places[values >= activity.maximum(feature) / 2].long()
        places = places[(places >= first) & (places < end)]
        generator = torch.Generator().manual_seed(self.lab.config.seed + feature)
        chosen = places[torch.randperm(len(places), generator=generator)[:most]].tolist()
        length = self.contexts.shape[1]
        return [self.contexts[place // length, : place % length + 1].long() for place in chosen]

    @property
    def activates(self) -> dict[str, Any]:
        """The sentence's feature and coordinate, what activates both, and how monosemantic all are."""
        chosen = self.settings
        asked = {"sentence": chosen.sentence, "dense": chosen.dense, "bins": chosen.bins}
        return self._part("activates", asked, self._activates)

    def _activates(self) -> dict[str, Any]:
        own, coordinates = self.activity(self.stored), self._surveyed[1]
        tokens = self._sentence()
        (x,) = read_until(self.model_of(self.stored), [self.stored.card.site], tokens[None])
        last = x[0, -1].float().cpu()
        found = strongest_at(self.stored.dictionary.encode(last), own, self.settings.dense)
        usual = [feature for feature, _, _, dense in found if not dense]
        if not usual:
            raise BadConfig(
                f"no feature of {self.stored.folder} is active on the last token of {self.settings.sentence!r} "
                f"and on less than {self.settings.dense:.0%} of the tokens; take another sentence"
            )
        coordinate, full = fullest_at(last, coordinates)
        early, names = self.kinds_of_text[: self.half], self.kinds.names
        text, bins = self.kinds_of_text, self.settings.bins
        return {
            "sentence": [self.lab.texts[token] for token in tokens.tolist()],
            "in_text": int((self.contexts == tokens[-1]).sum()),
            "found": found,
            "feature": usual[0],
            "coordinate": coordinate,
            "coordinate_full": full,
            "feature_tokens": commonest(own, usual[0], text, names),
            "coordinate_tokens": commonest(coordinates, coordinate, text, names),
            "feature_histogram": histogram(own, usual[0], text, names, bins),
            "coordinate_histogram": histogram(coordinates, coordinate, text, names, bins),
            "features": [list(rating) for rating in ratings(own, early, names)],
            "coordinates": [list(rating) for rating in ratings(coordinates, early, names)],
        }

    def _sentence(self) -> Tensor:
        ids = self.lab.tokenizer(self.settings.sentence, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids)

    @property
    def rated(self) -> list[Rating]:
        """Features that are not dense, the most monosemantic first."""
        found = [Rating(*rating) for rating in self.activates["features"]]
        usual = [rating for rating in found if rating.density <= self.settings.dense]
        return sorted(usual, key=lambda rating: (-rating.share, -rating.strong, rating.feature))

    @cached_property
    def answer(self) -> int:
        """The first token of `settings.answer`."""
        ids = self.lab.tokenizer(self.settings.answer, add_special_tokens=False)["input_ids"]
        return int(ids[0])

    def on_sentence(self) -> dict[str, Any]:
        """What ablating the sentence's feature does to the token after the sentence."""
        feature, answer = self.activates["feature"], self.answer

        def compute() -> dict[str, Any]:
            found = effect(self.model_of(self.stored), self.stored, feature, [self._sentence()])
            return as_json(found, answer, self.lab.texts)

        asked = {"sentence": self.settings.sentence, "answer": answer, "feature": feature}
        return self._part("effect-sentence", asked, compute)

    def candidates(self) -> list[list[Any]]:
        """Of each kind of token the most monosemantic feature, with the token whose log-probability it lowers most in the first half.

        And by how much.
        """
        of_kind: dict[str, int] = {}
        for rating in self.rated:
            if rating.share >= MONOSEMANTIC:
                of_kind.setdefault(rating.kind, rating.feature)
        chosen = list(of_kind.values())[: self.settings.candidates]

        def compute() -> list[list[Any]]:
            found = []
            for feature in chosen:
                self.lab.stop.check("the candidates are tried anew")
                sequences = self.sample(self.stored, feature, 0, self.half, _LOOKED_AT)
                tried = effect(self.model_of(self.stored), self.stored, feature, sequences)
                found.append([feature, *target(tried)])
            return found

        return self._part("candidates", {"features": chosen}, compute)

    def effect_of(self, feature: int, token: int) -> dict[str, Any] | None:
        """On the token, in the second half; None where too few contexts are."""
        most = self.settings.contexts

        def compute() -> dict[str, Any] | None:
            sequences = self.sample(self.stored, feature, self.half, self.contexts.numel(), most)
            if len(sequences) < most // 2:
                return None
            found = effect(self.model_of(self.stored), self.stored, feature, sequences)
            return as_json(found, token, self.lab.texts)

        asked = {"token": token, "contexts": most}
        return self._part(f"effect-{feature}", asked, compute)

    def causes_of(self, stored: StoredDictionary, feature: int) -> list[dict[str, Any]]:
        """From each parent of an earlier site, those before nearest first."""
        earlier = [p for p in self.parents if depth(p.card.site) < depth(stored.card.site)]
        ordered = sorted(earlier, key=lambda parent: depth(parent.card.site), reverse=True)
        return [self._causes_from(stored, feature, source) for source in ordered]

    def _causes_from(
        self, stored: StoredDictionary, feature: int, source: StoredDictionary
    ) -> dict[str, Any]:
        most, branches = self.settings.contexts, self.settings.branches

        def compute() -> dict[str, Any]:
            both = self.sample(stored, feature, 0, self.contexts.numel(), 2 * most)
            first, fresh = both[: -(-len(both) // 2)][:most], both[-(-len(both) // 2) :]
            model, of = self.model_of(stored), Feature(stored, feature)
            found = causes(model, of, source, first)
            best = [pair for pair in strongest(found, branches) if pair[1] >= LEAST_FALL]
            again = causes(model, of, source, fresh, [number for number, _ in best])
            repeated = dict(zip(again.features.tolist(), again.falls.tolist(), strict=True))
            own, names = self.activity(source), self.kinds.names
            return {
                "site": str(source.card.site),
                "contexts": [len(first), len(fresh)],
                "causes": [
                    {
                        "feature": number,
                        "fall": fall,
                        "fresh": repeated.get(number, 0.0) if fresh else None,
                        "tokens": commonest(own, number, self.kinds_of_text, names),
                    }
                    for number, fall in best
                ],
            } | spread(found)

        name = f"causes-{stored.card.site}-{feature}-{source.card.site}"
        asked = {"of": stored.sha256, "source": source.sha256, "most": most, "branches": branches}
        return self._part(name, asked, compute)

    def tokens_of(self, stored: StoredDictionary, feature: int) -> list[tuple[str, float]]:
        """The commonest kinds of token where the feature is strong."""
        return self._part(
            f"tokens-{stored.card.site}-{feature}",
            {"of": stored.sha256},
            lambda: commonest(self.activity(stored), feature, self.kinds_of_text, self.kinds.names),
        )

    def tree_target(self) -> Rating:
        """The feature on the wanted kind of token that has the contexts it takes, or else the most monosemantic one."""
        wanted = self.settings.tree_token
        enough = [
            rating for rating in self.rated if rating.strong >= max(LEAST, self.settings.contexts)
        ]
        if not enough:
            raise BadConfig(
                f"no feature of {self.stored.folder} has {self.settings.contexts} strong activations in "
                f"{self.settings.tokens} tokens; read more with cases.tokens"
            )
        return next((rating for rating in enough if wanted in rating.kind), enough[0])
