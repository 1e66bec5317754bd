"""The whole product in one run: starts a server, reads features, edits them, scrapes the metrics, stops the server.

    make demo

The parts below are what an app would do; `make serve` leaves the same server running for your own.
"""

import asyncio
import os
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections import Counter
from pathlib import Path

from steer.v1 import dictionaries_pb2, edits_pb2, steering_pb2
from tqdm import tqdm

from steer_client import CallFailed, Feature, SteerClient, ablate, clamp, read_top, rows

HERE = Path(__file__).parent
CONFIG = HERE / "server.toml"
LOG = Path("build/demo-server.log")
DICTIONARY = "smollm2-135m-resid10"

READ = "In April the doctor drove to the hospital in Boston."
ABLATED, ABLATE_PROMPT = Feature(DICTIONARY, 1498), "The French capital, Paris, is famous for its"
CLAMPED, CLAMP_TIMES_MAX = Feature(DICTIONARY, 1583), 1.2
CLAMP_PROMPT = "My favourite thing to do on the weekend is"
LIVE, LIVE_TIMES_MAX, LIVE_PROMPT = Feature(DICTIONARY, 4368), 1.2, "Once upon a time"
GREEDY = {"temperature": 0.0, "max_tokens": 32}
COMMON = 0.05
"""Features on more than this share of all tokens say little of a single one."""


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def name(feature: dictionaries_pb2.Feature) -> str:
    """Its label, or else the token it promotes most."""
    return feature.label or f"(no label; promotes {feature.logits_up[0].token!r})"


async def show_features(client: SteerClient) -> None:
    """(a) A prompt's tokens, each with its strongest features."""
    title(f"(a) {READ!r}: the strongest features of each token")
    print(f"    (two of those that are active on less than {COMMON:.0%} of all text)")
    pieces: list[str] = []
    async for response in client.encode(READ, [read_top(DICTIONARY, 16)]):
        pieces += response.tokens.pieces
        for activations in response.activations:
            for row in rows(activations):
                known = [
                    (await client.feature((DICTIONARY, f)), value) for f, value in row.features
                ]
                shown = [
                    f"{value:4.1f} #{feature.index} {name(feature)}"
                    for feature, value in known
                    if feature.density < COMMON
                ]
                print(f"{pieces[row.position]!r:>14}  {' | '.join(shown[:2])}")


async def complete(
    client: SteerClient, what: str, prompt: str, edits: list[edits_pb2.Edit]
) -> None:
    """Prints one completion and what its edits did."""
    text = ""
    async for event in client.generate(prompt, edits=edits, **GREEDY):
        match event:
            case steering_pb2.Tokens():
                text += event.text
            case steering_pb2.Finished():
                proof = [
                    f"changed {report.tokens_changed} of {report.tokens_in_scope} tokens, "
                    f"{report.mean_relative_size:.0%} of |x| on average"
                    for report in event.edit_reports
                ]
                print(f"{what:>10}: {text!r}{'  [' + '; '.join(proof) + ']' if proof else ''}")


async def show_edits(client: SteerClient) -> None:
    """(b) The same prompt plainly, with a feature ablated, with one clamped."""
    title(f"(b) {ABLATE_PROMPT!r}, without feature #{ABLATED.feature}")
    print(f"{'':>12}{name(await client.feature(ABLATED))}")
    await complete(client, "plain", ABLATE_PROMPT, [])
    await complete(client, "ablated", ABLATE_PROMPT, [ablate(ABLATED)])
    title(f"    {CLAMP_PROMPT!r}, with feature #{CLAMPED.feature} held at {CLAMP_TIMES_MAX} x max")
    print(f"{'':>12}{name(await client.feature(CLAMPED))}")
    await complete(client, "plain", CLAMP_PROMPT, [])
    await complete(client, "clamped", CLAMP_PROMPT, [clamp(CLAMPED, CLAMP_TIMES_MAX, "max")])


async def show_live_update(client: SteerClient) -> None:
    """(c) One generation whose edit changes half-way."""
    title(f"(c) {LIVE_PROMPT!r}, with feature #{LIVE.feature} clamped while the text is written")
    print(f"{'':>12}{name(await client.feature(LIVE))}")
    before, after, boundary, sent = "", "", None, False
    async with client.session() as session:
        await session.start(LIVE_PROMPT, temperature=0.0, max_tokens=48)
        async for event in session:
            match event:
                case steering_pb2.Tokens():
                    if boundary is None:
                        before += event.text
                    else:
                        after += event.text
                    if event.first_index >= 12 and not sent:
                        sent = True
                        await session.update([clamp(LIVE, LIVE_TIMES_MAX, "max")])
                case steering_pb2.UpdateApplied():
                    boundary = event.first_index
                case steering_pb2.Finished():
                    break
    print(f"{'before':>10}: {before!r}")
    print(f"{'after':>10}: {after!r}  [held from token {boundary} on, the server says]")


def show_metrics(port: int) -> None:
    """(d) What Prometheus sees of it."""
    title(f"(d) http://127.0.0.1:{port}/metrics, the lines about features")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    wanted = (
        "steer_feature_info{",
        "steer_feature_activation_count",
        "steer_edit_tokens_total",
        "steer_tokens_total",
        "vllm:generation_tokens_total",
    )
    for line in lines:
        if line.startswith(wanted):
            print(f"    {line}")
    families = Counter(line.split("_")[0].split(":")[0] for line in lines if line[:1].isalpha())
    print(f"    ... {families['steer']} steer series, {families['vllm']} vllm series in all")


async def wait_until_ready(server: subprocess.Popen, client: SteerClient) -> None:
    began = time.monotonic()
    print("starting the server, which loads vLLM and the model (half a minute)", flush=True)
    with tqdm(bar_format="    {elapsed}", disable=None, leave=False) as bar:
        while True:
            if server.poll() is not None:
                sys.exit(
                    f"the server did not start; its log {LOG} ends:\n{LOG.read_text()[-2000:]}"
                )
            if time.monotonic() - began > 300:
                sys.exit(f"the server is not ready after five minutes; its log is {LOG}")
            try:
                await client.dictionaries()
                return
            except CallFailed:
                await asyncio.sleep(0.5)
                bar.refresh()


async def main() -> None:
    config = tomllib.loads(CONFIG.read_text())
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "steer_server", "--config", str(CONFIG)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        async with SteerClient(f"127.0.0.1:{config['port']}") as client:
            await wait_until_ready(server, client)
            await show_features(client)
            await show_edits(client)
            await show_live_update(client)
            show_metrics(config["metrics_port"])
    finally:
        server.terminate()
        server.wait(timeout=60)
    title("the server has stopped; `make serve` leaves one running")


if __name__ == "__main__":
    # Closing a channel is worth a line to gRPC's core otherwise.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    asyncio.run(main())
