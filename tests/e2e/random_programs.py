"""Random requests with random programs, and the dictionaries they are about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import AutoConfig

from steer_server.dictionary.card import Card, Model, config_digest, model_shape
from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.edits import Ablate, Add, AddRelative, Clamp, Edit, Limit, Patch, Scale
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.files import StoredDictionary, load, save
from steer_server.dictionary.site import Site
from steer_server.program import Condition, FeatureEdit, Oversize, Program, ReadOut, Scope
from tests.e2e.multi_reference import holds

N_FEATURES = 256


def make_dictionaries(model: Path, folder: Path) -> dict[str, StoredDictionary]:
    """One of each architecture, over four sites; two share one."""
    made = {
        "tied": ("resid_post.1", "tied_relu", _tied),
        "directions": ("resid_post.1", "directions", _directions),
        "jump": ("resid_post.2", "jump_relu", _jump),
        "top_k": ("mlp_out.1", "top_k", _top_k),
        "gated": ("attn_out.2", "gated", _gated),
        "centred": ("mlp_out.1", "relu", _centred),
    }
    shape = model_shape(AutoConfig.from_pretrained(model))
    stored = {}
    for seed, (name, (site, architecture, make)) in enumerate(made.items()):
        dictionary = make(_Normal(seed, shape["hidden_size"]))
        card = Card.of(
            dictionary,
            name=name,
            model=Model(model.name, "", config_digest(shape)),
            site=Site.parse(site),
            architecture=architecture,
        )
        save(folder / name, card, dictionary, FeatureStatistics.zeros(N_FEATURES))
        stored[name] = load(folder / name, shape)
    return stored


class _Normal:
    def __init__(self, seed: int, d_model: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._d_model = d_model

    def rows(self) -> Tensor:
        """Unit rows: x of length 11 gives z of about 1."""
        found = torch.randn(N_FEATURES, self._d_model, generator=self._generator)
        return torch.nn.functional.normalize(found, dim=1)

    def features(self) -> Tensor:
        return torch.randn(N_FEATURES, generator=self._generator)

    def vector(self) -> Tensor:
        return torch.randn(self._d_model, generator=self._generator)


def _tied(normal: _Normal) -> Dictionary:
    return Dictionary.tied(normal.rows(), torch.full((N_FEATURES,), -0.5))


def _directions(normal: _Normal) -> Dictionary:
    return Dictionary.directions(3 * normal.rows())


def _jump(normal: _Normal) -> Dictionary:
    threshold = 0.5 + normal.features().abs()
    return Dictionary(
        normal.rows().T,
        0.1 * normal.features(),
        2 * normal.rows(),
        torch.zeros_like(normal.vector()),
        Activation.JUMP_RELU,
        threshold=threshold,
    )


def _top_k(normal: _Normal) -> Dictionary:
    return Dictionary(
        normal.rows().T,
        0.1 * normal.features(),
        normal.rows(),
        0.1 * normal.vector(),
        Activation.TOP_K,
        input_scale=2.0,
        center_input=True,
        k=48,
    )


def _gated(normal: _Normal) -> Dictionary:
    return Dictionary.gated(
        normal.rows().T,
        0.2 * normal.features(),
        0.3 * normal.features(),
        0.2 * normal.features(),
        normal.rows(),
        0.1 * normal.vector(),
    )


def _centred(normal: _Normal) -> Dictionary:
    return Dictionary(
        normal.rows().T,
        0.3 * normal.features(),
        0.5 * normal.rows(),
        0.3 * normal.vector(),
        input_scale=0.5,
        center_input=True,
    )


@dataclass(frozen=True)
class Update:
    """A new program for a running job."""

    seen: int
    """Tokens that the client has seen when it decides to send it."""
    delay: float
    """Seconds until it does; a request that waits in a preemption may get it there."""
    program: Program
    at_index: int | None = None


@dataclass(frozen=True)
class Job:
    """One request of a case."""

    name: str
    prompt: tuple[int, ...]
    tokens: int
    program: Program
    live: bool
    updates: tuple[Update, ...]
    abort_after: int | None
    """Tokens seen when the client leaves; None: it stays to the end."""
    pause: float
    """Seconds before it is sent."""
    paused: tuple[int, float] | None = None
    """After how many tokens seen the client pauses it, and for how many seconds."""


class Draw:
    """Draws a case from a seed."""

    def __init__(
        self,
        seed: int,
        dictionaries: Mapping[str, StoredDictionary],
        vocabulary: int,
        continuation: Callable[[Sequence[int], int], list[int]],
    ) -> None:
        """`continuation` guesses which tokens will be generated, so that scopes name some that come."""
        self.seed = seed
        self._random = Random(seed)
        self._more = Random(f"{seed}, of what came later, so that seeds keep their cases")
        self._dictionaries = dictionaries
        self._vocabulary = vocabulary
        self._continuation = continuation

    def case(self) -> list[Job]:
        count = self._random.randint(3, 8)
        jobs: list[Job] = []
        for number in range(count):
            earlier = self._random.choice(jobs) if jobs and self._chance(0.3) else None
            jobs.append(self._job(f"{self.seed}-{number}", earlier))
        return jobs

    def _job(self, name: str, earlier: Job | None) -> Job:
        """One that follows `earlier` has its program and begins with its prompt: it may find it in the cache."""
        random = self._random
        tokens = random.randint(1, 48)
        if earlier is not None:
            prompt = (*earlier.prompt, *self._tokens(random.randint(0, 64 - len(earlier.prompt))))
            return replace(
                earlier,
                name=name,
                prompt=prompt,
                tokens=tokens,
                program=_possible(earlier.program, len(prompt), tokens),
                live=False,
                updates=(),
                abort_after=None,
                pause=random.choice([0.0, 0.1]),
                paused=None,
            )
        # Short ones are many at a time, and cross into their second KV block long after their first updates.
        prompt = self._tokens(random.randint(3, random.choice([16, 60])))
        likely = [*prompt, *self._continuation(prompt, 6)]
        live = self._chance(0.6)
        after = sorted(
            random.randint(0, tokens) for _ in range(random.randint(1, 3) if live else 0)
        )
        return Job(
            name,
            prompt,
            tokens,
            Program() if self._chance(0.1) else self.program(len(prompt), tokens, likely),
            live,
            tuple(
                Update(
                    seen,
                    random.choice([0.0, random.uniform(0, 0.3)]),
                    self.program(len(prompt), tokens, likely),
                    self._more.choice([None, self._more.randint(0, tokens)]),
                )
                for seen in after
            ),
            random.randint(1, tokens) if self._chance(0.1) else None,
            random.choice([0.0, 0.0, random.uniform(0, 0.3)]),
            self._pause(tokens) if live else None,
        )

    def program(self, prompt_length: int, tokens: int, likely: Sequence[int]) -> Program:
        random, edits = self._random, {}
        for _ in range(random.randint(0, 6)):
            name = random.choice(list(self._dictionaries))
            feature = random.randrange(N_FEATURES)
            rows = prompt_length + tokens - 1
            edits[name, feature] = FeatureEdit(
                name,
                self._edit(feature, prompt_length, rows),
                self._scope(prompt_length, rows, likely),
                self._condition(name, feature),
            )
        read_outs = tuple(self._read_out() for _ in range(random.randint(0, 3)))
        limit = self._more.choice([None, None, self._more.uniform(0.02, 0.3)])
        oversize = self._more.choice([Oversize.CLAMP, Oversize.WARN])
        if limit is None:
            oversize = Oversize.REJECT
        made = Program(tuple(edits.values()), read_outs, limit, oversize)
        return _possible(made, prompt_length, tokens)

    def _pause(self, tokens: int) -> tuple[int, float] | None:
        more = self._more
        return more.choice([None, (more.randint(0, tokens), more.uniform(0, 0.3))])

    def _edit(self, feature: int, prompt_length: int, rows: int) -> Edit:
        number = self._random.uniform
        low = number(-1, 2)
        if self._chance(0.5):
            places = self._random.sample(range(rows), min(rows, 8))
        else:
            places = self._random.sample(range(-prompt_length, 0), min(prompt_length, 4))
        return self._random.choice(
            [
                Ablate(feature),
                Clamp(feature, number(0, 4)),
                Scale(feature, number(-2, 3)),
                Add(feature, number(-4, 4)),
                AddRelative(feature, number(-0.3, 0.3)),
                Limit(feature, low, low + number(0, 2)),
                Limit(feature, high=number(0, 1)),
                Limit(feature, low=number(0, 3)),
                Patch(feature, tuple((p, number(0, 4)) for p in sorted(places))),
            ]
        )

    def _scope(self, prompt_length: int, rows: int, likely: Sequence[int]) -> Scope:
        random = self._random
        if self._chance(0.3):
            return Scope()

        def place() -> int:
            return random.randrange(-prompt_length, rows)

        def end() -> int | None:
            return None if self._chance(0.3) else place()

        phases = random.choice([(True, True), (True, True), (True, False), (False, True)])
        return Scope(
            *phases,
            positions=frozenset(place() for _ in range(random.choice([0, 0, 0, 1, 5]))),
            windows=tuple((place(), end()) for _ in range(random.choice([0, 0, 1, 2]))),
            token_ids=frozenset(random.sample(likely, 4)) if self._chance(0.2) else frozenset(),
            exclude_positions=frozenset(place() for _ in range(random.choice([0, 1, 3]))),
            exclude_token_ids=frozenset(random.sample(likely, 2))
            if self._chance(0.2)
            else frozenset(),
        )

    def _condition(self, name: str, feature: int) -> Condition | None:
        if not self._chance(0.3):
            return None
        site = self._dictionaries[name].card.site
        other = self._random.choice(
            [n for n, stored in self._dictionaries.items() if stored.card.site == site]
        )
        own = other == name and self._chance(0.5)
        above = self._random.choice([0.0, self._random.uniform(-0.5, 1.5)])
        return Condition(other, feature if own else self._random.randrange(N_FEATURES), above)

    def _read_out(self) -> ReadOut:
        random = self._random
        phases = random.choice([(True, True), (True, False), (False, True)])
        named = tuple(random.sample(range(N_FEATURES), random.randint(1, 20)))
        kind = random.choice(
            [{"top_k": random.randint(1, 40)}, {"features": named}, {"above": random.uniform(0, 2)}]
        )
        return ReadOut(
            random.choice(list(self._dictionaries)),
            row_bytes=random.choice([8, 80, 1024]),
            prompt=phases[0],
            generated=phases[1],
            edited=self._chance(0.5),
            complete=self._chance(0.5),
            **kind,
        )

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(3, self._vocabulary) for _ in range(count))

    def _chance(self, share: float) -> bool:
        return self._random.random() < share


def _possible(program: Program, prompt_length: int, tokens: int) -> Program:
    """Without the edits that can hold nowhere, which the engine refuses."""

    def possible(entry: FeatureEdit) -> bool:
        scope = replace(entry.scope, token_ids=frozenset(), exclude_token_ids=frozenset())
        free = replace(entry, scope=scope)
        return any(holds(free, p, -1, prompt_length) for p in range(prompt_length + tokens - 1))

    return replace(program, edits=tuple(filter(possible, program.edits)))
