"""The figures of the case studies, as in section 5 of the paper."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.paper.cases.tree import Node
from trainer.paper.page import Figure, plot

_PLAIN = 0x2100
"""Characters from here on may not be in the font."""


def shown(text: str) -> str:
    """A token as matplotlib can write it; spaces at its ends and line breaks are seen."""
    marked = text.replace("\n", "\\n").replace("\t", "\\t")
    if marked != marked.strip() or not marked:
        marked = f"“{marked}”"
    plain = "".join(
        sign
        if ord(sign) < _PLAIN and sign.isprintable()
        else sign.encode("ascii", "backslashreplace").decode()
        for sign in marked
    )
    return plain.replace("$", "\\$")


def histograms(panels: Sequence[tuple[str, Mapping[str, Any]]], caption: str) -> Figure:
    """Beside each other, for each range of activation: the shares of the commonest tokens, and how many tokens."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for panel, (title, found) in zip(axes, panels, strict=True):
            _stack(panel, found)
            panel.set_title(title)
            panel.set_xlabel("activation")
        axes[0].set_ylabel("share of the tokens in this range")

    return plot(draw, caption, (6 * len(panels), 5))


def _stack(panel: Any, found: Mapping[str, Any]) -> None:
    bins = len(found["counts"])
    width = found["maximum"] / bins
    middles = [(number + 0.5) * width for number in range(bins)]
    below = [0.0] * bins
    for kind, shares in zip(found["kinds"], found["shares"], strict=True):
        panel.bar(middles, shares, width * 0.9, bottom=below, label=shown(kind))
        below = [low + share for low, share in zip(below, shares, strict=True)]
    filled = [float(count > 0) for count in found["counts"]]
    others = [max(0.0, full - low) for full, low in zip(filled, below, strict=True)]
    panel.bar(middles, others, width * 0.9, bottom=below, label="all others", color="#ddd")
    for middle, count in zip(middles, found["counts"], strict=True):
        panel.text(middle, 1.01, f"{count:,}", ha="center", va="bottom", fontsize=7)
    panel.set_ylim(0, 1.08)
    panel.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False
    )


def effects(title: str, found: Mapping[str, Any], caption: str) -> Figure:
    """Tokens whose logits fall most, as in the paper, and those whose log-probabilities fall and rise most."""

    def draw(canvas: Any) -> None:
        left, right = canvas.subplots(1, 2)
        _bars(left, found["logits"]["down"], "change of the logit")
        both = found["log_probabilities"]
        _bars(right, both["down"] + both["up"][::-1], "change of the log-probability")
        canvas.suptitle(title, fontsize=11)

    return plot(draw, caption, (10, 4.5))


def _bars(panel: Any, pairs: Sequence[Sequence[Any]], label: str) -> None:
    places = range(len(pairs))
    values = [value for _, value in pairs]
    colours = ["#a33" if value < 0 else "#2a7d2a" for value in values]
    panel.barh(places, values, color=colours)
    panel.set_yticks(places, [shown(token) for token, _ in pairs])
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_xlabel(label)


def causal_tree(root: Node, caption: str) -> Figure:
    """From left to right; edges say by how much the right end's absence lowers the left one."""
    leaves = _leaves(root)

    def draw(canvas: Any) -> None:
        panel = canvas.subplots()
        panel.axis("off")
        panel.set_xlim(-0.45, _levels(root) - 0.5)
        panel.set_ylim(leaves - 0.4, -0.6)
        _place(panel, root, 0, 0.0)

    return plot(draw, caption, (3.2 * _levels(root), 0.5 * leaves + 0.6))


def _place(panel: Any, node: Node, level: int, top: float) -> float:
    """Draws the node with all below it, whose leaves take the lines from `top` on; the node's own line."""
    lines = []
    for cause in node.causes:
        lines.append(_place(panel, cause, level + 1, top))
        top += _leaves(cause)
    own = sum(lines) / len(lines) if lines else top
    for cause, line in zip(node.causes, lines, strict=True):
        panel.plot([level, level + 1], [own, line], color="#999", zorder=1, linewidth=1)
        panel.annotate(
            _edge(cause),
            (level + 0.68, own + 0.68 * (line - own)),
            ha="center",
            va="center",
            fontsize=7,
            color="#a33",
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none"},
        )
    kinds = ", ".join(f"{shown(kind)} {share:.0%}" for kind, share in node.tokens[:3])
    panel.annotate(
        f"{node.site} #{node.feature}\n{kinds}",
        (level, own),
        ha="center",
        va="center",
        fontsize=7,
        zorder=2,
        bbox={"boxstyle": "round,pad=0.3", "fc": "#eef3fa", "ec": "#456"},
    )
    return own


def _edge(cause: Node) -> str:
    fresh = "" if cause.fresh is None else f" ({-cause.fresh:+.0%})"
    return f"{-cause.fall:+.0%}{fresh}"


def _leaves(node: Node) -> int:
    return sum(map(_leaves, node.causes)) or 1


def _levels(node: Node) -> int:
    return 1 + max(map(_levels, node.causes), default=0)
