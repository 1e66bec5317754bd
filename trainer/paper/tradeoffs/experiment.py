"""The trade-offs as a section of the report."""

from collections.abc import Sequence
from pathlib import Path

from steer_server.dictionary.files import CARD
from trainer.errors import BadConfig
from trainer.paper.lab import Lab
from trainer.paper.page import Section
from trainer.paper.tradeoffs.likeness import again
from trainer.paper.tradeoffs.moments import correlations, scored
from trainer.paper.tradeoffs.quality import dead_features, perplexity, sparsity


def experiment(lab: Lab) -> Section:
    """Reads dictionaries, and the interpretability experiment's results; runs no model."""
    settings = lab.config.tradeoffs
    found = [lab.dictionary(folder) for folder in folders(settings.dictionaries)]
    if not found:
        raise BadConfig("tradeoffs.dictionaries is empty; name folders of dictionaries")
    findings = [sparsity(found), dead_features(found), perplexity(found)]
    about = (
        f"{len(found)} dictionaries, with the figures that their trainings measured on held-out text. One of a copy of the model "
        "with random weights is the control, and stands in every table."
    )
    if len(settings.alike) > 0:
        compared = [lab.dictionary(folder) for folder in folders(settings.alike)]
        findings.append(again(lab, compared))
    interpretability = scored(lab.results("interpretability"), lab.config.interpretability)
    if interpretability:
        findings.append(correlations(interpretability))
    else:
        about += (
            " Moments of activations are not compared with interpretability, because `python -m trainer "
            "interpretability` was not run with this configuration."
        )
    return Section("Trade-offs", about, findings)


def folders(entries: Sequence[str]) -> list[str]:
    """Folders of dictionaries: those named, and for a folder of such all in it, by name."""
    found: list[str] = []
    for entry in entries:
        path = Path(entry)
        inside = sorted(str(card.parent) for card in path.glob(f"*/{CARD}"))
        found += [entry] if (path / CARD).is_file() or not inside else inside
    return list(dict.fromkeys(found))
