"""Automatic interpretability, as a section of the report: the paper's figure 2 and what goes with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.paper.config import InterpretabilitySettings
from trainer.paper.interpretability import display, verdicts
from trainer.paper.interpretability.measure import Measurement, Subject, column
from trainer.paper.interpretability.records import per_split
from trainer.paper.interpretability.scores import Mean, mean
from trainer.paper.lab import Lab
from trainer.paper.page import Finding, Section

Results = Mapping[tuple[str, str], Mapping[str, Any]]


def experiment(lab: Lab) -> Section:
    """Explains and scores features of all dictionaries of the configuration."""
    measurement = Measurement(lab)
    found = measurement.run()
    return section(measurement.subjects, found, lab.config.interpretability)


def section(
    subjects: Sequence[Subject], found: Results, settings: InterpretabilitySettings
) -> Section:
    """What the scores say, by the first of the explainers."""
    explainers = settings.explainers
    first = Scores(subjects, found, explainers[0])
    findings = [_figure_2(first, found, explainers), _random_only(first)]
    findings += [*_top_k(first), *_basis(first), *_untrained(first)]
    judges = [found[subjects[0].label, name]["explainer"] for name in explainers]
    about = _about(found[subjects[0].label, explainers[0]], judges, settings)
    return Section("Automatic interpretability", about, findings)


def _about(
    result: Mapping[str, Any], judges: Sequence[str], settings: InterpretabilitySettings
) -> str:
    few = per_split(settings.examples)
    return (
        f"{result['fragments']:,} fragments of {settings.fragment_tokens} tokens of held-out text ({result['thrown']:,} others thrown "
        "away: incomplete characters or the end of a document). A feature is explained from "
        f"{few} of its {settings.examples} fragments of strongest activation, which an explainer sees with activations from 0 to 10. "
        f"Its activations on {few} others of them and on {few} random fragments in which it is active are simulated from the "
        "explanation, without calibration, and correlated with the true ones over all tokens together. Explainers: "
        f"{'; '.join(judges)}. Scores of different explainers and simulators are not comparable with each other, nor with the "
        "paper's, which had GPT-4 and text-davinci-003. Features are drawn among those active in enough fragments, so the "
        "scores say nothing of rarer ones; activations of directions, which may be negative, pass a ReLU; intervals are "
        "1.96 sd / sqrt(n)."
    )


class Scores:
    """By one explainer, with the dictionaries in their roles."""

    def __init__(self, subjects: Sequence[Subject], found: Results, explainer: str) -> None:
        self.explainer = explainer
        self.results = {subject.label: found[subject.label, explainer] for subject in subjects}
        self.subjects = subjects
        trained = [subject for subject in subjects if not subject.untrained_model]
        compared = {subject.stored.card.site for subject in trained if subject.baseline}
        self.baselines = [subject for subject in trained if subject.baseline]
        self.ours = [
            subject
            for subject in trained
            if not subject.baseline and (not compared or subject.stored.card.site in compared)
        ]
        """At the sites that have baselines."""
        self.untrained = [subject for subject in subjects if subject.untrained_model]

    def mean(self, subject: Subject, kind: str) -> Mean | None:
        return mean(list(column(self.results[subject.label], "scores", kind)))

    def means(self, subjects: Sequence[Subject], kind: str) -> list[Mean]:
        """Of those that have enough features."""
        found = [self.mean(subject, kind) for subject in subjects]
        return [one for one in found if one is not None]

    def said(self, subjects: Sequence[Subject], kind: str) -> str:
        """In words."""
        parts = [
            f"{subject.label} {one}"
            for subject in subjects
            if (one := self.mean(subject, kind)) is not None
        ]
        return ", ".join(parts) or "none"

    def named(self, architecture: str, *, top_k: bool) -> Subject | None:
        """The baseline of that kind, whole or with the largest of each token."""
        for subject in self.baselines:
            card = subject.stored.card
            if card.architecture == architecture and bool(subject.stored.dictionary.k) == top_k:
                return subject
        return None


def _figure_2(first: Scores, found: Results, explainers: Sequence[str]) -> Finding:
    kind = "top_and_random"
    ours, others = first.means(first.ours, kind), first.means(first.baselines, kind)
    everything = [Scores(first.subjects, found, explainer) for explainer in explainers]
    tables = [display.scores_table(scores) for scores in everything]
    tables += [display.told_table(scores) for scores in everything]
    tables += [
        display.examples_table(scores, (first.ours or first.subjects)[0]) for scores in everything
    ]
    return Finding(
        "Features against baselines",
        "Features of dictionaries are more interpretable than the basis, random directions, PCA and ICA, clearly so in early "
        "layers and hardly in the last (section 3.2, figure 2; scores up to 0.35)",
        verdicts.above(ours, others),
        f"Top-and-random by {first.explainer}: {first.said(first.ours, kind)}; baselines: {first.said(first.baselines, kind)}. "
        "Reproduced means that each of ours is above all baselines, 95% intervals apart.",
        tables,
        [figure for scores in everything for figure in display.figures(scores, kind)],
    )


def _random_only(first: Scores) -> Finding:
    kinds = "top_and_random", "random"
    pairs = [
        (a, b)
        for subject in first.ours
        if (a := first.mean(subject, kinds[0])) and (b := first.mean(subject, kinds[1]))
    ]
    ours, others = (first.means(group, kinds[1]) for group in (first.ours, first.baselines))
    return Finding(
        "Random fragments only",
        "On random fragments in which the feature is active scores are much lower, in the same order (appendix A)",
        verdicts.lower_in_the_same_order(pairs, ours, others),
        f"Random-only by {first.explainer}: {first.said(first.ours, kinds[1])}; baselines: "
        f"{first.said(first.baselines, kinds[1])}.",
        figures=display.figures(first, kinds[1]),
    )


def _top_k(first: Scores) -> list[Finding]:
    kind, shares = "top_and_random", {}
    best = max(first.means(first.ours, kind), key=lambda one: one.value, default=None)
    for architecture in ("pca", "ica", "basis", "random"):
        plain, top = (first.named(architecture, top_k=flag) for flag in (False, True))
        pair = [first.mean(subject, kind) for subject in (plain, top) if subject]
        if best and len(pair) == 2 and pair[0] and pair[1]:
            shares[architecture] = verdicts.share_of_gain(pair[0], pair[1], best)
    if not shares:
        return []
    said = ", ".join(
        f"{name} {'not ahead of it' if share is None else f'{share:.0%}'}"
        for name, share in shares.items()
    )
    return [
        Finding(
            "Sparsity alone",
            "Keeping the K largest coordinates of a token explains only a small part of the gain (appendix on top-K)",
            verdicts.small_parts(shares),
            f"Of the way from all coordinates to our best dictionary, the largest alone go: {said}. Small is at most "
            f"{verdicts.SMALL:.0%}.",
        )
    ]


def _basis(first: Scores) -> list[Finding]:
    kind = "top_and_random"
    basis, directions = (first.named(name, top_k=False) for name in ("basis", "random"))
    pair = [first.mean(subject, kind) for subject in (basis, directions) if subject]
    if len(pair) < 2 or pair[0] is None or pair[1] is None:
        return []
    return [
        Finding(
            "The residual stream's basis",
            "The basis of the residual stream is no more interpretable than random directions (section 3.2)",
            verdicts.no_better(pair[0], pair[1]),
            f"Top-and-random by {first.explainer}: basis {pair[0]}, random directions {pair[1]}.",
        )
    ]


def _untrained(first: Scores) -> list[Finding]:
    kind = "top_and_random"
    control, ours = first.means(first.untrained, kind), first.means(first.ours, kind)
    if not control or not ours:
        return []
    clear = verdicts.above(ours, control)
    opposite = {
        verdicts.Verdict.REPRODUCED: verdicts.Verdict.NOT_REPRODUCED,
        verdicts.Verdict.NOT_REPRODUCED: verdicts.Verdict.REPRODUCED,
    }
    return [
        Finding(
            "The control with random weights",
            "Not in the paper: a dictionary of a model with random weights scores about as high (arXiv 2501.17727)",
            opposite.get(clear, clear),
            f"Top-and-random by {first.explainer}: {first.said(first.untrained, kind)}; ours: {first.said(first.ours, kind)}. "
            "Where the control scores as high, the score shows that features follow tokens, not what the model has learnt.",
        )
    ]
