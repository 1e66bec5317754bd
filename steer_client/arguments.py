"""What several `steer` commands take: edits, read-outs, how tokens are drawn."""

import argparse
import re
from typing import Any

from steer.v1 import activations_pb2, edits_pb2

from steer_client import edits
from steer_client.edits import Feature

STRENGTHS = """\
a strength is a number and what it counts:
  3.5      activations, as `steer encode` prints them
  2xmax    the feature's largest activation in its training text
  0.5norm  the length of x at each token (add only)
  1.5row   decoder rows as stored
"""
_STRENGTH = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(xmax|norm|row)?")
_UNITS: dict[str, edits.Unit] = {"": "activation", "xmax": "max", "norm": "norm", "row": "row"}
_SUFFIXES = {edits.UNITS[unit]: suffix for suffix, unit in _UNITS.items()}


def add_edits(command: argparse.ArgumentParser, action: Any, **how: Any) -> None:
    """--ablate, --clamp, --scale and --add; `action` and `how` are argparse's for each of them."""
    changes = command.add_argument_group("edits (repeatable)")
    for name, form, help_text in (
        ("ablate", "DICT:ID", "activation becomes 0"),
        ("clamp", "DICT:ID=STRENGTH", "activation becomes STRENGTH, such as 2xmax"),
        ("scale", "DICT:ID=FACTOR", "activation is multiplied"),
        ("add", "DICT:ID=STRENGTH", "STRENGTH is added, such as 0.5norm"),
    ):
        changes.add_argument(
            f"--{name}", action=action, type=_EDITS[name], metavar=form, help=help_text, **how
        )


def add_read_outs(command: argparse.ArgumentParser) -> None:
    """--top."""
    reads = command.add_argument_group("read-outs (repeatable)")
    reads.add_argument(
        "--top",
        dest="read_outs",
        action="append",
        type=_top,
        metavar="DICT=K",
        help="print each token's K strongest features",
        default=[],
    )


def add_sampling(command: argparse.ArgumentParser) -> None:
    """The fields of Sampling that people set."""
    sampling = command.add_argument_group("sampling")
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


def count(text: str) -> int:
    """A number above 0."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def written(edit: edits_pb2.Edit) -> str:
    """The edit as the command line has it, such as `clamp l9:17=2xmax`."""
    kind = edit.WhichOneof("kind") or ""
    feature = f"{kind} {edit.dictionary}:{edit.feature}"
    if kind == "scale":
        return f"{feature}={edit.scale.factor:g}"
    if kind in ("clamp", "add"):
        strength = getattr(edit, kind)
        return f"{feature}={strength.value:g}{_SUFFIXES[strength.unit]}"
    return feature


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
