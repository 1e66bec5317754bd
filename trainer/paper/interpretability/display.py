"""Tables and figures of scores."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.compare import Table
from trainer.paper.interpretability.measure import Subject, column
from trainer.paper.interpretability.scores import Mean, defined_mean
from trainer.paper.page import Figure, plot

if TYPE_CHECKING:
    from trainer.paper.interpretability.experiment import Scores

KINDS: Mapping[str, str] = {
    "top_and_random": "top and random",
    "top": "top",
    "random": "random",
    "top_and_fresh": "top and fresh",
    "top_and_any": "top and any",
}
"""Those of the paper, then two that mend its draw."""
_ABOUT = (
    "top and fresh: the random fragments are none of the 20 strongest, of which some were explained from; top and any: they are "
    "drawn from all text, active or not, as in OpenAI's code"
)
_COLOURS = {"ours": "tab:blue", "baseline": "tab:orange", "random weights": "tab:gray"}
_FIRST = 5


def scores_table(scores: "Scores") -> Table:
    """Every dictionary, every kind of score."""
    header = ["by " + scores.explainer, "site", "architecture", "features", "of"]
    rows = []
    for subject in scores.subjects:
        result = scores.results[subject.label]
        means = [scores.mean(subject, kind) for kind in KINDS]
        cells = [_said(one) for one in means]
        undefined = next((str(one.undefined) for one in means if one), "-")
        count = [
            str(len(result["features"])),
            f"{result['eligible']:,} of {result['n_features']:,}",
        ]
        rows.append(
            [subject.label, result["site"], result["architecture"], *count, *cells, undefined]
        )
    return Table([*header, *KINDS.values(), "undefined, as 0"], rows)


def told_table(scores: "Scores") -> Table:
    """Detection and fuzzing."""
    header = ["told apart by " + scores.explainer]
    names = [(kind, name) for kind in ("detection", "fuzzing") for name in ("accuracy", "auroc")]
    header += [
        f"{kind}, {'balanced accuracy' if name == 'accuracy' else 'AUROC'}" for kind, name in names
    ]
    rows = []
    for subject in scores.subjects:
        result = scores.results[subject.label]
        means = [defined_mean(list(column(result, *pair))) for pair in names]
        without = next((str(one.undefined) for one in means if one), str(len(result["features"])))
        rows.append([subject.label, *(_said(one) for one in means), without])
    return Table([*header, "features active everywhere"], rows)


def examples_table(scores: "Scores", subject: Subject) -> Table:
    """The first features with their explanations, as in the paper's table 1."""
    rows = []
    for row in scores.results[subject.label]["features"][:_FIRST]:
        found = row["scores"]["top_and_random"]
        rows.append(
            [str(row["feature"]), row["explanation"], "-" if found is None else f"{found:.2f}"]
        )
    return Table([f"feature of {subject.label}", f"by {scores.explainer}", "score"], rows)


def figures(scores: "Scores", kind: str) -> list[Figure]:
    """Means and intervals of all dictionaries, in their order; none if no dictionary has two features."""
    points = [
        (subject, one)
        for subject in scores.subjects
        if (one := scores.mean(subject, kind)) is not None
    ]

    if not points:
        return []

    def draw(canvas: Any) -> None:
        panel = canvas.subplots()
        for role, colour in _COLOURS.items():
            own = [(y, one) for y, (subject, one) in enumerate(points) if _role(subject) == role]
            if own:
                _bars(panel, own, colour, role)
        panel.set_yticks(range(len(points)), [_name(subject) for subject, _ in points])
        panel.margins(y=0.1)
        panel.invert_yaxis()
        panel.set_xlabel(f"{KINDS[kind]} score, by {scores.explainer}")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.grid(axis="x", alpha=0.3)
        panel.legend()

    caption = f"{KINDS[kind].capitalize()} score, mean over features with its 95% interval, by {scores.explainer}."
    height = 1.5 + 0.3 * len(points)
    if kind == "top_and_random":
        caption += f" {_ABOUT}."
    return [plot(draw, caption, (8, height))]


def _bars(panel: Any, own: Sequence[tuple[int, Mean]], colour: str, role: str) -> None:
    y, means = zip(*own, strict=True)
    values, halves = [one.value for one in means], [one.half for one in means]
    panel.errorbar(values, y, xerr=halves, fmt="o", color=colour, capsize=4, label=role)


def _role(subject: Subject) -> str:
    if subject.untrained_model:
        return "random weights"
    return "baseline" if subject.baseline else "ours"


def _name(subject: Subject) -> str:
    site = str(subject.stored.card.site)
    return subject.label if site in subject.label else f"{subject.label}, {site}"


def _said(one: Mean | None) -> str:
    return "-" if one is None else str(one)
