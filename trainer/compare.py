"""Dictionaries side by side: quality, and how alike their features are."""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from steer_server.dictionary.files import StoredDictionary
from trainer.errors import BadConfig
from trainer.files import whole_file

ALIKE = 0.9
"""Cosine above which the paper counts two features as the same."""
_COLUMNS = {
    "L0": lambda q: f"{q.l0:.1f}",
    "FVU": lambda q: f"{q.fvu:.3f}",
    "FVU of PCA": lambda q: f"{q.pca_fvu:.3f}",
    "delta-CE": lambda q: f"{q.delta_ce:.3f}",
    "CE recovered": lambda q: _or_dash(q.ce_recovered),
    "KL": lambda q: _or_dash(q.kl),
    "dead": lambda q: f"{q.dead_share:.1%}",
    "dense": lambda q: "-" if q.dense_share is None else f"{q.dense_share:.1%}",
}


class Likeness(NamedTuple):
    """Of one dictionary's decoder rows to another's."""

    mmcs: float
    """Mean over the first's rows of the largest cosine with any of the second's."""
    matched: float
    """Mean cosine of the best one-to-one matching, over the smaller dictionary's rows."""
    shared: float
    """Share of the matched pairs with a cosine above `ALIKE`."""


def likeness(
    rows: Float[Tensor, "first d_model"], others: Float[Tensor, "second d_model"]
) -> Likeness:
    """Rows of norm 0 are like none."""
    left, right = (torch.nn.functional.normalize(W.float(), dim=1) for W in (rows, others))
    cosines = left @ right.T
    matched = cosines[linear_sum_assignment(cosines.numpy(), maximize=True)]
    return Likeness(
        cosines.amax(dim=1).mean().item(),
        matched.mean().item(),
        (matched > ALIKE).double().mean().item(),
    )


def report(stored: Sequence[StoredDictionary]) -> str:
    """Markdown tables: quality of each, and likeness of each two of one site."""
    lines = [
        f"| dictionary | site | architecture | features | {' | '.join(_COLUMNS)} |",
        "|---|---|---|---|" + "---|" * len(_COLUMNS),
    ]
    for entry in stored:
        card = entry.card
        cells = [str(entry.folder), str(card.site), card.architecture, f"{card.n_features:,}"]
        cells += [column(card.quality) if card.quality else "-" for column in _COLUMNS.values()]
        lines.append(f"| {' | '.join(cells)} |")
    pairs = [
        (a, b)
        for a, b in permutations(stored, 2)
        if (a.card.site, a.card.model) == (b.card.site, b.card.model)
    ]
    if pairs:
        lines += ["", "| of | to | MMCS | matched | shared |", "|---|---|---|---|---|"]
        for a, b in pairs:
            mmcs, matched, shared = likeness(a.dictionary.W_dec, b.dictionary.W_dec)
            lines.append(f"| {a.folder} | {b.folder} | {mmcs:.3f} | {matched:.3f} | {shared:.1%} |")
    return "\n".join(lines)


def write_report(stored: Sequence[StoredDictionary], folder: Path) -> None:
    """`report.md` with plots of quality against L0 and of the features' densities."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise BadConfig("plots need matplotlib: pip install matplotlib") from error
    measured = [(entry, entry.card.quality) for entry in stored if entry.card.quality is not None]
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4))
    for panel, name in zip(panels, ("fvu", "delta_ce"), strict=False):
        for architecture in sorted({entry.card.architecture for entry, _ in measured}):
            points = sorted(
                (quality.l0, getattr(quality, name))
                for entry, quality in measured
                if entry.card.architecture == architecture
            )
            panel.plot(*zip(*points, strict=True), marker="o", label=architecture)
        panel.set_xscale("log")
        panel.set_xlabel("L0, active features per token")
    panels[0].set_ylabel("FVU, variance unexplained")
    panels[1].set_ylabel("delta-CE, nats per token")
    panels[0].legend(fontsize=8)
    for entry in stored:
        density = entry.statistics.density.clamp(min=1e-7).log10().numpy()
        panels[2].hist(density, bins=50, histtype="step", label=entry.card.name)
    panels[2].set_xlabel("log10 of the share of tokens; dead features at -7")
    panels[2].set_ylabel("features")
    panels[2].legend(fontsize=8)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "quality.svg")
    pyplot.close(figure)
    with whole_file(folder / "report.md") as fresh:
        fresh.write_text(f"{report(stored)}\n\n![quality](quality.svg)\n", encoding="utf-8")


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
