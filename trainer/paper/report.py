"""All experiments of a configuration, and the page that holds them together."""

from collections.abc import Callable, Sequence
from pathlib import Path

from trainer import config as training_config
from trainer.paper.cases import experiment as cases
from trainer.paper.config import PaperConfig
from trainer.paper.interpretability import experiment as interpretability
from trainer.paper.ioi import experiment as ioi
from trainer.paper.lab import Lab
from trainer.paper.page import Section, write_page
from trainer.paper.tradeoffs import experiment as tradeoffs
from trainer.run import run as train
from trainer.stop import Stop

Experiment = Callable[[Lab], Section]
"""Computes what is not yet among its results, and says what all of them mean."""


def experiments() -> dict[str, Experiment]:
    """By name, in the order of the report."""
    return {
        "interpretability": interpretability.experiment,
        "ioi": ioi.experiment,
        "cases": cases.experiment,
        "tradeoffs": tradeoffs.experiment,
    }


def prepare(config: PaperConfig, runs: Path, stop: Stop) -> None:
    """Trains the dictionaries that `trainings` names and that are not there."""
    for path in config.trainings:
        train(training_config.load(Path(path)), runs, stop)


def report(config: PaperConfig, names: Sequence[str], stop: Stop) -> Path:
    """Runs the named experiments as far as they are not done; the page that shows them."""
    lab = Lab(config, stop)
    sections = [experiments()[name](lab) for name in names]
    # A single experiment has a page of its own, so that it leaves the whole report alone.
    page = Path(config.out) / (f"{names[0]}.html" if len(names) == 1 else "report.html")
    about = f"arXiv 2309.08600 on {Path(config.model).name}, by `python -m trainer report`."
    write_page("The paper, on our own stack", about, sections, page)
    return page
