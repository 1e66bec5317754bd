"""Moments of activations against interpretability, which another experiment measures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.compare import Table
from trainer.config import BASELINES
from trainer.errors import BadConfig
from trainer.paper.config import InterpretabilitySettings
from trainer.paper.page import Figure, Finding, plot
from trainer.paper.results import Results
from trainer.paper.tradeoffs.verdicts import SURE, correlated

MOMENTS = ("mean", "variance", "skewness", "kurtosis")
_SCORE = "top_and_random"
"""The paper's."""
_LEAST = 8
"""Features that a correlation rests on."""


class Scored(NamedTuple):
    """Features of one dictionary, by one explainer."""

    dictionary: str
    explainer: str
    scores: list[float]
    moments: Mapping[str, list[float]]
    """Of `MOMENTS`, in the order of the scores."""
    trained: bool
    """Whether the model was."""
    baseline: bool
    """Whether these are directions that no training found."""


def scored(results: Results, settings: InterpretabilitySettings) -> list[Scored]:
    """What the interpretability experiment has found, in the order of its settings; empty if it was not run.

    A file `<dictionary>/<explainer>.json` of its results, whose dictionary's name may have a slash, holds as `result`

        {"dictionary": folder, "architecture": as in trainings, "weights": "trained" or "random", ...,
         "features": [{"feature": int, "scores": {"top_and_random": r or null, ...},
                       "moments": {"mean": ..., "variance": ..., "skewness": ..., "kurtosis": ..., ...}, ...}, ...]}

    A feature without a score, because it is constant, is left out.
    """
    paths = sorted([*results.folder.glob("*/*.json"), *results.folder.glob("*/*/*.json")])
    found = [one for one in map(_read, paths) if one is not None]
    dictionaries = [_name(folder) for folder in settings.dictionaries]

    def place(one: Scored) -> tuple[int, int]:
        return _index(dictionaries, one.dictionary), _index(settings.explainers, one.explainer)

    return sorted(found, key=place)


def _name(folder: str) -> str:
    return "/".join(Path(folder).parts[-2:])


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _read(path: Path) -> Scored | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["result"]
        if "features" not in content:
            return None
        rows = [row for row in content["features"] if row["scores"][_SCORE] is not None]
        return Scored(
            _name(content["dictionary"]),
            path.stem,
            [float(row["scores"][_SCORE]) for row in rows],
            {moment: [float(row["moments"][moment]) for row in rows] for moment in MOMENTS},
            content["weights"] == "trained",
            content["architecture"] in BASELINES,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadConfig(
            f"{path} is not a result of the interpretability experiment ({error!r}); remove it and run that anew"
        ) from error


def correlations(found: Sequence[Scored]) -> Finding:
    """Pearson's and Spearman's, of each moment with the score."""
    from scipy.stats import pearsonr, spearmanr

    rows: list[list[str]] = []
    ours: list[tuple[float, float]] = []
    for one in found:
        for moment in MOMENTS:
            values = one.moments[moment]
            cells = ["-", "-", "-"]
            if len(values) >= _LEAST and len(set(values)) > 1 and len(set(one.scores)) > 1:
                r, p = map(float, pearsonr(values, one.scores))
                rank, _ = map(float, spearmanr(values, one.scores))
                cells = [f"{r:+.2f}", f"{p:.3f}", f"{rank:+.2f}"]
                if one is _main(found) and moment in ("skewness", "kurtosis"):
                    ours.append((r, p))
            name = one.dictionary if one.trained else f"{one.dictionary} (untrained model)"
            rows.append([name, one.explainer, moment, str(len(values)), *cells])
    header = ["dictionary", "explainer", "moment", "features", "r", "p", "rank correlation"]
    main = _main(found)
    told = ", ".join(
        f"{moment} {r:+.2f} (p {p:.3f})"
        for moment, (r, p) in zip(("skewness", "kurtosis"), ours, strict=False)
    )
    return Finding(
        "Moments of activations",
        "interpretability correlates weakly with the skewness (0.19 or 0.20) and kurtosis (0.24 or 0.15: text and table "
        "of the paper contradict each other) of a feature's activations (section 3.3 and appendix)",
        correlated(ours),
        f"Pearson's r of the top-and-random score, for {main.dictionary} by {main.explainer}: {told or 'too few features'}. "
        f"Rule: both above 0 with p < {SURE}; “differs” if one is.",
        [Table(header, rows)],
        [_scatter(main)],
    )


def _main(found: Sequence[Scored]) -> Scored:
    """The first dictionary, by its first explainer; one that was trained, of the trained model, if there is one."""
    return max(found, key=lambda one: (one.trained, not one.baseline))


def _scatter(one: Scored) -> Figure:
    def draw(canvas: Any) -> None:
        panels = canvas.subplots(1, len(MOMENTS), sharey=True)
        for panel, moment in zip(panels, MOMENTS, strict=True):
            panel.scatter(one.moments[moment], one.scores, s=8)
            # Moments of what is never below zero are above it; of signed directions they are not.
            panel.set_xscale("log" if min(one.moments[moment], default=0.0) > 0 else "linear")
            panel.xaxis.set_minor_formatter("")
            panel.set_xlabel(moment)
        panels[0].set_ylabel("top-and-random score")

    return plot(draw, f"A dot for each scored feature of {one.dictionary}.", (12, 3.5))
