"""The `steer` command. Exits with 1 if the server refuses, 2 for wrong usage, 3 if nobody answers."""

import argparse
import asyncio
import sys

import grpc

from steer_client import commands, show
from steer_client.arguments import sampling_of
from steer_client.cli import parser, tls_of
from steer_client.client import SteerClient
from steer_client.edits import Feature, read_top
from steer_client.errors import CallFailed

REFUSED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        asyncio.run(run(options))
    except CallFailed as error:
        sys.exit(_explain(error, options.server))
    except ValueError as error:
        # TLS files, a token in the clear; of protobuf: a number that its field cannot hold.
        print(f"steer: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


async def run(options: argparse.Namespace) -> None:
    """Executes the command; CallFailed if the server does not."""
    connection = SteerClient(
        options.server, timeout=options.timeout, tls=tls_of(options), token=options.token
    )
    async with connection as client:
        out = show.Json() if options.json else show.Plain()
        match options.command:
            case "dictionaries":
                out.dictionaries(await client.dictionaries())
            case "feature":
                out.feature(await client.feature(Feature(options.dictionary, options.index)))
            case "encode":
                read_outs = [read_top(options.dictionary, options.top)]
                async for response in client.encode(options.text, read_outs):
                    out.encoded(response)
            case "generate":
                events = client.generate(
                    options.text,
                    edits=options.edits,
                    read_outs=options.read_outs,
                    **sampling_of(options),
                )
                async for event in events:
                    out.event(event)
            case _:
                await commands.run(options, client, out)


def _explain(error: CallFailed, server: str) -> int:
    """Says what went wrong on stderr; returns the exit code."""
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        print(f"steer: no server answers at {server}: {error}", file=sys.stderr)
        return UNREACHABLE
    print(f"steer: {error.code.name}: {error}", file=sys.stderr)
    if error.retry_seconds is not None:
        print(f"steer: try again in {error.retry_seconds:g} s", file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    main()
