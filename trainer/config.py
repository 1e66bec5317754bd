"""What a run is: every choice that decides the bytes of a dictionary, in one frozen table.

A file may list several values of the keys in `SWEPT`; it then stands for a dictionary of each combination, and all
of them are trained in one pass over the same activations.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from steer_server.dictionary.site import Site
from steer_server.errors import InvalidRequest
from trainer.errors import BadConfig

# What the stored activations depend on; runs that share these share the harvest.
HARVEST_FIELDS = (
    "model",
    "weights",
    "corpus",
    "holdout_every",
    "context",
    "skip_positions",
    "max_norm_ratio",
    "tokens",
    "eval_tokens",
    "activation_dtype",
    "source",
    "served_dtype",
    "data_seed",
    "threads",
)
SWEPT = ("site", "architecture", "n_features", "k", "alpha", "lr", "seed")
PASS_FIELDS = (
    *HARVEST_FIELDS,
    "batch",
    "epochs",
    "normalise_input",
    "storage",
    "buffer_rows",
    "parallel",
)
"""What dictionaries that are trained in one pass have in common."""
Architecture = Literal[
    "batch_top_k",
    "top_k",
    "matryoshka",
    "jump_relu",
    "gated",
    "relu",
    "tied_relu",
    "pca",
    "ica",
    "random",
    "basis",
    "diff_mean",
]
Parallel = Literal["data", "features", "members"]
Precision = Literal["float32", "bfloat16"]
BASELINES = ("pca", "ica", "random", "basis", "diff_mean")
"""Directions that are not trained."""
_BY_K = ("batch_top_k", "top_k", "matryoshka")
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "modern": {},
    "paper": {
        "architecture": "tied_relu",
        "loss_reduction": "mean",
        "alpha": 8.6e-4,
        "normalise_input": False,
        "batch": 256,
        "lr": 1e-3,
        "warmup": 0,
        "decay": 0.0,
        "clip": 0.0,
        "aux_k": -1,
        "context": 256,
        "skip_positions": 0,
        "max_norm_ratio": 0.0,
        "activation_dtype": "float16",
    },
}
"""Values of keys that a file does not name, by its `preset`; "modern" are the defaults of `TrainConfig`.

"paper" is arXiv 2309.08600 as its code runs it (`basic_l1_sweep`; its large sweeps have batches of 2048). The alpha is
that of its residual-stream dictionaries with n_features = 2 d_model.
"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The keys of a configuration file."""

    model: str
    """Hugging Face folder or hub id."""
    site: str
    """Stream and layer, such as `resid_post.10`; streams are resid_post, mlp_out, attn_out, and for training only attn_z, mlp_act."""
    corpus: Mapping[str, float]
    """Documents, each path, glob or hub data set with its share of the tokens."""
    out: str
    """Folder of the finished dictionary; its last part is the dictionary's name."""
    weights: Literal["trained", "random"] = "trained"
    """Of the model; `random` is the control, a copy as it was before training, drawn anew with `data_seed`."""
    tokens: int
    """Training tokens to harvest, fewer if the corpus ends before."""
    n_features: int
    """Rows of the dictionary."""
    architecture: Architecture = "batch_top_k"
    """`tied_relu` is the paper's dictionary, `relu` the same untied; those from pca on are directions to compare with."""
    k: int = 0
    """Active features per token: of batch_top_k, top_k and matryoshka, and if not 0 of the directions."""
    alpha: float = 0.0
    """Weight of the sparsity term: L1, or L0 for jump_relu. With `loss_reduction = "mean"` in the unit of the paper's."""
    loss_reduction: Literal["mean", "sum"] = "sum"
    """Squared error summed over d_model, or averaged over it as the paper's code does; of relu and tied_relu."""
    normalise_input: bool = True
    """Scale activations to E|x|^2 = d_model, so that one alpha means the same at every site."""
    epochs: int = 1
    """Passes over the activations, each in a new random order."""
    batch: int = 1024
    """Activations per step."""
    lr: float = 0.0
    """Of Adam; 0 stands for 2e-4 / sqrt(n_features / 16384), and of those with a k in fewer than 100,000 steps for up to ten times that."""
    warmup: int = 100
    """Steps in which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the steps, at the end, in which the learning rate falls to 0."""
    sparsity_warmup: int = 0
    """Steps in which alpha rises from 0."""
    clip: float = 1.0
    """Largest norm of a dictionary's gradient; longer ones are shortened. 0: none is."""
    aux_k: int = 0
    """Dead features that help to explain the error, of those with a k; 0 stands for half of d_model, -1 for none."""
    dead_after: int = 200_000
    """Tokens without activation after which a feature counts as dead."""
    resample_every: int = 0
    """Steps after which dead features begin anew from tokens explained badly, until lr falls; 0: never."""
    precision: Precision = "float32"
    """Of the factors of a step's large products; their sums, weights, gradients and moments are float32. For GPUs."""
    bandwidth: float = 0.25
    """Of the kernel that gives jump_relu's thresholds a gradient; along random directions, scaled activations vary by 1."""
    prefixes: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5)
    """Shares of the features that reconstruct on their own in a matryoshka."""
    ica_rows: int = 100_000
    """Activations that ica is fitted to, drawn at random; each takes 24 bytes of memory per coordinate."""
    context: int = 256
    """Tokens per context; documents are joined by the end-of-sequence token and cut."""
    skip_positions: int = 1
    """Positions left out at the start of each context; position 0 is an attention sink."""
    max_norm_ratio: float = 10.0
    """Activations longer than this many medians are left out: attention sinks at other positions. 0: none are."""
    activation_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the activations as they are kept; a value that overflows stops the harvest."""
    source: Literal["transformers", "vllm"] = "transformers"
    """What runs the model for the harvest; vllm is the serving engine, read as clients read it, of the same sites."""
    served_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model in vLLM, as `steer-server --dtype`; auto makes bfloat16 of float32."""
    storage: Literal["shards", "buffer"] = "shards"
    """`shards` keeps all activations on disk; `buffer` none: the model runs for every epoch, and twice after training."""
    buffer_rows: int = 131_072
    """Activations of each site in the buffer, half of which are drawn and replaced at a time."""
    holdout_every: int = 20
    """Every so many-th document is held out for evaluation."""
    eval_tokens: int = 32768
    """Held-out tokens to evaluate on."""
    seed: int = 0
    """Of the first weights."""
    data_seed: int = 0
    """Of the order of documents and of activations, and of random weights of the model."""
    threads: int = 2
    """CPU threads of a process; sums are split by thread, so the exact bytes depend on it."""
    parallel: Parallel = "data"
    """What the processes of a torchrun divide: each batch, the features of each dictionary, or the dictionaries (members)."""

    def __post_init__(self) -> None:
        check_types(self)
        try:
            Site.parse(self.site)
        except InvalidRequest as error:
            raise BadConfig(str(error)) from error
        positive = (
            "tokens",
            "n_features",
            "epochs",
            "batch",
            "eval_tokens",
            "threads",
            "ica_rows",
            "buffer_rows",
        )
        for name in (*positive, "holdout_every", "bandwidth", "dead_after"):
            if not getattr(self, name) > 0:
                raise BadConfig(f"{name} is {getattr(self, name)}, it must be above 0")
        schedule = ("lr", "warmup", "decay", "sparsity_warmup", "clip", "resample_every")
        for name in ("alpha", "skip_positions", "max_norm_ratio", *schedule):
            if not getattr(self, name) >= 0:
                raise BadConfig(f"{name} is {getattr(self, name)}, it must not be negative")
        if self.context < self.skip_positions + 2:
            raise BadConfig(
                f"context is {self.context}; with skip_positions {self.skip_positions} it must be "
                f"at least {self.skip_positions + 2}"
            )
        if not self.corpus or not all(share > 0 for share in self.corpus.values()):
            raise BadConfig("corpus needs at least one entry, each with a share above 0")
        self._check_source()
        self._check_sparsity()

    def _check_source(self) -> None:
        if self.source != "vllm" and self.served_dtype != "auto":
            raise BadConfig(
                f'served_dtype is {self.served_dtype!r}, which is for source = "vllm"; '
                f"source is {self.source!r}"
            )
        wanted = {"storage": "shards", "weights": "trained"}
        for name, only in wanted.items():
            if self.source == "vllm" and getattr(self, name) != only:
                raise BadConfig(
                    f'{name} is {getattr(self, name)!r}; with source = "vllm" it must be {only!r}'
                )

    def _check_sparsity(self) -> None:
        if self.decay > 1 or not all(0 < share < 1 for share in self.prefixes):
            raise BadConfig("decay and prefixes are shares; they must be below 1")
        if self.architecture in _BY_K and not 0 < self.k <= self.n_features:
            raise BadConfig(
                f"k is {self.k}; {self.architecture} needs one from 1 to n_features, {self.n_features}"
            )
        if self.architecture not in (*_BY_K, *BASELINES) and self.k:
            raise BadConfig(f"k is {self.k}, but {self.architecture} takes alpha instead")

    def learning_rate(self, steps: int) -> float:
        """Of Adam, once warm-up is over, in a training of so many steps.

        The rule of thumb for `lr = 0` is one of trainings of 100,000 steps and more (arXiv 2406.04093).
        """
        if self.lr:
            return self.lr
        usual = 2e-4 / math.sqrt(self.n_features / 16384)
        if self.architecture not in _BY_K:
            return usual
        return usual * max(1.0, min(10.0, math.sqrt(100_000 / steps)))

    def digest(self, names: Sequence[str]) -> str:
        """Twelve hexadecimal digits that stand for the values of `names`."""
        content = {name: asdict(self)[name] for name in names}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def harvest_digest(self) -> str:
        """The same for all runs that use the same activations."""
        return self.digest(HARVEST_FIELDS)


def digest(configs: Sequence[TrainConfig]) -> str:
    """The same for all passes that end in the same weights."""
    names = [field.name for field in fields(TrainConfig) if field.name != "out"]
    together = "".join(config.digest(names) for config in configs)
    return hashlib.sha256(together.encode()).hexdigest()[:12]


def load(path: Path, overrides: Sequence[str] = ()) -> list[TrainConfig]:
    """The dictionaries that a TOML file asks for, with `key=value` overrides whose values are TOML too.

    A value that is not TOML is taken as text: `site=resid_post.3` needs no quotes.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path} cannot be read: {error}") from error
    for text in overrides:
        override(content, text)
    return expand(content)


def override(content: dict[str, Any], text: str) -> None:
    """Sets in `content` what `key=value` says, or `table.key=value`; a value that is not TOML is taken as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise BadConfig(f"--set {text!r} is not key=value")
    *tables, name = (part.strip() for part in key.split("."))
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise BadConfig(f"--set {text!r}: {table} is not a table")
    content[name] = _toml_value(value.strip())


def expand(content: Mapping[str, Any]) -> list[TrainConfig]:
    """One configuration for each combination of the listed values; `out` becomes a folder of theirs."""
    lists = {key: content[key] for key in SWEPT if isinstance(content.get(key), list)}
    for key, values in lists.items():
        if not values or len(set(map(str, values))) < len(values):
            raise BadConfig(f"{key} is {values}; it must list each value once")
    if not lists:
        return [from_mapping(content)]
    found = []
    for values in product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        name = "-".join(
            value if isinstance(value, str) else f"{key}{value}" for key, value in chosen.items()
        )
        out = f"{content.get('out', '')}/{name}"
        found.append(from_mapping({**content, **chosen, "out": out}))
    return found


def from_mapping(content: Mapping[str, Any]) -> TrainConfig:
    """As written in a file or in a dictionary's card; BadConfig names every wrong key."""
    known = [field.name for field in fields(TrainConfig)] + ["preset"]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise BadConfig(f"unknown keys: {', '.join(unknown)}; known are {', '.join(known)}")
    preset = content.get("preset", "modern")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise BadConfig(f"preset is {preset!r}; allowed are {', '.join(PRESETS)}")
    own = {key: value for key, value in content.items() if key != "preset"}
    try:
        return TrainConfig(**{**PRESETS[preset], **own})
    except TypeError as error:
        raise BadConfig(str(error).replace("TrainConfig.__init__() ", "")) from error


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def check_types(config: Any) -> None:
    """BadConfig unless the fields of a dataclass have the types they are declared with; lists become tuples."""
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
        if get_origin(kind) is tuple and isinstance(value, list):
            value = tuple(value)
            object.__setattr__(config, field.name, value)
            wanted = (int, float) if get_args(kind)[0] is float else get_args(kind)[0]
            if not all(isinstance(entry, wanted) for entry in value):
                raise BadConfig(
                    f"{field.name} is {value!r}; it must list {get_args(kind)[0].__name__}"
                )
        expected = get_origin(kind) or kind
        if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
            name = "a table" if expected is not kind else kind.__name__
            raise BadConfig(f"{field.name} is {value!r}; it must be {name}")
