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
    names: int = 40
    """Names that prompts are made of, each one token of the model."""
    prompts: int = 50
    """Pairs of a prompt and its counterfactual on which features are selected."""
    heldout: int = 50
    """Other pairs, on which the selection is scored too; the paper has none."""
    sizes: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Numbers of features to patch, those first that attribution says lower the KL most."""
    attribution_steps: int = 4
    """Points between base and counterfactual whose gradients are averaged."""
    searched: tuple[str, ...] = ()
    """Folders of the dictionaries whose features the paper's search selects as well."""
    search_prompts: int = 50
    """Of `prompts`, those that the search runs on."""
    search_candidates: int = 0
    """Features the search begins with, those first that attribution puts first; 0, as in the paper: all."""
    thresholds: tuple[float, ...] = tuple(10 ** (-5 + 5 * step / 49) for step in range(50))
    """Rises of the KL below which the search drops a feature."""
    search_batch: int = 32
    """Candidates whose removal is tried in one run of the model; the sets do not depend on it."""
    server: str = ""
    """Address of a steer-server that has the first of `dictionaries`, such as 127.0.0.1:50051: it is patched there, too."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("prompts", "heldout", "attribution_steps", "search_prompts", "search_batch"):
            if getattr(self, name) < 1:
                raise BadConfig(f"ioi.{name} is {getattr(self, name)}, it must be above 0")
        if self.sizes[:1] != (0,) or list(self.sizes) != sorted(set(self.sizes)):
            raise BadConfig(f"ioi.sizes is {list(self.sizes)}; it must rise from 0")
        if not self.thresholds or list(self.thresholds) != sorted(set(self.thresholds)):
            raise BadConfig(f"ioi.thresholds is {list(self.thresholds)}; they must rise")


@dataclass(frozen=True, kw_only=True)
class InterpretabilitySettings:
    """Automatic interpretability (section 3)."""

    dictionaries: tuple[str, ...] = ()
    """Folders of the dictionaries to score; directions and those of random weights are what others are compared with."""
    explainers: tuple[str, ...] = ("token", "token+previous")
    """`token`, `token+previous`: rules that need no model; `llm`: a language model. Verdicts are by the first one."""
    features: int = 150
    """Of each dictionary, drawn among those that are active in enough fragments."""
    fragments: int = 50_000
    """Pieces of held-out text, fewer if it ends before."""
    fragment_tokens: int = 64
    """Tokens of a fragment."""
    stride: int = 1024
    """Tokens of text from which one fragment is taken, at a random place; the paper takes one of each document."""
    examples: int = 20
    """Fragments of strongest activation, and random ones, in four interleaved splits; a quarter of them is scored."""
    llm: str = ""
    """Model that explains: its name at `llm_url`, or a folder or hub id that vLLM serves here meanwhile."""
    llm_url: str = ""
    """OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; the key is the environment's OPENAI_API_KEY."""
    simulator: str = ""
    """Model that simulates, where it is not the one that explains; it must give log-probabilities of its prompt."""
    simulator_url: str = ""
    """Its endpoint."""
    llm_features: int = 0
    """Of the features, how many `llm` gets, because it takes long; 0: all."""
    serve: tuple[str, ...] = ()
    """Options of `vllm serve` for a model without a URL."""

    def __post_init__(self) -> None:
        check_types(self)
        unknown = sorted(set(self.explainers) - {"token", "token+previous", "llm"})
        if unknown or not self.explainers:
            raise BadConfig(
                f"interpretability.explainers is {list(self.explainers)}; allowed are token, token+previous, llm, at least one"
            )
        if "llm" in self.explainers and not self.llm:
            raise BadConfig(
                "interpretability.explainers has llm; `llm` must name a model, and `llm_url` where it is served, if it is"
            )
        for name in ("features", "fragments", "stride"):
            if getattr(self, name) < 1:
                raise BadConfig(
                    f"interpretability.{name} is {getattr(self, name)}, it must be above 0"
                )
        if self.fragment_tokens < 2:
            raise BadConfig(
                f"interpretability.fragment_tokens is {self.fragment_tokens}, it must be above 1"
            )
        if self.examples < 4 or self.examples % 4:
            raise BadConfig(
                f"interpretability.examples is {self.examples}, it must be a multiple of 4"
            )
        if bool(self.simulator) != bool(self.simulator_url):
            raise BadConfig("interpretability.simulator and simulator_url go together")


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
        made = kind(**values)
    except TypeError as error:
        raise BadConfig(str(error).replace(f"{kind.__name__}.__init__() ", "")) from error
    try:
        check_types(made)
    except BadConfig as error:
        raise BadConfig(f"{where}{error}") from error
    return made
