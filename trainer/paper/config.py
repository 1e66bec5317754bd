"""What the experiments run on: one TOML file, a table for each experiment."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer.config import check_types, override
from trainer.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class IoiSettings:
    """Feature patching on indirect object identification (section 4)."""

    dictionaries: tuple[str, ...] = ()
    """Folders of the dictionaries to patch."""


@dataclass(frozen=True, kw_only=True)
class InterpretabilitySettings:
    """Automatic interpretability (section 3)."""

    dictionaries: tuple[str, ...] = ()
    """Folders of the dictionaries to score."""


@dataclass(frozen=True, kw_only=True)
class CaseSettings:
    """Case studies of single features (section 5)."""

    dictionary: str = ""
    """Folder of the dictionary whose features are studied."""
    parents: tuple[str, ...] = ()
    """Folders of dictionaries of earlier sites, among whose features causes are sought."""
    sentence: str = "I don’t know about that. It is now up to Dave’"
    """The feature of the largest activation on its last token is studied."""
    answer: str = "s"
    """The token, after the sentence, that this feature is expected to be for."""
    tree_token: str = ")"
    """The tree is of a feature that is strong on such tokens, if there is one."""
    tokens: int = 65_536
    """Held-out tokens; features are found in the first half, and what they do is measured in the second."""
    context: int = 64
    """Tokens of a context."""
    dense: float = 0.1
    """Features active on a larger share of the tokens are passed over, as the paper does with outlier dimensions."""
    bins: int = 10
    """Ranges of activation."""
    contexts: int = 20
    """In which an effect or a cause is measured."""
    candidates: int = 32
    """Monosemantic features that are tried, for those with the largest effect on one token."""
    effects: int = 3
    """Of them that are shown."""
    branches: int = 2
    """Causes from each site that a node of the tree has."""

    def __post_init__(self) -> None:
        check_types(self)
        positive = ("tokens", "context", "bins", "contexts", "candidates", "branches")
        for name in positive:
            if getattr(self, name) < 1:
                raise BadConfig(f"cases.{name} is {getattr(self, name)}, it must be above 0")


@dataclass(frozen=True, kw_only=True)
class TradeOffSettings:
    """Sparsity, size, site and seed against quality (appendices)."""

    dictionaries: tuple[str, ...] = ()
    """Folders of the dictionaries to compare; a folder of such stands for all in it."""
    alike: tuple[str, ...] = ()
    """Of them, or others, those whose features are compared: of one site, with other seeds, sizes or weights of the model."""


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """The keys of the file."""

    model: str
    """Hugging Face folder or hub id."""
    out: str
    """Folder for results, plots and report.html."""
    corpus: Mapping[str, float]
    """Documents, as in a training's configuration; experiments read those that trainings hold out."""
    holdout_every: int = 20
    """As in the trainings."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Of every choice at random: features, fragments, prompts."""
    trainings: tuple[str, ...] = ()
    """Configurations of `python -m trainer train` whose dictionaries are made first, if they are not there."""
    # One table for each experiment.
    ioi: IoiSettings = field(default_factory=IoiSettings)
    interpretability: InterpretabilitySettings = field(default_factory=InterpretabilitySettings)
    cases: CaseSettings = field(default_factory=CaseSettings)
    tradeoffs: TradeOffSettings = field(default_factory=TradeOffSettings)

    def __post_init__(self) -> None:
        check_types(self)


def load(path: Path, overrides: Sequence[str] = ()) -> PaperConfig:
    """The file's settings, with `key=value` or `table.key=value` overrides whose values are TOML too."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path} cannot be read: {error}") from error
    for text in overrides:
        override(content, text)
    return _build(PaperConfig, content, "")


def _build(kind: type[Any], content: Mapping[str, Any], where: str) -> Any:
    known = {entry.name: entry for entry in fields(kind)}
    unknown = sorted(set(content) - set(known))
    if unknown:
        named = ", ".join(where + name for name in unknown)
        raise BadConfig(f"unknown keys: {named}; known are {', '.join(known)}")
    values = dict(content)
    for name, value in content.items():
        default = known[name].default_factory
        if isinstance(default, type) and isinstance(value, Mapping):
            values[name] = _build(default, value, f"{where}{name}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise BadConfig(str(error).replace(f"{kind.__name__}.__init__() ", "")) from error
