"""The `steer` command: its arguments."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from steer_client import experiments
from steer_client.arguments import STRENGTHS, add_edits, add_read_outs, add_sampling, count
from steer_client.channel import Tls
from steer_client.client import DEFAULT_TARGET

_EXAMPLES = """\
examples:
  steer dictionaries
  steer feature l9 17
  steer encode l9 "When Mary and John went to the store"
  steer generate "When Mary and John went to the store, John gave a drink to" --ablate l9:17
  steer search "royal family"
  steer contrast l9 --positive "I love it" --positive "How nice" --negative "I hate it"
  steer generate "Once upon a time" --clamp l9:17=2xmax --add l9:4=0.5norm --top l9=3
  steer compare "Once upon a time" --ablate l9:17
  steer score "The capital of France is" " Paris" " Rome" --ablate l9:17
  steer patch l9 "The capital of Italy is" "The capital of France is" --all --set 17,4

"""


def parser() -> argparse.ArgumentParser:
    """The command line of `steer`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--server", default=DEFAULT_TARGET, metavar="HOST:PORT", help=f"default {DEFAULT_TARGET}"
    )
    common.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after so long")
    _add_access(common)
    common.add_argument("--json", action="store_true", help="one JSON object per line")
    root = argparse.ArgumentParser(
        prog="steer",
        description="Read and edit the features of a served language model.",
        epilog=_EXAMPLES + STRENGTHS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("dictionaries", parents=[common], help="list the resident dictionaries")
    feature = commands.add_parser("feature", parents=[common], help="show what a feature means")
    feature.add_argument("dictionary", metavar="DICT")
    feature.add_argument("index", metavar="ID", type=int)
    encode = commands.add_parser("encode", parents=[common], help="show a text's active features")
    encode.add_argument("dictionary", metavar="DICT")
    encode.add_argument("text", metavar="TEXT")
    encode.add_argument("--top", type=int, default=5, metavar="K", help="per token (default 5)")
    generate = commands.add_parser("generate", parents=[common], help="generate under edits")
    generate.add_argument("text", metavar="TEXT")
    add_edits(generate, "append", dest="edits", default=[])
    add_read_outs(generate)
    add_sampling(generate)
    experiments.add_commands(commands, common)
    _add_lookups(commands, common)
    _add_administration(commands, common)
    return root


def _add_access(common: argparse.ArgumentParser) -> None:
    common.add_argument(
        "--tls", action="store_true", help="the server has TLS; the system's authorities vouch"
    )
    common.add_argument("--tls-ca", metavar="FILE", help="the authorities that vouch for it (PEM)")
    common.add_argument("--tls-cert", metavar="FILE", help="this client's certificate (PEM)")
    common.add_argument("--tls-key", metavar="FILE", help="and its key")
    common.add_argument(
        "--token",
        default=os.environ.get("STEER_TOKEN"),
        metavar="TOKEN",
        help="who calls; sent over TLS or to this machine only (default: $STEER_TOKEN)",
    )


def tls_of(options: argparse.Namespace) -> Tls | None:
    """None: no flag asks for TLS."""
    files = (options.tls_ca, options.tls_cert, options.tls_key)
    return Tls(*files) if options.tls or any(files) else None


def _add_lookups(commands: Any, common: argparse.ArgumentParser) -> None:
    search = commands.add_parser("search", parents=[common], help="find features by words")
    search.add_argument("query", metavar="WORDS")
    search.add_argument("--dictionary", default="", metavar="DICT", help="default: all of them")
    search.add_argument(
        "--evidence",
        action="store_true",
        help="look at the tokens that features raise and fire on, too",
    )
    search.add_argument("--limit", type=count, default=20, metavar="N", help="default 20")
    nearest = commands.add_parser(
        "nearest", parents=[common], help="find features with like decoder rows"
    )
    nearest.add_argument("dictionary", metavar="DICT")
    nearest.add_argument("index", metavar="ID", type=int)
    nearest.add_argument("--among", default="", metavar="DICT", help="default: the same one")
    nearest.add_argument("--top", type=count, default=10, metavar="K", help="default 10")
    inspect = commands.add_parser(
        "inspect", parents=[common], help="show what features texts have most of"
    )
    inspect.add_argument("dictionary", metavar="DICT")
    inspect.add_argument("texts", nargs="+", metavar="TEXT")
    _add_aggregate(inspect, ("mean", "max", "sum", "frequency"))
    contrast = commands.add_parser(
        "contrast", parents=[common], help="show what features tell two sets of texts apart"
    )
    contrast.add_argument("dictionary", metavar="DICT")
    for side in ("positive", "negative"):
        contrast.add_argument(
            f"--{side}", action="append", required=True, metavar="TEXT", help="repeatable"
        )
    _add_aggregate(contrast, ("mean", "max", "frequency"))


def _add_aggregate(command: argparse.ArgumentParser, choices: Sequence[str]) -> None:
    command.add_argument("--by", choices=choices, default="mean", help="default mean")
    command.add_argument("--top", type=count, default=20, metavar="K", help="default 20")
    command.add_argument(
        "--include-first", action="store_true", help="count position 0, most models' outlier"
    )


def _add_administration(commands: Any, common: argparse.ArgumentParser) -> None:
    commands.add_parser("info", parents=[common], help="show what the server is and can do")
    load = commands.add_parser("load", parents=[common], help="make a dictionary resident")
    load.add_argument("folder", metavar="FOLDER", help="in the server's dictionary_root")
    load.add_argument("--name", default="", help="default: the one its card has")
    unload = commands.add_parser("unload", parents=[common], help="take a dictionary away")
    unload.add_argument("name", metavar="DICT")
    unload.add_argument(
        "--wait", action="store_true", help="until the requests that use it have ended"
    )
    sessions = commands.add_parser("sessions", parents=[common], help="list the open sessions")
    sessions.add_argument("--close", metavar="ID", help="end this one instead")
    commands.add_parser("drain", parents=[common], help="let running calls end, then the server")
