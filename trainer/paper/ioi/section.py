"""What the curves say of the paper's claims, in words, tables and figures."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from trainer.compare import Table
from trainer.paper.page import Figure, Finding, Section, Verdict, plot

Curve = Mapping[str, Any]
_LEVELS = 12


def section(
    curves: Sequence[Curve], searches: Sequence[Mapping[str, Any]], served: Mapping[str, Any] | None
) -> Section:
    """Of the JSON results."""
    findings = [_fewer(curves), _smaller(curves), _changed(curves), _reach(curves)]
    if searches:
        findings.append(_searched(searches))
    if served:
        findings.append(_same(served))
    return Section(
        "Features that carry an indirect object",
        'Prompts such as "When Mary and John went to the store, John gave a drink to" take on, at every position, the '
        "activations that some features have on the same prompt with another name in Mary's place; the error term stays. "
        "KL(patched || counterfactual) of the next token, mean over prompts. Features are chosen on one set of prompts, "
        "by integrated gradients unless said otherwise, and scored on others; the paper scores them where it chose them.",
        findings,
    )


def needed(curve: Curve, level: float, of: str, part: str = "heldout") -> float | None:
    """How much of `of`, "size", "edit" or "changed", brings the KL down to the level; None if nothing does.

    Between two points of the curve the least KL so far is taken to fall in a straight line.
    """
    points = _points(curve, of, part)
    before = points[0]
    if before[1] <= level:
        return before[0]
    for at in points[1:]:
        if at[1] <= level:
            share = (before[1] - level) / (before[1] - at[1])
            return before[0] + share * (at[0] - before[0])
        if at[1] < before[1]:
            before = at
    return None


def levels(curves: Sequence[Curve], part: str = "heldout") -> list[float]:
    """KLs that every curve goes through, highest first."""
    start = min(curve[part][0]["kl"] for curve in curves)
    end = max(min(effect["kl"] for effect in curve[part]) for curve in curves)
    step = (start - end) / _LEVELS
    return [start - step * number for number in range(1, _LEVELS + 1)] if step > 0 else []


def wins(mine: Curve, others: Sequence[Curve], of: str, part: str = "heldout") -> tuple[int, int]:
    """At how many of the levels, that all reach, mine needs less than each other; and how many levels there are."""
    found = 0
    compared = levels([mine, *others], part)
    for level in compared:
        own = needed(mine, level, of, part)
        theirs = [needed(other, level, of, part) for other in others]
        assert own is not None
        found += all(other is None or own < other for other in theirs)
    return found, len(compared)


def verdict(won: int, compared: int) -> Verdict:
    """Reproduced if all are won, not if none is; not measured if there is none."""
    if not compared:
        return Verdict.NOT_MEASURED
    if won == compared:
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if won else Verdict.NOT_REPRODUCED


def _fewer(curves: Sequence[Curve]) -> Finding:
    return _against_pca(
        curves,
        "size",
        "Fewer patches than PCA",
        "for a given KL, dictionary features need fewer patches than principal components, whole or non-negative "
        "(section 4.3, figure 4 left; appendix F for other layers).",
        "features patched",
    )


def _smaller(curves: Sequence[Curve]) -> Finding:
    return _against_pca(
        curves,
        "edit",
        "Smaller edits than PCA",
        "for a given KL, patching dictionary features changes the activations less (figure 4 right).",
        "edit magnitude |x' - x|, mean over positions",
    )


def _changed(curves: Sequence[Curve]) -> Finding:
    return _against_pca(
        curves,
        "changed",
        "Fewer features change on a prompt",
        "(ours) a set that serves many prompts holds features which differ on few of them, while a principal component "
        "differs on every prompt; counted are the patched features that differ on a prompt, mean over prompts.",
        "patched features that differ, mean over prompts",
    )


def _against_pca(curves: Sequence[Curve], of: str, title: str, claim: str, axis: str) -> Finding:
    rows, best = [], (0, 0)
    lines = []
    for site in _sites(curves):
        here = [curve for curve in curves if curve["site"] == site]
        pca = [curve for curve in here if "pca" in curve["name"]]
        for curve in here:
            if curve in pca or not pca:
                continue
            won, compared = wins(curve, pca, of)
            own, there = wins(curve, pca, of, "prompts")
            ours = not _is_baseline(curve)
            if ours and compared and (not best[1] or won / compared > best[0] / best[1]):
                best = won, compared
            rows.append([curve["name"], f"{won} of {compared}", f"{own} of {there}"])
        lines.append(site)
    text = (
        f"The best of our dictionaries needs less than every form of PCA at {best[0]} of {best[1]} KL levels, evenly "
        "spaced over those that both reach, on held-out prompts."
    )
    table = Table(["compared with PCA", "levels won, held-out", "levels won, where chosen"], rows)
    figures = [_curves(curves, site, of, axis) for site in lines]
    return Finding(title, claim, verdict(*best), text, [table, _numbers(curves, of)], figures)


def _reach(curves: Sequence[Curve]) -> Finding:
    """Reconstruction error bounds what patching can do."""
    rows, found = [], []
    for curve in curves:
        least = min(effect["kl"] for effect in curve["heldout"])
        start = curve["heldout"][0]["kl"]
        rows.append(
            [
                curve["name"],
                curve["site"],
                f"{curve['features']:,}",
                f"{curve['differing']:,}",
                f"{start:.3f}",
                f"{curve['heldout'][-1]['kl']:.3f}",
                f"{least:.3f}",
            ]
        )
        if curve["alpha"]:
            found.append((curve["site"], curve["features"], curve["alpha"], least))
    found.sort()
    pairs = [after[3] > before[3] for before, after in pairwise(found) if before[:2] == after[:2]]
    header = ["patched", "site", "features", "differ", "KL unpatched", "KL all patched", "least KL"]
    text = (
        f"Of neighbouring L1 weights, of dictionaries of one size, the larger one has the higher least KL in {sum(pairs)} of {len(pairs)} pairs."
        if pairs
        else "No dictionaries of several L1 weights were patched."
    )
    return Finding(
        "Sparser dictionaries reach less far",
        "the larger the L1 weight, the higher the KL that is left when all features are patched, for the error term "
        "carries what the dictionary misses (section 4.3).",
        verdict(sum(pairs), len(pairs)),
        text,
        [Table(header, rows)],
    )


def _searched(searches: Sequence[Mapping[str, Any]]) -> Finding:
    rows = []
    for search in searches:
        last = search["points"][-1]
        rows.append(
            [
                search["name"],
                f"{search['differing']:,} of {search['features']:,}",
                f"{search['candidates']:,}",
                f"{search['one_by_one']:,}",
                f"{search['evaluated']:,}",
                f"{search['rounds']:,}",
                f"{search['one_by_one'] / search['rounds']:.0f}x",
                f"{len(last['features']):,} at {last['kl']:.3f}",
            ]
        )
    header = [
        "searched",
        "differ",
        "candidates",
        "runs one by one",
        "sets evaluated",
        "runs",
        "fewer by",
    ]
    least = min(search["one_by_one"] / search["rounds"] for search in searches)
    return Finding(
        "The subset search",
        "features are dropped while the KL rises by less than a threshold, from all of them on (section 4.2, after ACDC); "
        "the original runs the model for every feature at every threshold.",
        Verdict.REPRODUCED if least >= 20 else Verdict.DIFFERS,
        f"The same sets with at least {least:.0f} times fewer runs of the model: features that never differ are left out, "
        "outcomes are guessed and verified in batches, and known ones are not computed again. A run is of a batch of sets: "
        "there are fewer runs, and where guesses were wrong more sets.",
        [Table([*header, "features left, KL"], rows)],
        [
            plot(
                lambda canvas: _draw_searches(canvas, searches),
                "The search: features left against KL.",
            )
        ],
    )


def _same(served: Mapping[str, Any]) -> Finding:
    rows, apart = [], 0.0
    for row in served["rows"]:
        here, there = row["here"], row["there"]
        apart = max(apart, abs(here["kl"] - there["kl"]))
        rows.append(
            [str(row["size"])]
            + [f"{value:.4f}" for value in (here["kl"], there["kl"], here["edit"], there["edit"])]
        )
    return Finding(
        "The same through the server",
        "(ours) an experiment offline and over the Patch RPC, inside vLLM, is the same experiment.",
        Verdict.REPRODUCED if apart < 1e-2 else Verdict.NOT_REPRODUCED,
        f"{served['name']}, {served['prompts']} prompts: the largest difference in KL is {apart:.1e} nats.",
        [
            Table(
                [
                    "features",
                    "KL, transformers",
                    "KL, served",
                    "edit, transformers",
                    "edit, served",
                ],
                rows,
            )
        ],
    )


def _numbers(curves: Sequence[Curve], of: str) -> Table:
    """What each needs for some KL levels, held-out."""
    highest = min(curve["heldout"][0]["kl"] for curve in curves)
    shares = (0.75, 0.5, 0.25, 0.1)
    rows = []
    for curve in curves:
        cells = [needed(curve, highest * share, of) for share in shares]
        rows.append(
            [curve["name"], curve["site"]]
            + ["never" if c is None else f"{c:.0f}" if of != "edit" else f"{c:.2f}" for c in cells]
        )
    return Table(["to bring the KL to", "", *(f"{highest * s:.2f}" for s in shares)], rows)


def _curves(curves: Sequence[Curve], site: str, of: str, axis: str) -> Figure:
    here = [curve for curve in curves if curve["site"] == site]

    def draw(canvas: Any) -> None:
        panel = canvas.subplots()
        for number, curve in enumerate(here):
            style = "--" if _is_baseline(curve) else "-"
            points = _raw(curve, of, "heldout")
            panel.plot(
                *zip(*points, strict=True),
                style,
                marker=".",
                color=f"C{number % 10}",
                label=curve["name"],
            )
        if of != "edit":
            panel.set_xscale("symlog", base=2, linthresh=1)
        panel.set_xlabel(axis)
        panel.set_ylabel("KL(patched || counterfactual), nats, held-out prompts")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)

    return plot(
        draw, f"{site}: dictionaries of features solid, what they are compared with dashed."
    )


def _draw_searches(canvas: Any, searches: Sequence[Mapping[str, Any]]) -> None:
    panel = canvas.subplots()
    for search in searches:
        points = [(len(p["features"]), p["kl"]) for p in search["points"]]
        points.append((search["candidates"], search["whole"]["kl"]))
        panel.plot(*zip(*sorted(points), strict=True), marker=".", label=search["name"])
    panel.set_xlabel("features patched")
    panel.set_ylabel("KL(patched || counterfactual), nats, the search's own prompts")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)


def _points(curve: Curve, of: str, part: str) -> list[tuple[float, float]]:
    return sorted(_raw(curve, of, part))


def _raw(curve: Curve, of: str, part: str) -> list[tuple[float, float]]:
    if of != "size":
        return [(effect[of], effect["kl"]) for effect in curve[part]]
    # On other prompts all features may differ, not only those that did where they were chosen.
    sizes = curve["sizes"]
    return [(size, effect["kl"]) for size, effect in zip(sizes, curve[part], strict=True)]


def _is_baseline(curve: Curve) -> bool:
    return any(kind in curve["name"] for kind in ("pca", "ica", "random", "basis", "diff_mean"))


def _sites(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve["site"] for curve in curves))
