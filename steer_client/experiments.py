"""The `steer` commands that ask what features do: compare, score, patch."""

import argparse
from collections.abc import Sequence
from typing import Any

from steer.v1 import edits_pb2

from steer_client.arguments import STRENGTHS, add_edits, add_sampling, count, sampling_of, written
from steer_client.client import SteerClient
from steer_client.show import Json, Plain

_COMPARE = """\
examples:
  steer compare "Once upon a time" --ablate l9:17 --temperature 0
      the plain model, and beside it the model without feature 17
  steer compare "Once upon a time" --arm --ablate l9:17 --arm --clamp l9:3=2xmax --add l9:4=5
      the plain model and two arms, the second with two edits
  steer compare "Once upon a time" --add l9:4=5 --arm --add l9:4=5 --ablate l9:17
      edits before the first --arm are those of arm 0: what does 17 do where 4 is high?

"""
_SCORE = """\
examples:
  steer score "The capital of France is" " Paris" " Rome"
  steer score "The capital of France is" " Paris" " Rome" --ablate l9:17
      and how much more or less likely each is without feature 17
  steer score "The capital of France is" " Paris, of course" --scale l9:17=2 --per-token

Most models want a text that follows another to begin with a space.

"""
_PATCH = """\
examples:
  steer patch l9 "The capital of Italy is" "The capital of France is" --all --set 17 --set 4,20
      how far do all features, 17, and 4 with 20 carry the answer over from Italy to France?
  steer patch l9 SOURCE TARGET --all --at=-1:-1 --answer " Rome" --answer " Paris"
      at the last token only, with the log-probabilities of two answers

KL source: how far the patched target's next token is from the source's (0: all was carried over);
KL target: how far from the target's own (0: nothing was changed); in nats.
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Their arguments."""

    def add(name: str, purpose: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            parents=[common],
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    compare = add("compare", "generate under several sets of edits", _COMPARE + STRENGTHS)
    compare.add_argument("text", metavar="TEXT")
    arms: dict[str, Any] = {"dest": "arms", "default": ((),)}
    compare.add_argument(
        "--arm", action=_Arm, nargs=0, help="the edits that follow are another arm's", **arms
    )
    add_edits(compare, _ArmEdit, **arms)
    add_sampling(compare)
    score = add("score", "show how likely texts are, and are under edits", _SCORE + STRENGTHS)
    score.add_argument("text", metavar="TEXT")
    score.add_argument("continuations", nargs="+", metavar="CONTINUATION")
    add_edits(score, "append", dest="edits", default=[])
    score.add_argument("--per-token", action="store_true", help="show each token, too")
    patch = add("patch", "run a text with another's activations", _PATCH)
    patch.add_argument("dictionary", metavar="DICT")
    patch.add_argument("source", metavar="SOURCE", help="where activations come from")
    patch.add_argument("target", metavar="TARGET", help="what runs with them")
    _add_patch(patch)


def _add_patch(patch: argparse.ArgumentParser) -> None:
    patch.add_argument(
        "--set",
        dest="sets",
        action="append",
        type=_features,
        default=[],
        metavar="ID,...",
        help="features to patch together (repeatable)",
    )
    patch.add_argument("--all", action="store_true", help="all that differ, as one more set")
    patch.add_argument(
        "--at",
        dest="positions",
        action="append",
        type=_pair,
        default=[],
        metavar="TARGET:SOURCE",
        help="positions (repeatable); default: each but 0 from the same one",
    )
    patch.add_argument(
        "--answer",
        dest="answers",
        action="append",
        default=[],
        metavar="TEXT",
        help="a token whose log-probability to show (repeatable)",
    )
    patch.add_argument(
        "--top", type=count, default=3, metavar="K", help="likeliest tokens (default 3)"
    )


class _Arm(argparse.Action):
    """Begins an arm."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        namespace.arms = (*namespace.arms, ())


class _ArmEdit(argparse.Action):
    """An edit of the last arm."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        *before, last = namespace.arms
        namespace.arms = (*before, (*last, values))


def _features(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of features, such as 17,4")
    return [int(part) for part in parts]


def _pair(text: str) -> tuple[int, int]:
    here, _, there = text.partition(":")
    try:
        return int(here), int(there)
    except ValueError:
        message = f"{text!r} is not TARGET:SOURCE, such as 7:5 or, from the end, -1:-1"
        raise argparse.ArgumentTypeError(message) from None


async def compare(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    first, *others = options.arms
    if not others:
        if not first:
            raise ValueError("nothing to compare with: name an edit, or arms; see --help")
        first, others = (), [first]
    labels = [_label(arm) for arm in (first, *others)]
    responses = client.compare(options.text, others, edits=first, **sampling_of(options))
    await out.compared(labels, responses)


def _label(edits: Sequence[edits_pb2.Edit]) -> str:
    return ", ".join(map(written, edits)) or "no edits"


async def score(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    plain = await client.score(options.text, options.continuations)
    edited = None
    if options.edits:
        edited = await client.score(options.text, options.continuations, options.edits)
    out.scored(plain, edited, options.per_token)


async def patch(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    if not (options.sets or options.all):
        raise ValueError("nothing to patch: name features with --set, or --all; see --help")
    response = await client.patch(
        options.source,
        options.target,
        options.dictionary,
        options.sets,
        positions=dict(options.positions),
        all_features=options.all,
        token_ids=await _token_ids(options, client),
        top_k=options.top,
    )
    labels = ["all that differ"] * options.all
    labels += [", ".join(map(str, chosen)) or "none" for chosen in options.sets]
    out.patched(labels, options.answers, response)


async def _token_ids(options: argparse.Namespace, client: SteerClient) -> list[int]:
    """Of the texts whose probability is to be shown, as the model has them after the target."""
    if not options.answers:
        return []
    found = []
    scored = await client.score(options.target, options.answers)
    for text, entry in zip(options.answers, scored.continuations, strict=True):
        if len(entry.tokens.ids) != 1:
            pieces = ", ".join(map(repr, entry.tokens.pieces))
            raise ValueError(f"--answer {text!r}: one token is needed, this is {pieces}")
        found += entry.tokens.ids
    return found
