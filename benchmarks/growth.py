"""How the cost of edits and read-outs grows: with edits, sites, dictionary width and batch.

One eager engine with eight sites serves the model without and with a program in turns; each figure is the median over
rounds of (time with / time without) - 1, in percent of the model's own time.

    python benchmarks/growth.py --json build/growth.json --plot build/growth.svg

`--quick` takes two short rounds and leaves out the widest dictionaries.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import circumstances, measure, parser
from tqdm import tqdm
from transformers import AutoConfig

from steer_server.dictionary.card import Card, Model, config_digest, model_shape
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.edits import AddRelative
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.files import load, save
from steer_server.dictionary.site import Site
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.generation import Generation, Sampling
from steer_server.program import FeatureEdit, Program, ReadOut

LAYERS = (3, 6, 9, 12, 15, 18, 21, 24)
NARROW = 4096
WIDTHS = (4096, 16_384, 65_536, 131_072)
BATCH, TOKENS = 16, 16


def edit_program(edits: int, sites: int = 1) -> Program:
    """`edits` at each of the first `sites` sites, on every row."""
    return Program(
        tuple(
            FeatureEdit(f"site{number}", AddRelative(feature, 0.01))
            for number in range(sites)
            for feature in range(edits)
        )
    )


def read_program(width: int) -> Program:
    return Program((), (ReadOut(f"width{width}", top_k=32),))


def series(widths: Sequence[int]) -> dict[str, dict[int, tuple[int, Program]]]:
    """By what grows: (batch, program) by its value."""
    both = Program(edit_program(16).edits, read_program(NARROW).read_outs)
    return {
        "edits": {n: (BATCH, edit_program(n)) for n in (1, 4, 16, 64)},
        "sites, 8 edits each": {n: (BATCH, edit_program(8, n)) for n in (1, 2, 4, 8)},
        "width read, top 32": {n: (BATCH, read_program(n)) for n in widths},
        "batch, 16 edits and top 32": {n: (n, both) for n in (1, 4, 16, 64)},
    }


class Bench:
    """Counts requests, so that ids and prompts are always new."""

    def __init__(self, engine: VllmEngine, tokens: int) -> None:
        self.engine, self.tokens, self.count = engine, tokens, 0

    async def time(self, batch: int, program: Program) -> float:
        sampling = Sampling(max_tokens=self.tokens, temperature=0.0, ignore_eos=True)

        async def one() -> None:
            self.count += 1
            prompt = tuple(1000 + (self.count * 7919 + i * 31) % 40000 for i in range(16))
            name = f"r{self.count}"
            async for _ in self.engine.generate(Generation(name, prompt, sampling, program)):
                pass

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(batch)))
        return time.perf_counter() - began

    async def cost(self, batch: int, program: Program, rounds: int) -> float:
        """Percent of the model's own time."""
        ratios = []
        for number in range(rounds + 1):
            order = [Program(), program] if number % 2 else [program, Program()]
            times = [await self.time(batch, asked) for asked in order]
            plain, steered = times if number % 2 else reversed(times)
            if number:
                ratios.append(steered / plain)
        return round((statistics.median(ratios) - 1) * 100, 1)


def make_dictionary(model: Path, folder: Path, name: str, layer: int, width: int) -> None:
    """Random unit rows; some tens of features per 4,096 are active on a token."""
    shape = model_shape(AutoConfig.from_pretrained(model))
    generator = torch.Generator().manual_seed(layer)
    rows = torch.randn(width, shape["hidden_size"], generator=generator)
    dictionary = Dictionary.tied(
        torch.nn.functional.normalize(rows, dim=1), torch.full((width,), -14.0)
    )
    card = Card.of(
        dictionary,
        name=name,
        model=Model(model.name, "", config_digest(shape)),
        site=Site("resid_post", layer),
        architecture="tied_relu",
    )
    save(folder / name, card, dictionary, FeatureStatistics.zeros(width))


async def main(options: argparse.Namespace) -> dict[str, Any]:
    widths = WIDTHS[:2] if options.quick else WIDTHS
    settings = EngineSettings(
        str(options.model),
        tuple(Site("resid_post", layer) for layer in LAYERS),
        max_model_len=256,
        max_num_seqs=64,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        made = [(f"site{number}", layer, NARROW) for number, layer in enumerate(LAYERS)]
        made += [(f"width{width}", LAYERS[4], width) for width in widths]
        for name, layer, width in made:
            make_dictionary(options.model, Path(folder), name, layer, width)
        engine = await VllmEngine.start(settings)
        for name, _, _ in made:
            await engine.add_dictionary(name, load(Path(folder) / name))
    bench = Bench(engine, 4 if options.quick else TOKENS)
    asked = series(widths)
    found: dict[str, dict[int, float]] = {}
    with tqdm(total=sum(map(len, asked.values())), unit="point") as bar:
        for what, points in asked.items():
            found[what] = {}
            for value, (batch, program) in points.items():
                bar.set_description(f"{what}: {value}")
                rounds = 2 if options.quick else options.rounds
                found[what][value] = await bench.cost(batch, program, rounds)
                bar.update()
    await engine.shutdown()
    return {
        **circumstances(options),
        "batch": BATCH,
        "rounds": options.rounds,
        "percent_of_model_time": found,
    }


def plot(result: dict[str, Any], file: Path) -> None:
    """One panel for each thing that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = result["percent_of_model_time"]
    figure, panels = pyplot.subplots(1, len(found), figsize=(14, 3.4), sharey=True)
    for panel, (what, points) in zip(panels, found.items(), strict=True):
        values = [int(value) for value in points]
        panel.plot(values, list(points.values()), marker="o")
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [f"{v // 1024}k" if v >= 1024 else str(v) for v in values])
        panel.set_xlabel(what)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("extra time, % of the model's")
    figure.suptitle(f"{result['model']}, eager, {result['hardware']}, {result['date']}")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


if __name__ == "__main__":
    # vLLM starts its processes by importing this file again.
    made = parser(__doc__, rounds=5)
    made.add_argument("--plot", type=Path, help="draw it, as .svg or .png")
    options = made.parse_args()
    result = measure(options, main)
    if options.plot:
        plot(result, options.plot)
