"""What the cards say: L0 against FVU, dead features, perplexity under reconstruction."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from steer_server.dictionary.card import Quality
from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from trainer.compare import Table
from trainer.config import BASELINES
from trainer.errors import BadConfig
from trainer.paper.lab import training
from trainer.paper.page import Figure, Finding, plot
from trainer.paper.tradeoffs.verdicts import PAPER_RISE, falls, modest, more_dead

ALIVE = 10
"""A feature with more activations than this is alive, as in the paper."""
_SPARSE = 0.1
"""Of d_model: a dictionary with a larger L0 is not sparse, and says nothing of the price of sparsity."""


def name(stored: StoredDictionary) -> str:
    """Short, but unlike that of its neighbours; control dictionaries say what they are."""
    short = "/".join(stored.folder.parts[-2:])
    return short if stored.card.model.weights == "trained" else f"{short} (untrained model)"


def quality(stored: StoredDictionary) -> Quality:
    if stored.card.quality is None:
        raise BadConfig(
            f"the card of {stored.folder} has no quality; `python -m trainer evaluate` measures it"
        )
    return stored.card.quality


def is_baseline(stored: StoredDictionary) -> bool:
    return stored.card.architecture in BASELINES or stored.card.architecture == "directions"


def trained(stored: StoredDictionary) -> bool:
    """Whether it was trained, on a trained model."""
    return not is_baseline(stored) and stored.card.model.weights == "trained"


def sparsity(found: Sequence[StoredDictionary]) -> Finding:
    """FVU against L0."""
    lines = {
        about: sorted((quality(stored).l0, quality(stored).fvu) for stored in group)
        for about, group in _sweeps(found).items()
    }
    told = "; ".join(
        f"{about}: " + ", ".join(f"{fvu:.3f} at L0 {l0:.1f}" for l0, fvu in line)
        for about, line in lines.items()
    )
    return Finding(
        "Sparsity against reconstruction",
        "a weaker L1 penalty gives more active features per token and leaves less variance unexplained (section 2, "
        "appendix on training)",
        falls(list(lines.values())),
        f"Variance unexplained over sweeps of alpha: {told or 'none are there'}. Rule: lower at every larger L0, of every "
        "sweep; “differs” if at most of them. Measured on held-out tokens, as the cards say.",
        [_quality_table(found)],
        [_sparsity_figure(found)],
    )


def _sweeps(found: Sequence[StoredDictionary]) -> dict[str, list[StoredDictionary]]:
    """Trained ones that differ in alpha only."""
    groups: dict[str, list[StoredDictionary]] = {}
    for stored in filter(trained, found):
        card, config = stored.card, training(stored)
        about = f"{card.architecture} at {card.site} with {card.n_features:,} features of {config.tokens:,} tokens"
        if config.alpha:
            groups.setdefault(about, []).append(stored)
    return {about: group for about, group in groups.items() if len(group) > 1}


def _quality_table(found: Sequence[StoredDictionary]) -> Table:
    header = ["dictionary", "site", "architecture", "features", "alpha", "L0", "FVU", "FVU of PCA"]
    rows = []
    for stored in found:
        card, own = stored.card, quality(stored)
        alpha = training(stored).alpha
        about = [name(stored), str(card.site), card.architecture, f"{card.n_features:,}"]
        numbers = [f"{alpha:g}" if alpha else "-", f"{own.l0:.1f}"]
        rows.append([*about, *numbers, f"{own.fvu:.3f}", f"{own.pca_fvu:.3f}"])
    return Table(header, rows)


def _sparsity_figure(found: Sequence[StoredDictionary]) -> Figure:
    sites = sorted({stored.card.site for stored in found})

    def draw(canvas: Any) -> None:
        panels = canvas.subplots(1, len(sites), squeeze=False, sharex=True, sharey=True)[0]
        labels = sorted(set(map(_line, found)))
        colours = {label: f"C{number}" for number, label in enumerate(labels)}
        drawn: dict[str, Any] = {}
        for panel, site in zip(panels, sites, strict=True):
            lines: dict[str, list[tuple[float, float]]] = {}
            for stored in found:
                if stored.card.site == site and quality(stored).l0 > 0:
                    point = quality(stored).l0, quality(stored).fvu
                    lines.setdefault(_line(stored), []).append(point)
            for label, points in sorted(lines.items()):
                style = "-" if "alpha" in label else "none"
                (drawn[label],) = panel.plot(
                    *zip(*sorted(points), strict=True), ls=style, marker="o", color=colours[label]
                )
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter("")
            panel.set_title(str(site))
            panel.set_xlabel("L0, active features per token")
        # Whole decades, for others have no label.
        low, high = (math.log10(limit) for limit in panels[0].get_xlim())
        panels[0].set_xlim(10 ** math.floor(low), 10 ** math.ceil(high))
        panels[0].set_ylabel("FVU, variance unexplained")
        shown = sorted(drawn)
        canvas.legend(
            [drawn[label] for label in shown],
            shown,
            loc="outside lower center",
            ncols=4,
            fontsize=8,
        )

    caption = "Left and low is better. Lines join dictionaries that differ in alpha."
    return plot(draw, caption, (max(5, 3.5 * len(sites)), 4))


def _line(stored: StoredDictionary) -> str:
    """Of a plot, to which the dictionary belongs."""
    card, config = stored.card, training(stored)
    sweep = f", {card.n_features:,} features, by alpha" if config.alpha else ""
    control = "" if card.model.weights == "trained" else ", untrained model"
    return f"{card.architecture}{sweep}{control}"


def dead_features(found: Sequence[StoredDictionary]) -> Finding:
    """Alive by the paper's definition, and active on a held-out token."""
    pairs = list(_twins(found))
    told = ", ".join(
        f"{dead(mlp):,} of {mlp.card.n_features:,} at {name(mlp)} and {dead(stream):,} at {name(stream)}"
        for mlp, stream in pairs
    )
    rows = []
    for stored in found:
        card = stored.card
        count = dead(stored)
        rows.append(
            [
                name(stored),
                str(card.site),
                f"{card.training['tokens']:,}",
                f"{card.n_features - count:,}",
                f"{count:,}",
                f"{count / card.n_features:.1%}",
                f"{quality(stored).dead_share:.1%}",
            ]
        )
    header = [
        "dictionary",
        "site",
        "tokens",
        "alive",
        "dead",
        "dead share",
        "active on no held-out token",
    ]
    return Finding(
        "Dead features",
        "dictionaries of the residual stream have few dead features, those of MLPs many (section 2, appendix on dead features)",
        more_dead([(dead(mlp), dead(stream)) for mlp, stream in pairs]),
        f"Dead are those with at most {ALIVE} activations over all training tokens; the paper counts over a chunk of 2 GiB, "
        f"2.1 million tokens for Pythia-70M. Trained alike: {told or 'none are there'}. Rule: more at the MLP in every pair, "
        "by more than twice the square root of their sum; “differs” if in some.",
        [Table(header, rows)],
    )


def dead(stored: StoredDictionary) -> int:
    """Features that are not alive; directions, whose activations have either sign, may be active on all tokens."""
    counts = stored.statistics.density.double() * stored.card.training["tokens"]
    return int((counts.round() <= ALIVE).sum())


def _twins(
    found: Sequence[StoredDictionary],
) -> Iterator[tuple[StoredDictionary, StoredDictionary]]:
    """Of an MLP and of the residual stream behind it, whose trainings differ in nothing else."""
    by_training = {_but_site(stored): stored for stored in filter(trained, found)}
    for (site, rest), stored in by_training.items():
        twin = by_training.get((Site("resid_post", site.layer), rest))
        if twin is not None and site.stream in ("mlp_out", "mlp_act"):
            yield stored, twin


def _but_site(stored: StoredDictionary) -> tuple[Site, str]:
    config = asdict(training(stored))
    rest = {key: config[key] for key in config if key not in ("site", "out")}
    return stored.card.site, repr(rest)


def perplexity(found: Sequence[StoredDictionary]) -> Finding:
    """With x_hat in the place of x, at residual sites."""
    those = [stored for stored in found if stored.card.site.stream == "resid_post"]
    sparse = [
        stored
        for stored in those
        if trained(stored) and quality(stored).l0 <= _SPARSE * stored.card.d_model
    ]
    best = min(sparse, key=_rise, default=None)
    told = "there are none" if best is None else f"{name(best)}, by a factor of {_rise(best):.2f}"
    rows = []
    for stored in those:
        own = quality(stored)
        # Old cards know the difference only.
        both = ("-", "-")
        if own.ce is not None:
            both = (f"{math.exp(own.ce):.2f}", f"{math.exp(own.ce + own.delta_ce):.2f}")
        site, l0 = str(stored.card.site), f"{own.l0:.1f}"
        rows.append([name(stored), site, l0, *both, f"{_rise(stored):.3f}"])
    rows.append(["the paper's, Pythia-70M", "resid_post.2", "-", "25", "40", f"{PAPER_RISE:.3f}"])
    header = ["dictionary", "site", "L0", "perplexity", "with x_hat", "factor"]
    return Finding(
        "Perplexity under reconstruction",
        "with the residual stream's reconstruction in its place, perplexity on the Pile rises from 25 to 40 (section 2; "
        "layer 2 of Pythia-70M)",
        modest([_rise(stored) for stored in sparse]),
        f"Of the dictionaries with an L0 of at most a tenth of d_model, perplexity on held-out text rises least with: {told}. "
        f"Rule: no more than the paper's {PAPER_RISE:.2f}; “differs” up to its square. Attention sinks, which training leaves "
        "out, are not replaced. The corpus and the model are others, so factors are compared and not perplexities.",
        [Table(header, rows)],
    )


def _rise(stored: StoredDictionary) -> float:
    return math.exp(quality(stored).delta_ce)
