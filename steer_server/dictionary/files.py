"""The on-disk form of a dictionary: a folder, written whole or not at all, believed only after checks.

dictionary.json        the card
weights.safetensors    W_dec, b_enc; W_enc unless tied; b_dec unless zero; threshold of a JumpReLU
features.safetensors   density, mean, max, quantiles
features.jsonl         labels and evidence, optional
training.jsonl         step, loss, l0, fvu and dead_share now and then in its training, optional
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from steer_server.dictionary.card import Card, SelfTest, config_digest
from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.features import Evidence, FeatureStatistics
from steer_server.dictionary.site import SERVED
from steer_server.errors import CorruptDictionary, DictionaryMismatch

CARD, WEIGHTS, STATISTICS, EVIDENCE, TRAINING = (
    "dictionary.json",
    "weights.safetensors",
    "features.safetensors",
    "features.jsonl",
    "training.jsonl",
)
_SELF_TEST_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class StoredDictionary:
    """A dictionary with everything its folder says of it; weights are float32 in memory."""

    folder: Path
    card: Card
    dictionary: Dictionary
    statistics: FeatureStatistics
    evidence: dict[int, Evidence]
    """By feature; features without evidence are absent."""
    curve: str = ""
    """The lines of its training."""

    @property
    def sha256(self) -> str:
        return self.card.sha256


def save(
    folder: Path,
    card: Card,
    dictionary: Dictionary,
    statistics: FeatureStatistics,
    evidence: Sequence[Evidence] = (),
    curve: str = "",
) -> Card:
    """Writes the folder whole, replacing one that is there, and returns the card with its hashes.

    Weights are stored in `card.dtype`; the self-test is computed from the stored values.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        stored = dictionary.to(getattr(torch, card.dtype))
        safetensors.torch.save_file(_weights(stored), fresh / WEIGHTS)
        table = {name: value.contiguous() for name, value in statistics._asdict().items()}
        safetensors.torch.save_file(table, fresh / STATISTICS)
        if evidence:
            lines = "".join(entry.to_json() + "\n" for entry in evidence)
            (fresh / EVIDENCE).write_text(lines, encoding="utf-8")
        if curve:
            (fresh / TRAINING).write_text(curve, encoding="utf-8")
        hashes = {path.name: _sha256(path) for path in sorted(fresh.iterdir())}
        card = replace(card, files=hashes, self_test=self_test(stored.to(torch.float32)))
        (fresh / CARD).write_text(card.to_json(), encoding="utf-8")
        fresh.chmod(0o755)
        for path in fresh.iterdir():
            path.chmod(0o644)
            _fsync(path)
        _swap(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return card


def load(folder: Path, model_config: Mapping[str, Any] | None = None) -> StoredDictionary:
    """The dictionary in `folder`, after hashes, shapes, finiteness and the self-test agree with its card.

    With the shape of a model (`card.model_shape`) it must also be of that model: DictionaryMismatch otherwise.
    CorruptDictionary for everything else, with the reason.
    """
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise CorruptDictionary(f"{folder} has no {CARD}: not a dictionary folder")
    card = Card.from_json((folder / CARD).read_text(encoding="utf-8"))
    files = _verified(folder, card)
    if model_config is not None:
        check_model(card, model_config)
    # Not mapped: a file that is overwritten in place would change the dictionary that is resident under its old hash.
    dictionary = _dictionary(card, safetensors.torch.load(files.pop(WEIGHTS)))
    _check_self_test(card, dictionary)
    statistics = _statistics(card, files[STATISTICS])
    evidence = _evidence(card, files.get(EVIDENCE, b""))
    curve = files.get(TRAINING, b"").decode()
    return StoredDictionary(folder, card, dictionary, statistics, evidence, curve)


def check_model(card: Card, model_config: Mapping[str, Any], weights: str = "trained") -> None:
    """The card's model has the shape `model_config`, as `card.model_shape` gives it, and such weights."""
    if card.model.weights != weights:
        raise DictionaryMismatch(
            f"dictionary {card.name!r} is of {card.model.id!r} with {card.model.weights} weights, not {weights} ones: "
            "its features mean nothing in this model"
        )
    hidden, layers = model_config.get("hidden_size"), model_config.get("num_hidden_layers")
    if hidden is None or layers is None:
        raise DictionaryMismatch(
            "the model's configuration names no hidden_size or no num_hidden_layers"
        )
    if not card.site.inner and card.d_model != hidden:
        raise DictionaryMismatch(
            f"dictionary {card.name!r} has d_model {card.d_model}, the model {hidden}"
        )
    if card.site.layer >= layers:
        raise DictionaryMismatch(
            f"dictionary {card.name!r} is of site {card.site}, the model has layers 0..{layers - 1}"
        )
    if card.model.config_digest != config_digest(model_config):
        raise DictionaryMismatch(
            f"dictionary {card.name!r} was trained on {card.model.id!r}, "
            "whose configuration is not that of this model"
        )


def check_served(card: Card) -> None:
    """The card's site is one that vLLM exposes; DictionaryMismatch otherwise."""
    if card.site.inner:
        raise DictionaryMismatch(
            f"dictionary {card.name!r} was trained at {card.site}, which vLLM does not expose; served sites are "
            f"{', '.join(SERVED[:-1])} and {SERVED[-1]} of any layer"
        )


def self_test(dictionary: Dictionary) -> SelfTest:
    """A fixed vector, long enough to make features fire, and what the dictionary makes of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(dictionary.d_model, generator=generator) * 10 / dictionary.input_scale
    f = dictionary.encode(x)
    active = f.nonzero().squeeze(1)
    return SelfTest(
        _numbers(x), tuple(active.tolist()), _numbers(f[active]), _numbers(dictionary.decode(f))
    )


def _numbers(vector: Tensor) -> tuple[float, ...]:
    """With as many digits as a float32 has."""
    return tuple(float(f"{value:.9g}") for value in vector.tolist())


def _weights(dictionary: Dictionary) -> dict[str, Tensor]:
    weights = {"W_dec": dictionary.W_dec.contiguous(), "b_enc": dictionary.b_enc}
    if not dictionary.is_tied:
        weights["W_enc"] = dictionary.W_enc.contiguous()
    if dictionary.b_dec.any():
        weights["b_dec"] = dictionary.b_dec
    if dictionary.threshold is not None:
        weights["threshold"] = dictionary.threshold
    return weights


def _dictionary(card: Card, weights: dict[str, Tensor]) -> Dictionary:
    F, D = card.n_features, card.d_model
    try:
        activation = Activation(card.activation)
    except ValueError as error:
        raise CorruptDictionary(f"{card.name!r}: activation {card.activation!r}") from error
    shapes = {"W_dec": (F, D), "b_enc": (F,), "W_enc": (D, F), "b_dec": (D,)}
    required = ["W_dec", "b_enc"]
    if activation is Activation.JUMP_RELU:
        shapes["threshold"] = (F,)
        required.append("threshold")
    if (activation is Activation.TOP_K) != (0 < card.k <= F):
        raise CorruptDictionary(f"{card.name!r}: k is {card.k} with activation {activation}")
    for name in required:
        if name not in weights:
            raise CorruptDictionary(f"{WEIGHTS} of {card.name!r} lacks {name}")
    for name, tensor in weights.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise CorruptDictionary(
                f"{WEIGHTS} of {card.name!r}: {name} has shape {tuple(tensor.shape)}, "
                f"expected {shapes.get(name, 'no such tensor')}"
            )
        if not tensor.isfinite().all():
            raise CorruptDictionary(f"{WEIGHTS} of {card.name!r}: {name} is not finite")
    W_dec = weights["W_dec"].float()
    if not W_dec.any(dim=1).all():
        raise CorruptDictionary(f"{WEIGHTS} of {card.name!r}: a row of W_dec is zero")
    return Dictionary(
        weights["W_enc"].float() if "W_enc" in weights else W_dec.T,
        weights["b_enc"].float(),
        W_dec,
        weights["b_dec"].float() if "b_dec" in weights else W_dec.new_zeros(D),
        activation,
        card.input_scale,
        card.center_input,
        weights["threshold"].float() if "threshold" in weights else None,
        card.k,
    )


def _statistics(card: Card, content: bytes) -> FeatureStatistics:
    table = safetensors.torch.load(content)
    if set(table) != set(FeatureStatistics._fields):
        raise CorruptDictionary(f"{STATISTICS} of {card.name!r} holds {', '.join(sorted(table))}")
    if any(len(value) != card.n_features or not value.isfinite().all() for value in table.values()):
        raise CorruptDictionary(f"{STATISTICS} of {card.name!r} has wrong shapes or is not finite")
    return FeatureStatistics(**table)


def _evidence(card: Card, content: bytes) -> dict[int, Evidence]:
    try:
        entries = [Evidence.from_json(line.decode()) for line in content.splitlines()]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptDictionary(f"{EVIDENCE} of {card.name!r} cannot be read: {error!r}") from error
    if any(not 0 <= entry.feature < card.n_features for entry in entries):
        last = card.n_features - 1
        raise CorruptDictionary(f"{EVIDENCE} of {card.name!r} names a feature outside 0..{last}")
    return {entry.feature: entry for entry in entries}


def _verified(folder: Path, card: Card) -> dict[str, bytes]:
    """The content of the folder's files by name, which is what the card describes."""
    found = {}
    for name in (WEIGHTS, STATISTICS):
        if name not in card.files:
            raise CorruptDictionary(f"the card of {card.name!r} has no hash of {name}")
    if EVIDENCE not in card.files and (folder / EVIDENCE).exists():
        raise CorruptDictionary(f"the card of {card.name!r} has no hash of {EVIDENCE}")
    for name, expected in card.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CorruptDictionary(f"dictionary {card.name!r} lacks {name}")
        found[name] = path.read_bytes()
        if hashlib.sha256(found[name]).hexdigest() != expected:
            raise CorruptDictionary(f"{name} of {card.name!r} is not the file its card describes")
    return found


def _check_self_test(card: Card, dictionary: Dictionary) -> None:
    x = torch.tensor(card.self_test.x)
    if x.shape != (card.d_model,):
        raise CorruptDictionary(f"{card.name!r}: the self-test vector has {len(x)} numbers")
    f = torch.zeros(card.n_features)
    f[list(card.self_test.features)] = torch.tensor(card.self_test.activations)
    expected = torch.tensor(card.self_test.reconstruction)
    got = dictionary.encode(x)
    for what, have, want in (
        ("activations", got, f),
        ("reconstruction", dictionary.decode(got), expected),
    ):
        error = (have - want).abs().max().item()
        if not error <= _SELF_TEST_TOLERANCE * max(1.0, want.abs().max().item()):
            raise CorruptDictionary(
                f"{card.name!r} fails its self-test: {what} differ by {error:.2g}"
            )


def _swap(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
    else:
        old = fresh.with_name(fresh.name + ".old")
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old)
    _fsync(folder.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
