"""The card of a dictionary: what it is, of which model, how it was made and how good it is."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.site import Site
from steer_server.errors import CorruptDictionary

FORMAT_VERSION = 1

# The names in a transformers config that decide whether activations of two models can be compared.
_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


def model_shape(config: object) -> dict[str, Any]:
    """The part of a transformers text config that fixes the model's shape, under its standard names.

    Read from the object and not from config.json, which leaves out defaults and names things its own way.
    """
    return {key: getattr(config, key, None) for key in _CONFIG_KEYS}


def config_digest(shape: Mapping[str, Any]) -> str:
    """sha256 of a model's shape."""
    part = {key: shape.get(key) for key in _CONFIG_KEYS}
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Model:
    """The model whose activations the dictionary describes."""

    id: str
    """Hub id or folder name."""
    revision: str
    """Hub revision, or sha256 of the weights for a folder."""
    config_digest: str
    """As `config_digest` of its shape."""
    weights: str = "trained"
    """`random` for the control of an experiment: a model of that shape that was never trained."""


@dataclass(frozen=True)
class Quality:
    """Measured on held-out text."""

    tokens: int
    l0: float
    """Mean number of active features per token."""
    fvu: float
    """Fraction of variance unexplained: E|x - x_hat|^2 / E|x - E x|^2."""
    delta_ce: float
    """Nats per token that the model loses when x_hat replaces x at the site."""
    dead_share: float
    """Share of features active on no held-out token."""
    pca_fvu: float
    """FVU of PCA with as many components as `l0`, rounded."""
    ce: float | None = None
    """Nats per token of the model as it is; this and what follows is None for dictionaries of before it was measured."""
    ce_recovered: float | None = None
    """1 - delta_ce over what the model loses when 0 replaces x: 1 is perfect, below 0 worse than nothing."""
    kl: float | None = None
    """Mean KL divergence, in nats, of the next token's distribution with x_hat from that without."""
    dense_share: float | None = None
    """Share of features active on more than a tenth of the tokens."""


@dataclass(frozen=True)
class SelfTest:
    """One vector with its activations and reconstruction, as the writer computed them in float32."""

    x: tuple[float, ...] = ()
    features: tuple[int, ...] = ()
    """Indices of the non-zero activations."""
    activations: tuple[float, ...] = ()
    reconstruction: tuple[float, ...] = ()


@dataclass(frozen=True)
class Card:
    """`dictionary.json`."""

    name: str
    model: Model
    site: Site
    d_model: int
    """Width of x, which at an inner site is not that of the model."""
    n_features: int
    architecture: str
    """`tied_relu` (the paper's), `relu`, `jump_relu`, `gated`, `top_k`, `batch_top_k`, `matryoshka` or `directions`.

    It says where the weights come from; what they do is `activation`.
    """
    activation: str
    """An `Activation`."""
    input_scale: float
    center_input: bool
    dtype: str
    self_test: SelfTest = SelfTest()
    """Made when the dictionary is saved."""
    k: int = 0
    """Active features per token of a TopK dictionary; 0 for all others."""
    quality: Quality | None = None
    training: dict[str, Any] = field(default_factory=dict)
    """Corpus, tokens, context length, special-token policy, seed, full trainer config, code version."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every other file of the folder."""
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls,
        dictionary: Dictionary,
        *,
        name: str,
        model: Model,
        site: Site,
        architecture: str,
        dtype: str = "float32",
        **rest: Any,
    ) -> "Card":
        """The card of `dictionary`, with what the dictionary itself says; `rest` are fields by name."""
        return cls(
            name,
            model,
            site,
            dictionary.d_model,
            dictionary.n_features,
            architecture,
            str(dictionary.activation),
            dictionary.input_scale,
            dictionary.center_input,
            dtype,
            k=dictionary.k,
            **rest,
        )

    @property
    def sha256(self) -> str:
        """The dictionary's identity: the sha256 of its weights file."""
        return self.files["weights.safetensors"]

    @cached_property
    def arithmetic(self) -> str:
        """Digest of everything that decides what an edit does to x: equal for equal results only."""
        parts = [self.sha256, str(self.site), self.activation, self.input_scale, self.center_input]
        parts += [self.k]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def to_json(self) -> str:
        content = asdict(self) | {"site": str(self.site)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """The card written as `text`; CorruptDictionary names what is wrong with it."""
        try:
            content = json.loads(text)
            version = content.get("format_version")
            if version != FORMAT_VERSION:
                raise CorruptDictionary(
                    f"dictionary.json has format_version {version!r}; this version reads {FORMAT_VERSION}"
                )
            unknown = sorted(set(content) - {entry.name for entry in fields(cls)})
            if unknown:
                raise CorruptDictionary(f"dictionary.json has unknown keys: {', '.join(unknown)}")
            quality = content.pop("quality", None)
            test = {key: tuple(value) for key, value in content.pop("self_test").items()}
            return cls(
                model=Model(**content.pop("model")),
                site=Site.parse(content.pop("site")),
                quality=Quality(**quality) if quality else None,
                self_test=SelfTest(**test),
                **content,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptDictionary(f"dictionary.json cannot be read: {error!r}") from error
