"""Curves of KL against what is patched, for features of dictionaries and for the directions they are compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from trainer.errors import BadConfig
from trainer.paper.ioi.baselines import diff_mean, signed
from trainer.paper.ioi.patching import Bench, Patching
from trainer.paper.ioi.prompts import Prompt, draw, names
from trainer.paper.ioi.search import Search
from trainer.paper.ioi.section import section
from trainer.paper.ioi.served import served_effects
from trainer.paper.lab import Lab, training
from trainer.paper.page import Section

_KEPT = "what was measured is kept"


class _Subject(NamedTuple):
    """Something to patch."""

    name: str
    site: Site
    alpha: float
    """Weight of the sparsity term it was trained with; 0 if it was not."""
    sha256: str
    """Of the dictionary it is, or is made of; empty for directions made of the prompts."""
    make: Callable[[Bench], Dictionary]


def experiment(lab: Lab) -> Section:
    """Section 4 of the paper, on the dictionaries of `ioi.dictionaries`."""
    if not lab.config.ioi.dictionaries:
        raise BadConfig("ioi.dictionaries names no folder; these are the dictionaries to patch")
    return section(_curves(lab), _searches(lab), _served(lab))


def _curves(lab: Lab) -> list[dict[str, Any]]:
    settings = lab.config.ioi
    results, benches = lab.results("ioi"), _Benches(lab)
    shared = _prompt_settings(lab) | {
        name: asdict(settings)[name] for name in ("heldout", "sizes", "attribution_steps")
    }
    found = []
    for subject in tqdm(list(_subjects(lab)), desc="patching", unit=" dictionaries"):
        lab.stop.check(_KEPT)
        about = shared | {"dictionary": subject.sha256, "site": str(subject.site)}

        def compute(subject: _Subject = subject) -> dict[str, Any]:
            return _curve(lab, benches, subject)

        name = f"curve-{subject.name.replace('/', '-')}"
        found.append(
            {"name": subject.name, "site": str(subject.site), "alpha": subject.alpha}
            | results.get(name, about, compute)
        )
    return found


def _curve(lab: Lab, benches: "_Benches", subject: _Subject) -> dict[str, Any]:
    """Effects of the first features by attribution, on the prompts they were chosen on and on others."""
    settings = lab.config.ioi
    bench, heldout = benches.of(subject.site, "prompts"), benches.of(subject.site, "heldout")
    dictionary = subject.make(bench)
    chosen, scored = Patching(bench, dictionary), Patching(heldout, dictionary)
    order = chosen.by_attribution(settings.attribution_steps)
    sizes = [size for size in settings.sizes if size < len(order)]
    sets = [order[:size] for size in sizes] + [order]
    # Past all that differ on the prompts, all that differ at all.
    heldout_sets = [*sets[:-1], range(dictionary.n_features)]
    found = {"prompts": _effects(chosen, sets)}
    lab.stop.check(_KEPT)
    return {
        "features": dictionary.n_features,
        "differing": len(order),
        "order": order[: max(settings.sizes)],
        "sizes": [*sizes, len(order)],
        "heldout": _effects(scored, heldout_sets),
    } | found


def _effects(patching: Patching, sets: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    pairs = zip(patching.effects(sets), patching.changed(sets), strict=True)
    return [effect._asdict() | {"changed": changed} for effect, changed in pairs]


def _searches(lab: Lab) -> list[dict[str, Any]]:
    settings = lab.config.ioi
    results, benches = lab.results("ioi"), _Benches(lab)
    about = _prompt_settings(lab) | {
        name: asdict(settings)[name]
        for name in ("attribution_steps", "search_prompts", "search_candidates", "thresholds")
    }
    found = []
    for folder in settings.searched:
        stored = lab.dictionary(folder)
        name = _name(folder)

        def compute(stored: StoredDictionary = stored) -> dict[str, Any]:
            return _search(lab, benches.of(stored.card.site, "searched"), stored.dictionary)

        about_this = about | {"dictionary": stored.sha256}
        made = results.get(f"search-{name.replace('/', '-')}", about_this, compute)
        found.append({"name": name, "site": str(stored.card.site)} | made)
    return found


def _search(lab: Lab, bench: Bench, dictionary: Dictionary) -> dict[str, Any]:
    settings = lab.config.ioi
    patching = Patching(bench, dictionary)
    order = patching.by_attribution(settings.attribution_steps)
    candidates = order[: settings.search_candidates or len(order)]
    evaluated = 0
    with tqdm(desc="search", unit=" sets") as bar:

        def evaluate(sets: Sequence[tuple[int, ...]]):
            nonlocal evaluated
            evaluated += len(sets)
            bar.update(len(sets))
            return patching.effects(sets)

        search = Search(evaluate, candidates, f"{lab.config.seed}", settings.search_batch)
        points = search.run(
            settings.thresholds, lambda: lab.stop.check("the search of this dictionary starts anew")
        )
        whole, nothing = patching.effects([candidates, []])
    # The original tries every feature at the first threshold, those that never differ as well.
    skipped = 0 if settings.search_candidates else dictionary.n_features - len(order)
    return {
        "features": dictionary.n_features,
        "differing": len(order),
        "candidates": len(candidates),
        "one_by_one": search.steps + skipped,
        "evaluated": evaluated,
        "rounds": search.rounds,
        "whole": whole._asdict(),
        "nothing": nothing._asdict(),
        "points": [
            {"threshold": p.threshold, "features": sorted(p.features)} | p.effect._asdict()
            for p in points
        ],
    }


def _served(lab: Lab) -> dict[str, Any] | None:
    """The first dictionary's curve through a server, beside the one above; None without a server."""
    settings = lab.config.ioi
    if not settings.server:
        return None
    stored = lab.dictionary(settings.dictionaries[0])
    bench = _Benches(lab).of(stored.card.site, "heldout")
    patching = Patching(bench, stored.dictionary)
    order = patching.by_attribution(settings.attribution_steps)
    sets = [order[:size] for size in settings.sizes if size <= len(order)]
    about = _prompt_settings(lab) | {"dictionary": stored.sha256, "sets": sets}

    def compute() -> dict[str, Any]:
        there = served_effects(settings.server, stored, bench.prompts, sets)
        here = patching.effects(sets)
        rows = zip(sets, here, there, strict=True)
        return {
            "name": _name(settings.dictionaries[0]),
            "prompts": len(bench.prompts),
            "rows": [
                {"size": len(chosen), "here": mine._asdict(), "there": theirs._asdict()}
                for chosen, mine, theirs in rows
            ],
        }

    return lab.results("ioi").get("served", about, compute)


class _Benches:
    """Of a site and a part of the prompts, each made once."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.of = cache(self._of)
        self._known = names(lab.tokenizer, lab.config.ioi.names)

    def _of(self, site: Site, part: str) -> Bench:
        return Bench(self._lab.model(), site, self._prompts(part))

    def _prompts(self, part: str) -> list[Prompt]:
        settings, seed = self._lab.config.ioi, self._lab.config.seed
        if part == "searched":
            return self._prompts("prompts")[: settings.search_prompts]
        count = settings.prompts if part == "prompts" else settings.heldout
        return draw(self._lab.tokenizer, self._known, count, f"{seed} {part}")


def _subjects(lab: Lab) -> Iterator[_Subject]:
    """The dictionaries, each PCA with its signs apart as well, and each site's difference of means."""
    sites: dict[Site, None] = {}
    for folder in lab.config.ioi.dictionaries:
        stored = lab.dictionary(folder)
        site = stored.card.site
        alpha = training(stored).alpha
        yield _Subject(_name(folder), site, alpha, stored.sha256, lambda _, d=stored.dictionary: d)
        if stored.card.architecture == "pca" and not stored.dictionary.non_negative:
            made = signed(stored.dictionary)
            yield _Subject(f"{_name(folder)}-signed", site, 0.0, stored.sha256, lambda _, d=made: d)
        sites.setdefault(site)
    for site in sites:
        yield _Subject(f"diff_mean-{site}", site, 0.0, "", diff_mean)


def _prompt_settings(lab: Lab) -> dict[str, Any]:
    config = lab.config
    return {
        "model": config.model,
        "seed": config.seed,
        "names": config.ioi.names,
        "prompts": config.ioi.prompts,
        "torch": torch.__version__,
    }


def _name(folder: str) -> str:
    return "/".join(folder.rstrip("/").split("/")[-2:])
