"""The `steer` command: its arguments."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any

from steer.v1 import activations_pb2, edits_pb2

from steer_client import edits
from steer_client.channel import Tls
from steer_client.client import DEFAULT_TARGET
from steer_client.edits import Feature

_EXAMPLES = """\
examples:
  steer dictionaries
  steer feature l9 17
  steer encode l9 "When Mary and John went to the store"
  steer generate "When Mary and John went to the store, John gave a drink to" --ablate l9:17
  steer search "royal family"
  steer contrast l9 --positive "I love it" --positive "How nice" --negative "I hate it"
  steer generate "Once upon a time" --clamp l9:17=2xmax --add l9:4=0.5norm --top l9=3

a strength is a number and what it counts:
  3.5      activations, as `steer encode` prints them
  2xmax    the feature's largest activation in its training text
  0.5norm  the length of x at each token (add only)
  1.5row   decoder rows as stored
"""
_STRENGTH = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(xmax|norm|row)?")
_UNITS: dict[str, edits.Unit] = {"": "activation", "xmax": "max", "norm": "norm", "row": "row"}


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
        epilog=_EXAMPLES,
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
    _add_generate(commands.add_parser("generate", parents=[common], help="generate under edits"))
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
    search.add_argument("--limit", type=_count, default=20, metavar="N", help="default 20")
    nearest = commands.add_parser(
        "nearest", parents=[common], help="find features with like decoder rows"
    )
    nearest.add_argument("dictionary", metavar="DICT")
    nearest.add_argument("index", metavar="ID", type=int)
    nearest.add_argument("--among", default="", metavar="DICT", help="default: the same one")
    nearest.add_argument("--top", type=_count, default=10, metavar="K", help="default 10")
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
    command.add_argument("--top", type=_count, default=20, metavar="K", help="default 20")
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


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("text", metavar="TEXT")
    changes = generate.add_argument_group("edits (repeatable)")
    for name, form, help_text in (
        ("ablate", "DICT:ID", "activation becomes 0"),
        ("clamp", "DICT:ID=STRENGTH", "activation becomes STRENGTH, such as 2xmax"),
        ("scale", "DICT:ID=FACTOR", "activation is multiplied"),
        ("add", "DICT:ID=STRENGTH", "STRENGTH is added, such as 0.5norm"),
    ):
        changes.add_argument(
            f"--{name}",
            dest="edits",
            action="append",
            type=_EDITS[name],
            metavar=form,
            help=help_text,
            default=[],
        )
    reads = generate.add_argument_group("read-outs (repeatable)")
    reads.add_argument(
        "--top",
        dest="read_outs",
        action="append",
        type=_top,
        metavar="DICT=K",
        help="print each token's K strongest features",
        default=[],
    )
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="default 64")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0: greedy; default 1")
    sampling.add_argument("--top-p", type=float, metavar="P", help="default 1")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes draws repeatable")
    sampling.add_argument("--ignore-eos", action="store_true", default=None)


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of Sampling that were given."""
    names = ("max_tokens", "temperature", "top_p", "seed", "ignore_eos")
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _ablate(text: str) -> edits_pb2.Edit:
    return edits.ablate(_feature(text))


def _clamp(text: str) -> edits_pb2.Edit:
    return edits.clamp(*_assignment(text))


def _add(text: str) -> edits_pb2.Edit:
    return edits.add(*_assignment(text))


def _scale(text: str) -> edits_pb2.Edit:
    feature, factor, unit = _assignment(text)
    if unit != "activation":
        raise argparse.ArgumentTypeError(f"{text!r}: a factor has no unit")
    return edits.scale(feature, factor)


def _top(text: str) -> activations_pb2.ReadOut:
    dictionary, equals, k = text.rpartition("=")
    if not (dictionary and equals and k.isascii() and k.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not DICT=K, such as l9=5")
    return edits.read_top(dictionary, int(k))


def _assignment(text: str) -> tuple[Feature, float, edits.Unit]:
    left, _, right = text.rpartition("=")
    match = _STRENGTH.fullmatch(right)
    if not left or match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not DICT:ID=STRENGTH, such as l9:17=2xmax")
    return _feature(left), float(match[1]), _UNITS[match[2] or ""]


def _feature(text: str) -> Feature:
    try:
        return Feature.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_EDITS = {"ablate": _ablate, "clamp": _clamp, "scale": _scale, "add": _add}
