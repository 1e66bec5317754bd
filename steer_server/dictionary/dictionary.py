"""What a dictionary is: encode, decode, and its rows ready for arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer_server.dictionary.linear import linear


class Activation(StrEnum):
    """phi in `f = phi(z)`."""

    RELU = "relu"
    """`f = max(z, 0)`."""
    JUMP_RELU = "jump_relu"
    """`f = z` where it exceeds the feature's threshold (at least 0), else 0. BatchTopK at inference, too."""
    TOP_K = "top_k"
    """`f = max(z, 0)` for the k largest z of a token, else 0. It takes all features to know one."""
    IDENTITY = "identity"
    """`f = z`."""


class FeatureRows(NamedTuple):
    """Features ready to meet raw activations: centring and input scale are folded in.

    `z = x @ encoder.T + bias`; `f = z where z > threshold else 0`; the features' part of the
    reconstruction is `f @ decoder`.
    """

    encoder: Float[Tensor, "features d_model"]
    bias: Float[Tensor, " features"]
    threshold: Float[Tensor, " features"]
    decoder: Float[Tensor, "features d_model"]

    def take(self, index: Int[Tensor, " chosen"]) -> "FeatureRows":
        # tensor[index] wakes torch's threads for however few rows, and waits for one whose core is busy.
        return FeatureRows(*(tensor.index_select(0, index) for tensor in self))

    def encode(
        self,
        x: Float[Tensor, "*batch d_model"],
        *,
        rectified: bool = False,
        packed: Tensor | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """The activations at `x`; of a TopK dictionary those before the k largest are chosen.

        `rectified` says that every threshold is 0: then a ReLU in the product is faster, which may take what is no
        number for 0. `packed` is the encoder as `linear` likes it best.
        """
        z = linear(x, self.encoder, self.bias, rectified, packed)
        # In place: at many rows the memory for two more tables of this size is what takes the time.
        return z if rectified else z.masked_fill_(z <= self.threshold, 0.0)


def keep_largest(
    f: Float[Tensor, "*batch n_features"], k: int
) -> Float[Tensor, "*batch n_features"]:
    """`f` with all but the `k` largest of each row set to 0."""
    values, features = f.topk(min(k, f.shape[-1]), dim=-1)
    return torch.zeros_like(f).scatter(-1, features, values)


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse dictionary of activations `x` at one site.

    Implements:
        z     = (s x - c) W_enc + b_enc,   s = input_scale, c = b_dec if center_input else 0
        f     = phi(z)
        x_hat = (f W_dec + b_dec) / s

    `threshold` belongs to JUMP_RELU and compares with z; `k` to TOP_K.

    Tied and row-normalised (W_enc = W_dec.T, phi = ReLU, b_dec = 0) it is the dictionary of
    "Sparse Autoencoders Find Highly Interpretable Features in Language Models", section 2. With
    phi = identity its rows are plain directions, and ablating one projects it out.
    """

    W_enc: Float[Tensor, "d_model n_features"]
    b_enc: Float[Tensor, " n_features"]
    W_dec: Float[Tensor, "n_features d_model"]
    b_dec: Float[Tensor, " d_model"]
    activation: Activation = Activation.RELU
    input_scale: float = 1.0
    center_input: bool = False
    threshold: Float[Tensor, " n_features"] | None = None
    k: int = 0

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.activation is Activation.JUMP_RELU):
            raise ValueError("a threshold goes with jump_relu, and with nothing else")
        if (self.k > 0) != (self.activation is Activation.TOP_K):
            raise ValueError("k goes with top_k, and with nothing else")

    @property
    def non_negative(self) -> bool:
        """Whether no activation is ever below 0."""
        if self.threshold is not None:
            return bool((self.threshold >= 0).all())
        return self.activation is not Activation.IDENTITY

    @classmethod
    def tied(
        cls,
        rows: Float[Tensor, "n_features d_model"],
        b_enc: Float[Tensor, " n_features"],
        input_scale: float = 1.0,
    ) -> "Dictionary":
        """The paper's dictionary; `rows` are the features, already of unit norm."""
        return cls(rows.T, b_enc, rows, rows.new_zeros(rows.shape[1]), input_scale=input_scale)

    @classmethod
    def gated(
        cls,
        W_gate: Float[Tensor, "d_model n_features"],
        b_gate: Float[Tensor, " n_features"],
        r_mag: Float[Tensor, " n_features"],
        b_mag: Float[Tensor, " n_features"],
        W_dec: Float[Tensor, "n_features d_model"],
        b_dec: Float[Tensor, " d_model"],
        input_scale: float = 1.0,
    ) -> "Dictionary":
        """The Gated SAE of Rajamanoharan et al. 2024 (arXiv 2404.16014), section 3.2, as a JumpReLU.

        With y = (x - b_dec) W_gate, f = 1[y + b_gate > 0] max(exp(r_mag) y + b_mag, 0). For
        z = exp(r_mag) y + b_mag the gate is open where z > b_mag - exp(r_mag) b_gate (their appendix E).
        """
        gain = r_mag.exp()
        threshold = (b_mag - gain * b_gate).clamp(min=0.0)
        return cls(
            W_gate * gain,
            b_mag,
            W_dec,
            b_dec,
            Activation.JUMP_RELU,
            input_scale,
            center_input=True,
            threshold=threshold,
        )

    @classmethod
    def directions(cls, vectors: Float[Tensor, "n_features d_model"]) -> "Dictionary":
        """Directions without an encoder (a probe, DiffMean, PCA, a user's vector).

        The activation of a direction v is its coordinate `x.v/|v|^2`, so ablating one leaves
        exactly the part of x orthogonal to v. Several are ablated independently of each other.
        """
        encoder = vectors / vectors.square().sum(dim=1, keepdim=True)
        zeros = vectors.new_zeros
        return cls(
            encoder.T, zeros(len(vectors)), vectors, zeros(vectors.shape[1]), Activation.IDENTITY
        )

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        return self.W_dec.shape[0]

    @property
    def is_tied(self) -> bool:
        return self.W_enc.T.data_ptr() == self.W_dec.data_ptr() or torch.equal(
            self.W_enc.T, self.W_dec
        )

    @cached_property
    def decoder_norms(self) -> Float[Tensor, " n_features"]:
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def cosines(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " n_features"]:
        """Of the angle between each feature's decoder row and a direction that is not zero."""
        return (self.W_dec @ direction / (self.decoder_norms * direction.norm())).clamp(-1, 1)

    @cached_property
    def rows(self) -> FeatureRows:
        """All features, folded; shares memory with the weights where folding changes nothing."""
        encoder, bias, decoder = self.W_enc.T, self.b_enc, self.W_dec
        if self.center_input:
            bias = bias - self.b_dec @ self.W_enc
        if self.input_scale != 1.0:
            encoder, decoder = encoder * self.input_scale, decoder / self.input_scale
        return FeatureRows(encoder, bias, self._thresholds(), decoder)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_features"]:
        """The features' activations at `x`."""
        f = self.rows.encode(x)
        return keep_largest(f, self.k) if self.k else f

    def encode_features(
        self, x: Float[Tensor, "*batch d_model"], features: Sequence[int]
    ) -> Float[Tensor, "*batch chosen"]:
        """As `encode`, for `features` only; it encodes no others unless the activation needs them."""
        index = torch.tensor(features, dtype=torch.int64, device=self.W_dec.device)
        return self.encode(x)[..., index] if self.k else self.rows.take(index).encode(x)

    def decode(self, f: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction `x_hat` of the vectors whose activations are `f`."""
        return f @ self.rows.decoder + self.b_dec / self.input_scale

    def to(self, where: torch.dtype | torch.device) -> "Dictionary":
        """The same dictionary with weights of that dtype, or on that device; a tied one stays tied in memory."""
        W_dec = self.W_dec.to(where)
        return replace(
            self,
            W_enc=W_dec.T if self.is_tied else self.W_enc.to(where),
            b_enc=self.b_enc.to(where),
            W_dec=W_dec,
            b_dec=self.b_dec.to(where),
            threshold=None if self.threshold is None else self.threshold.to(where),
        )

    def _thresholds(self) -> Float[Tensor, " n_features"]:
        """`f = z` above it, 0 elsewhere; for TopK among the k largest."""
        if self.threshold is not None:
            return self.threshold
        lowest = float("-inf") if self.activation is Activation.IDENTITY else 0.0
        return torch.full_like(self.b_enc, lowest)
