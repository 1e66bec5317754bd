"""The `steer` commands that look things up or administer the server, and the way to the experiments."""

import argparse
from contextlib import aclosing

from steer_client import experiments
from steer_client.client import SteerClient
from steer_client.show import Json, Plain


async def run(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    """Executes the command; CallFailed if the server does not."""
    if options.command in _COMMANDS:
        await _COMMANDS[options.command](options, client, out)
    else:
        await _administer(options, client, out)


async def _search(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    found = client.search(
        options.query,
        dictionary=options.dictionary,
        evidence=options.evidence,
        page_size=min(options.limit, 100),
    )
    left = options.limit
    async with aclosing(found):
        async for match in found:
            out.found(match)
            left -= 1
            if not left:
                return


async def _nearest(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    feature = options.dictionary, options.index
    for match in await client.nearest(feature, among=options.among, top_k=options.top):
        out.found(match)


async def _inspect(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    response = await client.inspect(
        options.texts,
        options.dictionary,
        aggregate=options.by,
        top_k=options.top,
        include_first=options.include_first,
    )
    out.found(response)


async def _contrast(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    response = await client.contrast(
        options.positive,
        options.negative,
        options.dictionary,
        aggregate=options.by,
        top_k=options.top,
        include_first=options.include_first,
    )
    out.found(response)


async def _administer(options: argparse.Namespace, client: SteerClient, out: Json | Plain) -> None:
    match options.command:
        case "info":
            out.found(await client.info())
        case "load":
            out.found(await client.admin.load(options.folder, options.name))
        case "unload":
            await client.admin.unload(options.name, wait=options.wait)
        case "sessions" if options.close:
            await client.admin.close_session(options.close)
        case "sessions":
            for entry in await client.admin.sessions():
                out.found(entry)
        case "drain":
            out.found(await client.admin.drain())


_COMMANDS = {
    "search": _search,
    "nearest": _nearest,
    "inspect": _inspect,
    "contrast": _contrast,
    "compare": experiments.compare,
    "score": experiments.score,
    "patch": experiments.patch,
}
