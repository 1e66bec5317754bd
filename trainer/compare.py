"""Dictionaries side by side: quality, and how alike their features are."""

import json
from collections.abc import Sequence
from html import escape
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from steer_server.dictionary.files import StoredDictionary
from trainer.errors import BadConfig
from trainer.files import whole_file

ALIKE = 0.9
"""Cosine above which the paper counts two features as the same."""
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Dictionaries compared</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; margin-bottom: 2em; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.2em 0.8em; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
</style>
<h1>Dictionaries compared</h1>
{tables}
{plots}
</html>
"""
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


class Table(NamedTuple):
    """Text, ready to be shown."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in self.rows
        )
        return f"<table>\n<tr>{head}</tr>\n{body}</table>"


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


def tables(stored: Sequence[StoredDictionary]) -> list[Table]:
    """Quality of each, and likeness of each two of one site."""
    rows = []
    for entry in stored:
        card = entry.card
        cells = [str(entry.folder), str(card.site), card.architecture, f"{card.n_features:,}"]
        rows.append(cells + [f(card.quality) if card.quality else "-" for f in _COLUMNS.values()])
    found = [Table(["dictionary", "site", "architecture", "features", *_COLUMNS], rows)]
    pairs = [
        (a, b)
        for a, b in permutations(stored, 2)
        if (a.card.site, a.card.model) == (b.card.site, b.card.model)
    ]
    if pairs:
        rows = []
        for a, b in pairs:
            mmcs, matched, shared = likeness(a.dictionary.W_dec, b.dictionary.W_dec)
            names = [str(a.folder), str(b.folder)]
            rows.append([*names, f"{mmcs:.3f}", f"{matched:.3f}", f"{shared:.1%}"])
        found.append(Table(["of", "to", "MMCS", "matched", "shared"], rows))
    return found


def probes(path: Path) -> Table:
    """The figures that `python -m trainer probe --json` wrote, means over all classes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        groups: dict[tuple[str, str, int], list[dict[str, float]]] = {}
        for row in content["probes"]:
            groups.setdefault((row["dictionary"], row["site"], row["k"]), []).append(row["score"])
        rows = []
        for (dictionary, site, k), scores in groups.items():
            means = [
                sum(score[name] for score in scores) / len(scores)
                for name in ("f1", "auroc", "accuracy")
            ]
            numbers = [f"{value:.3f}" for value in means]
            rows.append([dictionary, site, str(k or "all"), str(len(scores)), *numbers])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadConfig(
            f"{path} cannot be read ({error!r}); `python -m trainer probe --json` writes such files"
        ) from error
    header = ["probed with", "site", "k", "classes", "F1", "AUROC", "balanced accuracy"]
    return Table(header, rows)


def write_report(stored: Sequence[StoredDictionary], found: Sequence[Table], folder: Path) -> None:
    """`report.html`, which needs no other file, and the same as `report.md` with `quality.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    _plot(stored, folder / "quality.svg")
    svg = (folder / "quality.svg").read_text(encoding="utf-8")
    page = _PAGE.format(tables="\n".join(t.html() for t in found), plots=svg[svg.index("<svg") :])
    markdown = "\n\n".join(table.markdown() for table in found)
    for name, text in (
        ("report.html", page),
        ("report.md", f"{markdown}\n\n![quality](quality.svg)\n"),
    ):
        with whole_file(folder / name) as fresh:
            fresh.write_text(text, encoding="utf-8")


def _plot(stored: Sequence[StoredDictionary], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise BadConfig("plots need matplotlib: pip install matplotlib") from error
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 9))
    for panel, name in zip(panels[0], ("fvu", "delta_ce"), strict=True):
        _plot_quality(panel, stored, name)
    panels[0, 0].set_ylabel("FVU, variance unexplained")
    panels[0, 1].set_ylabel("delta-CE, nats per token")
    for entry in stored:
        density = entry.statistics.density.clamp(min=1e-7).log10().numpy()
        panels[1, 0].hist(density, bins=50, range=(-7, 0), histtype="step", label=entry.card.name)
        steps = [json.loads(line) for line in entry.curve.splitlines()]
        if steps:
            batch = entry.card.training["config"]["batch"]
            tokens = [step["step"] * batch for step in steps]
            shares = [step["dead_share"] for step in steps]
            panels[1, 1].plot(tokens, shares, label=entry.card.name)
    panels[1, 0].set_xlabel("log10 of the share of tokens; dead features at -7")
    panels[1, 0].set_ylabel("features")
    panels[1, 1].set_xlabel("tokens of the training")
    panels[1, 1].set_ylabel("share of features dead")
    panels[1, 1].set_ylim(-0.02, 1.02)
    for panel in panels.flat:
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _plot_quality(panel: Any, stored: Sequence[StoredDictionary], name: str) -> None:
    """Against L0, a line for each site and architecture."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in stored:
        if entry.card.quality is not None:
            label = f"{entry.card.architecture}, {entry.card.site}"
            point = (entry.card.quality.l0, getattr(entry.card.quality, name))
            lines.setdefault(label, []).append(point)
    for label, points in lines.items():
        panel.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    panel.set_xscale("log")
    panel.set_xlabel("L0, active features per token")


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
