"""What a run is: every choice that decides the bytes of the dictionary, in one frozen table."""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from steer_server.dictionary.site import Site
from steer_server.errors import InvalidRequest
from trainer.errors import BadConfig

# What the stored activations depend on; runs that share these share the harvest.
HARVEST_FIELDS = (
    "model",
    "site",
    "corpus",
    "holdout_every",
    "context",
    "skip_positions",
    "max_norm_ratio",
    "tokens",
    "eval_tokens",
    "activation_dtype",
    "seed",
    "threads",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The keys of a configuration file."""

    model: str
    """Hugging Face folder or hub id."""
    site: str
    """Stream and layer, such as `resid_post.10`; streams are resid_post, mlp_out, attn_out."""
    corpus: Mapping[str, float]
    """Documents, each path, glob or hub data set with its share of the tokens."""
    out: str
    """Folder of the finished dictionary; its last part is the dictionary's name."""
    tokens: int
    """Training tokens to harvest, fewer if the corpus ends before."""
    n_features: int
    """Rows of the dictionary."""
    alpha: float
    """Weight of the L1 term. With `loss_reduction = "mean"` it has the unit of the paper's alphas."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Squared error averaged over d_model, as the paper's code does, or summed over it, as its equation 4."""
    normalise_input: bool = True
    """Scale activations to E|x|^2 = d_model, so that one alpha means the same at every site."""
    epochs: int = 1
    """Passes over the harvested activations, each in a new random order."""
    batch: int = 1024
    """Activations per step."""
    lr: float = 1e-3
    """Of Adam, without warm-up or decay."""
    context: int = 256
    """Tokens per context; documents are joined by the end-of-sequence token and cut."""
    skip_positions: int = 1
    """Positions left out at the start of each context; position 0 is an attention sink."""
    max_norm_ratio: float = 10.0
    """Activations longer than this many medians are left out: attention sinks at other positions."""
    activation_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the activations on disk; a value that overflows stops the harvest."""
    holdout_every: int = 20
    """Every so many-th document is held out for evaluation."""
    eval_tokens: int = 32768
    """Held-out tokens to evaluate on."""
    seed: int = 0
    """Of the weights, the order of documents and the order of activations."""
    threads: int = 2
    """CPU threads; sums are split by thread, so the exact bytes depend on it."""

    def __post_init__(self) -> None:
        _check_types(self)
        try:
            Site.parse(self.site)
        except InvalidRequest as error:
            raise BadConfig(str(error)) from error
        positive = ("tokens", "n_features", "epochs", "batch", "lr", "eval_tokens", "threads")
        for name in (*positive, "max_norm_ratio", "holdout_every"):
            if not getattr(self, name) > 0:
                raise BadConfig(f"{name} is {getattr(self, name)}, it must be above 0")
        for name in ("alpha", "skip_positions"):
            if not getattr(self, name) >= 0:
                raise BadConfig(f"{name} is {getattr(self, name)}, it must not be negative")
        if self.context < self.skip_positions + 2:
            raise BadConfig(
                f"context is {self.context}; with skip_positions {self.skip_positions} it must be "
                f"at least {self.skip_positions + 2}"
            )
        if not self.corpus or not all(share > 0 for share in self.corpus.values()):
            raise BadConfig("corpus needs at least one entry, each with a share above 0")

    def digest(self, names: Sequence[str]) -> str:
        """Twelve hexadecimal digits that stand for the values of `names`."""
        content = {name: asdict(self)[name] for name in names}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def harvest_digest(self) -> str:
        """The same for all runs that use the same activations."""
        return self.digest(HARVEST_FIELDS)

    @property
    def digest_of_all(self) -> str:
        """The same for all runs that end in the same weights."""
        return self.digest([field.name for field in fields(self) if field.name != "out"])


def load(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a TOML file, with `key=value` overrides whose values are TOML too.

    A value that is not TOML is taken as text: `site=resid_post.3` needs no quotes.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path} cannot be read: {error}") from error
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise BadConfig(f"--set {override!r} is not key=value")
        content[key.strip()] = _toml_value(value.strip())
    return from_mapping(content)


def from_mapping(content: Mapping[str, Any]) -> TrainConfig:
    """As written in a file or in a dictionary's card; BadConfig names every wrong key."""
    known = [field.name for field in fields(TrainConfig)]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise BadConfig(f"unknown keys: {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return TrainConfig(**content)
    except TypeError as error:
        raise BadConfig(str(error).replace("TrainConfig.__init__() ", "")) from error


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_types(config: TrainConfig) -> None:
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        assert not isinstance(kind, str | UnionType)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise BadConfig(f"{field.name} is {value!r}; allowed are {allowed}")
            continue
        if kind is float and type(value) is int:
            object.__setattr__(config, field.name, float(value))
            continue
        expected = get_origin(kind) or kind
        if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
            name = "a table" if expected is not kind else kind.__name__
            raise BadConfig(f"{field.name} is {value!r}; it must be {name}")
