"""The trainer's commands; each imports what it needs, so that the light ones start at once."""

import argparse
import sys
from pathlib import Path

from trainer.errors import Interrupted, SteerError

_ABOUT = """Sparse dictionaries of a language model's activations, from text to a folder to serve.

    python -m trainer model --out models/SmolLM2-135M-Instruct
    python -m trainer corpus --out corpora
    python -m trainer train examples/smollm2-135m.toml

Every command can be broken off with Ctrl-C and started again; it goes on where it was.
"""

_TRAIN = """Harvests activations, trains a dictionary, measures it on held-out text, finds each feature's
examples and logit effects, and writes the folder `out`. `preset = "paper"` trains arXiv 2309.08600 to the letter.

A list in the place of site, architecture, n_features, k, alpha, lr or seed asks for a dictionary of each;
all of them train in one pass over the activations, and `out` becomes the folder that holds them:

    python -m trainer train examples/smollm2-135m.toml --set 'alpha=[1e-3, 2e-3, 4e-3]' --set out=runs/alphas

Ctrl-C or SIGTERM: the step in progress is finished, a checkpoint written, exit code 130. The same
command goes on from there and ends in the same bytes as if it had not been broken off. Harvests
are shared by all runs with the same model, site, corpus and context.

Too many active features: raise alpha. FVU too high, or many dead features: lower it.
"""

_COMPARE = """Prints a table of their quality as it was measured on held-out text, and for each two of the same site:

    MMCS      mean over the first's features of the largest cosine with any of the second's decoder rows
    matched   mean cosine when each feature may be matched once (Hungarian method)
    shared    share of matched pairs with a cosine above 0.9, the paper's threshold
"""


_PROBE = """Fits a logistic regression on the k features that tell a class of words best, and measures it on documents that no
dictionary was trained on. The classes are those of a corpus with `words`, `tags` and `starts` beside `text`, such as
corpora/brown.jsonl: the first two letters of a part-of-speech tag, NN for all of nn, nns, nn$. A word's tag is on the
token that ends the word; tokens that end several words and tokens without a tag are left out. Each class is told from
all other tagged tokens, with the threshold that has the best F1 on the training tokens.

    coordinates           the same with the k best coordinates of the stream itself
    all coordinates       a logistic regression on the whole vector
    difference of means   the direction from the mean of all others to the class's
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 done, 1 an error told on stderr, 130 interrupted and resumable."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except Interrupted as interrupted:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nbroken off; the same command goes on from what is on disk.", file=sys.stderr)
        return 130
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error}. What is on disk is whole; with room for more the same command goes on.",
            file=sys.stderr,
        )
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m trainer", description=_ABOUT, formatter_class=raw)
    commands = top.add_subparsers(required=True, metavar="command")

    model = commands.add_parser("model", help="fetch a small real model without a model hub")
    model.add_argument("--out", type=Path, required=True, help="folder to write")
    model.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    model.set_defaults(run=_model)

    corpus = commands.add_parser("corpus", help="fetch two real corpora without a data hub")
    corpus.add_argument("--out", type=Path, required=True, help="folder to write")
    corpus.set_defaults(run=_corpus)

    train = commands.add_parser(
        "train",
        help="train a dictionary",
        description=_TRAIN,
        epilog=_fields(),
        formatter_class=raw,
    )
    train.add_argument("config", type=Path, help="TOML file")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace a key of the file; may be repeated",
    )
    train.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder for intermediate files"
    )
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

    evaluate = commands.add_parser("evaluate", help="measure a dictionary on held-out text")
    evaluate.add_argument("dictionary", type=Path, help="folder of the dictionary")
    evaluate.add_argument("--model", help="default: the one it was trained on")
    evaluate.add_argument(
        "--corpus", action="append", default=[], help="default: its own held-out documents"
    )
    evaluate.add_argument("--tokens", type=int, help="default: as many as in training")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser(
        "compare",
        help="dictionaries side by side: quality, and how alike their features are",
        description=_COMPARE,
        formatter_class=raw,
    )
    compare.add_argument("dictionaries", type=Path, nargs="+", help="folders of dictionaries")
    compare.add_argument("--out", type=Path, help="folder for the report and its plots")
    compare.add_argument(
        "--probe", type=Path, action="append", default=[], help="a file of `probe --json` to add"
    )
    compare.set_defaults(run=_compare)

    probe = commands.add_parser(
        "probe",
        help="how well a few features tell classes of words",
        description=_PROBE,
        formatter_class=raw,
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

    label = commands.add_parser("label", help="merge labels of features into a dictionary")
    label.add_argument("dictionary", type=Path, help="folder of the dictionary")
    label.add_argument("labels", type=Path, help="TOML file: weights_sha256 and a table [labels]")
    label.set_defaults(run=_label)
    return top


def _fields() -> str:
    """The configuration's keys with their docstrings, which only the source has."""
    import ast
    import json
    import textwrap
    from itertools import pairwise

    from trainer.config import PRESETS

    source = (Path(__file__).parent / "config.py").read_text(encoding="utf-8")
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainConfig"
    )
    paper = ", ".join(f"{key} = {json.dumps(value)}" for key, value in PRESETS["paper"].items())
    about = f"What a key is that the file does not name: as below, or of arXiv 2309.08600, {paper}"
    lines = [
        "keys of the configuration:",
        '  preset = "modern"',
        textwrap.fill(about, 110, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            default = f" = {ast.unparse(field.value)}" if field.value else ""
            assert isinstance(text.value, ast.Constant)
            lines.append(f"  {ast.unparse(field.target)}{default}\n      {text.value.value}")
    return "\n".join(lines).replace("%", "%%")


def _model(options: argparse.Namespace) -> None:
    from trainer.fetch_model import fetch_model

    done = fetch_model(options.out, options.dtype)
    print(f"{options.out}: {'written' if done else 'complete, nothing to do'}")


def _corpus(options: argparse.Namespace) -> None:
    from trainer.fetch_corpus import fetch_corpora

    made = fetch_corpora(options.out)
    print(f"{options.out}: {'wrote ' + ', '.join(made) if made else 'complete, nothing to do'}")


def _train(options: argparse.Namespace) -> None:
    from trainer.config import load

    configs = load(options.config, options.overrides)
    from trainer.evaluate import describe
    from trainer.progress import Watchers
    from trainer.run import run
    from trainer.stop import Stop

    watchers = Watchers(options.tensorboard, options.textfile)
    watchers.check()
    with Stop() as stop:
        cards = run(configs, options.runs, stop, watchers)
    for config, card in zip(configs, cards, strict=True):
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
