"""How much of a dictionary comes again with another seed or size (MMCS)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.files import StoredDictionary
from trainer.compare import ALIKE, Likeness, Table, likeness
from trainer.errors import BadConfig
from trainer.paper.lab import Lab, training
from trainer.paper.page import Figure, Finding, plot
from trainer.paper.tradeoffs.quality import name, trained
from trainer.paper.tradeoffs.verdicts import OVER_FLOOR, alike

_APART = 1_000_003
"""From the seeds of trainings, whose first weights are drawn in the same way and are to be seen in the last ones."""


def again(lab: Lab, found: Sequence[StoredDictionary]) -> Finding:
    """Of dictionaries of one site."""
    if len({stored.card.site for stored in found}) > 1:
        raise BadConfig(
            "tradeoffs.alike lists dictionaries of several sites; features of different sites are not compared"
        )
    table = _all_pairs(lab, found)
    floors = [_floor(lab, stored) for stored in found]
    pairs = [
        (i, j) for i, a in enumerate(found) for j, b in enumerate(found) if i < j and seeds(a, b)
    ]
    told = ", ".join(
        f"{table[i][j].mmcs:.3f} with {found[i].card.n_features:,} features (random {floors[j].mmcs:.3f}, "
        f"{table[i][j].shared:.0%} shared)"
        for i, j in pairs
    )
    return Finding(
        "Seeds and sizes",
        "dictionaries of other seeds and sizes find many of the same features: their mean maximal cosine similarity is far above "
        "that of random directions (section 2 and appendix on MMCS)",
        alike([(table[i][j].mmcs, floors[j].mmcs) for i, j in pairs]),
        f"MMCS of two dictionaries that differ in the seed alone: {told or 'there are none'}. Rule: at least {OVER_FLOOR:g} "
        "times that to as many random directions, for each. MMCS grows with the number of directions compared with, which is why each "
        f"has its own floor. Dictionaries of one seed begin with random numbers in common. Shared are features whose partner in the best one-to-one matching has a cosine above {ALIKE}.",
        [_pairs_table(found, table, floors)],
        [_heat_map(found, table, floors)],
    )


def seeds(one: StoredDictionary, other: StoredDictionary) -> bool:
    """Whether both are trained, and their trainings differ in the seed and nothing else."""
    if not (trained(one) and trained(other)):
        return False
    configs = [asdict(training(stored)) for stored in (one, other)]
    differ = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    return "seed" in differ and differ <= {"seed", "out"}


def _all_pairs(lab: Lab, found: Sequence[StoredDictionary]) -> list[list[Likeness]]:
    """Of each, by row, to each."""
    results = lab.results("tradeoffs")
    rows = []
    for number, one in enumerate(tqdm(found, desc="MMCS", unit=" dictionaries")):
        lab.stop.check("likeness of the earlier dictionaries is kept")
        settings = {"of": one.sha256, "to": [other.sha256 for other in found]}
        values = results.get(
            f"likeness-{number}",
            settings,
            lambda one=one: [_of(one, other.dictionary.W_dec) for other in found],
        )
        rows.append([Likeness(*value) for value in values])
    return rows


def _of(one: StoredDictionary, rows: Tensor) -> list[float]:
    return list(likeness(one.dictionary.W_dec, rows))


def _floor(lab: Lab, stored: StoredDictionary) -> Likeness:
    """A dictionary's to random directions, as many as it has itself."""

    def compute() -> list[float]:
        generator = torch.Generator().manual_seed(lab.config.seed + _APART)
        return _of(stored, torch.randn(stored.dictionary.W_dec.shape, generator=generator))

    settings = {"of": stored.sha256, "seed": lab.config.seed + _APART}
    return Likeness(*lab.results("tradeoffs").get(f"floor-{stored.sha256[:8]}", settings, compute))


def _pairs_table(
    found: Sequence[StoredDictionary],
    table: Sequence[Sequence[Likeness]],
    floors: Sequence[Likeness],
) -> Table:
    rows = [
        [name(one), name(other), *_numbers(table[i][j])]
        for i, one in enumerate(found)
        for j, other in enumerate(found)
        if i != j
    ]
    rows += [
        [name(one), "random directions, as many", *_numbers(floor)]
        for one, floor in zip(found, floors, strict=True)
    ]
    return Table(["of", "to", "MMCS", "matched", "shared"], rows)


def _numbers(found: Likeness) -> list[str]:
    return [f"{found.mmcs:.3f}", f"{found.matched:.3f}", f"{found.shared:.1%}"]


def _heat_map(
    found: Sequence[StoredDictionary],
    table: Sequence[Sequence[Likeness]],
    floors: Sequence[Likeness],
) -> Figure:
    values = [
        [one.mmcs for one in row] + [floor.mmcs] for row, floor in zip(table, floors, strict=True)
    ]

    def draw(canvas: Any) -> None:
        panel = canvas.subplots()
        picture = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        names = [name(stored) for stored in found]
        panel.set_xticks(
            range(len(names) + 1), [*names, "random, as many"], rotation=30, ha="right"
        )
        panel.set_yticks(range(len(names)), names)
        panel.tick_params(labelsize=7)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if value < 0.6 else "black"
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        canvas.colorbar(picture, label="MMCS")

    caption = "Of the dictionary of the row to that of the column: mean over its features of the largest cosine."
    return plot(draw, caption, (1.0 * len(found) + 4, 0.5 * len(found) + 2.5))
