"""The reference for whole programs: transformers with hooks at every site, in float32, asked about given tokens.

It shares no arithmetic with the engine: what an edit means and where it holds is written down here once more, from the
documentation, position by position.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.edits import Ablate, Add, AddRelative, Clamp, Edit, Limit, Patch, Scale
from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from steer_server.program import FeatureEdit, Oversize, Program

CLOSE = 1e-3
TOSS = 1e-5
"""Where a threshold or a condition is this near, rounding decides on which side the model is."""
"""Activations nearer than this to where they set in, in units of z, may be computed as on or off."""


@dataclass(frozen=True)
class Held:
    """A program, and the positions [start, stop) at which it held."""

    program: Program
    start: int
    stop: int


@dataclass
class EditTally:
    """What an edit did in the reference."""

    rows: list[int] = field(default_factory=list)
    changed: int = 0
    close: int = 0
    """Rows on which rounding decides whether it changes anything."""
    sizes: list[float] = field(default_factory=list)


@dataclass
class Answer:
    """What the model says of a text under programs."""

    logprobs: Tensor
    """[generated], of the tokens that were asked about."""
    best: Tensor
    """[generated], of the likeliest token at each place."""
    before: dict[Site, Tensor]
    """x before edits, [prompt + generated - 1, d_model]."""
    after: dict[Site, Tensor]
    tallies: dict[tuple[int, int], EditTally]
    """By (index of the held program, edit)."""
    settled: int
    """Rows before the first one at which rounding decides an edit."""
    limited: list[int] = field(default_factory=list)
    """Rows past the limit of their program, once for each site."""


def holds(entry: FeatureEdit, position: int, token: int, prompt_length: int) -> bool:
    """Whether the edit is to run at the position, its condition aside."""

    def place(p: int) -> int:
        return p if p >= 0 else prompt_length + p

    scope = entry.scope
    if position in {place(p) for p in scope.exclude_positions} or token in scope.exclude_token_ids:
        return False
    if not (scope.prompt if position < prompt_length else scope.generated):
        return False
    if scope.token_ids and token not in scope.token_ids:
        return False
    if isinstance(entry.edit, Patch) and position not in {place(p) for p, _ in entry.edit.values}:
        return False
    windows = [(place(a), math.inf if b is None else place(b)) for a, b in scope.windows]
    anywhere = not scope.positions and not windows
    return (
        anywhere
        or position in {place(p) for p in scope.positions}
        or any(a <= position < b for a, b in windows)
    )


def target(
    edit: Edit, f: Tensor, x: Tensor, decoder_row: Tensor, position: int, prompt_length: int
) -> Tensor:
    """The activation that the edit asks for where it is `f`, at one position."""
    match edit:
        case Ablate():
            return torch.zeros_like(f)
        case Clamp(_, value):
            return torch.full_like(f, value)
        case Scale(_, factor):
            return factor * f
        case Add(_, value):
            return f + value
        case AddRelative(_, share):
            return f + share * x.norm() / decoder_row.norm()
        case Limit(_, low, high):
            return f.clamp(low, high)
        case Patch(_, values):
            places = {p if p >= 0 else prompt_length + p: value for p, value in values}
            return torch.full_like(f, places[position])


def preactivations(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """z, and the value above which each feature is on; [rows, n_features]."""
    center = dictionary.b_dec if dictionary.center_input else 0.0
    z = (dictionary.input_scale * x - center) @ dictionary.W_enc + dictionary.b_enc
    match dictionary.activation:
        case Activation.RELU:
            threshold = torch.zeros_like(z)
        case Activation.JUMP_RELU:
            assert dictionary.threshold is not None
            threshold = dictionary.threshold.expand_as(z)
        case Activation.IDENTITY:
            threshold = torch.full_like(z, -torch.inf)
        case Activation.TOP_K:
            # Halfway between the k-th and the next one.
            largest = z.topk(dictionary.k + 1).values
            threshold = largest[:, -2:].mean(dim=1, keepdim=True).clamp(min=0.0).expand_as(z)
    return z, threshold


def activations(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """f, and which of them rounding decides; [rows, n_features]."""
    z, threshold = preactivations(dictionary, x)
    # Without a threshold a feature is active unless it is 0, which rounding decides where an edit has made it so.
    edge = torch.where(threshold.isfinite(), threshold, 0.0)
    return torch.where(z > threshold, z, 0.0), (z - edge).abs() < CLOSE


def margin(dictionary: Dictionary, x: Tensor) -> Tensor:
    """How far each feature is from jumping to 0 or back; [rows, n_features]."""
    if dictionary.activation in (Activation.RELU, Activation.IDENTITY):
        # These have no jump.
        return torch.full((len(x), dictionary.n_features), torch.inf)
    z, threshold = preactivations(dictionary, x)
    return (z - threshold).abs()


class MultiReference:
    """One model with the dictionaries of all its sites."""

    def __init__(self, model: Path, dictionaries: Mapping[str, StoredDictionary]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.dictionaries = dictionaries
        self.sites = sorted({stored.card.site for stored in dictionaries.values()})

    @torch.no_grad()
    def ask(self, prompt: Sequence[int], generated: Sequence[int], held: Sequence[Held]) -> Answer:
        """`held` cover the positions of the text one after the other."""
        ids = [*prompt, *generated[:-1]]
        answer = Answer(torch.empty(0), torch.empty(0), {}, {}, {}, len(ids))
        with self._hooked(ids, len(prompt), held, answer):
            logits = self.model(torch.tensor([ids]), logits_to_keep=len(generated)).logits[0]
        scores = logits.log_softmax(dim=-1)
        answer.logprobs = scores.gather(1, torch.tensor([list(generated)]).T)[:, 0]
        answer.best = scores.max(dim=-1).values
        return answer

    @torch.no_grad()
    def continuation(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """What the model says by itself."""
        found, cache, step = [], None, torch.tensor([list(prompt)])
        for _ in range(tokens):
            out = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            step = out.logits[:, -1:].argmax(dim=-1)
            found.append(int(step))
        return found

    @contextmanager
    def _hooked(
        self, ids: Sequence[int], prompt_length: int, held: Sequence[Held], answer: Answer
    ) -> Iterator[None]:
        def hook_of(site: Site):
            def hook(_module: object, _inputs: object, output: object) -> object:
                hidden = output[0] if isinstance(output, tuple) else output
                assert isinstance(hidden, Tensor)
                x = hidden[0].clone()
                edited = x + self._delta(site, x, ids, prompt_length, held, answer)
                answer.before[site], answer.after[site] = x, edited
                return (edited[None], *output[1:]) if isinstance(output, tuple) else edited[None]

            return hook

        handles = [self._module(s).register_forward_hook(hook_of(s)) for s in self.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _module(self, site: Site) -> nn.Module:
        layer = self.model.model.layers[site.layer]
        return {"resid_post": layer, "mlp_out": layer.mlp, "attn_out": layer.self_attn}[site.stream]

    def _delta(
        self,
        site: Site,
        x: Tensor,
        ids: Sequence[int],
        prompt_length: int,
        held: Sequence[Held],
        answer: Answer,
    ) -> Tensor:
        delta = torch.zeros_like(x)
        here = {name: s for name, s in self.dictionaries.items() if s.card.site == site}
        margins = {name: margin(stored.dictionary, x) for name, stored in here.items()}
        encoded = {name: activations(stored.dictionary, x) for name, stored in here.items()}
        for number, part in enumerate(held):
            for index, entry in enumerate(part.program.edits):
                if entry.dictionary not in here:
                    continue
                dictionary = here[entry.dictionary].dictionary
                row = dictionary.W_dec[entry.edit.feature] / dictionary.input_scale
                tally = answer.tallies.setdefault((number, index), EditTally())
                for p in range(part.start, min(part.stop, len(ids))):
                    if holds(entry, p, ids[p], prompt_length):
                        f, close = (t[p, entry.edit.feature] for t in encoded[entry.dictionary])
                        on = True
                        nearest = float(margins[entry.dictionary][p, entry.edit.feature])
                        if entry.when is not None:
                            other, near = (
                                t[p, entry.when.feature] for t in encoded[entry.when.dictionary]
                            )
                            on = bool(other > entry.when.above)
                            other_margin = margins[entry.when.dictionary][p, entry.when.feature]
                            to_condition = abs(float(other) - entry.when.above)
                            nearest = min(nearest, float(other_margin), to_condition)
                            close = close | near | ((other - entry.when.above).abs() < CLOSE)
                        if nearest < TOSS:
                            answer.settled = min(answer.settled, p)
                        wanted = target(entry.edit, f, x[p], row, p, prompt_length)
                        change = wanted - f if on else torch.zeros(())
                        delta[p] += change * row
                        tally.rows.append(p)
                        tally.changed += bool(change != 0)
                        tally.close += bool(close)
                        tally.sizes.append(float(change.abs() * row.norm() / x[p].norm()))
            tallies = [answer.tallies.get((number, i)) for i in range(len(part.program.edits))]
            here_too = [entry.dictionary in here for entry in part.program.edits]
            held_here = [t for t, is_here in zip(tallies, here_too, strict=True) if t and is_here]
            self._limit(part, x, delta, held_here, answer)
        return delta

    def _limit(
        self, part: Held, x: Tensor, delta: Tensor, tallies: Sequence[EditTally], answer: Answer
    ) -> None:
        """Brings the rows on which the part holds within its program's limit, and what was told of them."""
        limit = part.program.max_relative_size
        for p in range(part.start, min(part.stop, len(x))) if limit else ():
            scale = limit * float(x[p].norm() / delta[p].norm()) if delta[p].any() else 1.0
            if scale >= 1:
                continue
            answer.limited.append(p)
            if part.program.oversize is Oversize.CLAMP:
                delta[p] *= scale
                for tally in tallies:
                    tally.sizes = [
                        size * scale if row == p else size
                        for row, size in zip(tally.rows, tally.sizes, strict=True)
                    ]
