"""The commands of the paper's experiments; each imports what it needs, so that `--help` starts at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

_ABOUT = {
    "interpretability": "how well an explanation of a feature foretells where it is active (section 3)",
    "ioi": "which features carry indirect objects, by patching (section 4)",
    "cases": "what activates a feature, what it does, what causes it (section 5)",
    "tradeoffs": "sparsity, size, site and seed against quality (appendices)",
}
_HELP = """{about}.

    python -m trainer {name} examples/paper/smollm2-135m.toml

Makes the dictionaries that the configuration names and that are not there, computes what is not yet among the results in
its folder `out`, and writes {page} there. Ctrl-C at any time: the same command goes on where it was. Results of other
settings are computed anew.
"""

AddConfig = Callable[[argparse.ArgumentParser], None]


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    add_config: AddConfig,
    add_runs: AddConfig,
) -> None:
    """Adds a command for each experiment, and `report` for all."""
    every = "all experiments of the paper, and one page with each figure beside the paper's claim"
    for name, about in [*_ABOUT.items(), ("report", every)]:
        page = f"{name}.html"
        command = commands.add_parser(
            name,
            help=about,
            description=_HELP.format(about=about[0].upper() + about[1:], name=name, page=page),
            epilog=_keys(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_config(command)
        add_runs(command)
        names = list(_ABOUT) if name == "report" else [name]
        command.set_defaults(run=_run, experiments=names)


def _run(options: argparse.Namespace) -> None:
    from trainer.paper.config import load

    config = load(options.config, options.overrides)
    from trainer.paper.report import prepare, report
    from trainer.stop import Stop

    with Stop() as stop:
        prepare(config, options.runs, stop)
        page = report(config, options.experiments, stop)
    print(page)


def _keys(name: str) -> str:
    from trainer.help_texts import docstrings

    source = Path(__file__).parent / "config.py"
    table = {
        "interpretability": "InterpretabilitySettings",
        "ioi": "IoiSettings",
        "cases": "CaseSettings",
        "tradeoffs": "TradeOffSettings",
    }
    lines = ["keys of the configuration:", *docstrings(source, "PaperConfig")]
    if name in table:
        lines += [f"\nkeys of its table [{name}]:", *docstrings(source, table[name])]
    return "\n".join(lines).replace("%", "%%")
