"""Every architecture's hand-written gradient is autograd's, in float64, however many features are active."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import active
from trainer.architectures import ARCHITECTURES
from trainer.product import product
from trainer.step import Hyper, Outcome, Stack
from trainer.top_k import TopK, prefixes

MEMBERS, TOKENS, D, F = 3, 24, 10, 40
ALPHA = torch.tensor([0.02, 0.1, 0.4], dtype=torch.float64)
BAND = 0.4
"""Wide enough that thresholds feel some tokens."""
K = (2, 5, 3)


def hyper(name: str) -> Hyper:
    shares = (0.25, 0.5) if name == "matryoshka" else ()
    return Hyper(ALPHA, K, bandwidth=BAND, prefixes=prefixes(F, shares) if shares else (), aux_k=0)


def case(name: str, shift: float = 0.0) -> tuple[Stack, Tensor]:
    """Parameters away from every symmetry of the start, and a batch."""
    generator = torch.Generator().manual_seed(0)
    members = []
    for _ in range(MEMBERS):
        mean = torch.randn(D, generator=generator)
        members.append(ARCHITECTURES[name].start(F, D, mean, generator))
    p = {key: torch.stack([m[key] for m in members]).double() for key in members[0]}
    noise = {key: torch.randn(v.shape, generator=generator, dtype=v.dtype) for key, v in p.items()}
    p = {key: value + 0.2 * noise[key] for key, value in p.items()}
    if "log_threshold" in p:
        p["log_threshold"] = 0.3 * noise["log_threshold"] - 0.5
    for key in ("b_enc", "b_gate", "b_mag"):
        if key in p:
            p[key] += shift
    if ARCHITECTURES[name].unit_decoder:
        p["W_dec"] /= p["W_dec"].norm(dim=2, keepdim=True)
    x = 1.5 * torch.randn(TOKENS, D, generator=generator, dtype=torch.float64)
    return p, x


class _Step(torch.autograd.Function):
    """1[z > theta] with JumpReLU's pseudo-derivative with respect to theta."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta)
        return (z > theta).to(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        z, theta = ctx.saved_tensors
        kernel = ((z - theta).abs() < BAND / 2).to(z) / BAND
        return None, (-kernel * grad).sum(dim=1, keepdim=True)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta)
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, theta = ctx.saved_tensors
        kernel = ((z - theta).abs() < BAND / 2).to(z) / BAND
        return grad * (z > theta), (-theta * kernel * grad).sum(dim=1, keepdim=True)


def reference(name: str, p: Stack, x: Tensor, h: Hyper) -> Tensor:
    """The losses of all members, from the architectures' formulas."""
    n = len(x)
    alpha = h.alpha[:, None]
    if name == "tied_relu":
        W = p["M"] / p["M"].norm(dim=2, keepdim=True)
        f = torch.relu(x @ W.mT + p["b_enc"][:, None])
        squared = (f @ W - x).square()
        error = squared.mean(dim=(1, 2)) if h.mean_over_d else squared.sum(dim=(1, 2)) / n
        return error + h.alpha * f.sum(dim=(1, 2)) / n
    b_dec = p["b_dec"][:, None]
    if name == "relu":
        f = torch.relu(x @ p["W_enc"].mT + p["b_enc"][:, None])
        error = (f @ p["W_dec"] + b_dec - x).square().sum(dim=(1, 2)) / n
        return error + (alpha * (f.sum(dim=1) * p["W_dec"].norm(dim=2))).sum(dim=1) / n
    if name == "jump_relu":
        z = x @ p["W_enc"].mT + p["b_enc"][:, None]
        theta = p["log_threshold"].exp()[:, None]
        f, l0 = _Jump.apply(z, theta), _Step.apply(z, theta)  # type: ignore[misc]
        error = (f @ p["W_dec"] + b_dec - x).square().sum(dim=(1, 2)) / n
        return error + h.alpha * l0.sum(dim=(1, 2)) / n
    if name == "gated":
        y = (x - b_dec) @ p["W_enc"].mT
        gate = y + p["b_gate"][:, None]
        strength = y * p["r_mag"].exp()[:, None] + p["b_mag"][:, None]
        f = torch.relu(strength) * (gate > 0)
        opened = torch.relu(gate)
        error = (f @ p["W_dec"] + b_dec - x).square()
        aside = (opened @ p["W_dec"].detach() + b_dec.detach() - x).square()
        return ((error + aside).sum(dim=(1, 2)) + h.alpha * opened.sum(dim=(1, 2))) / n
    z = (x - b_dec) @ p["W_enc"].mT + p["b_enc"][:, None]
    f = torch.relu(z)
    if name == "top_k":
        limit = torch.stack([f[e].topk(k, dim=1).values[:, -1:] for e, k in enumerate(K)])
    else:
        limit = torch.stack([f[e].flatten().topk(k * n).values[-1:, None] for e, k in enumerate(K)])
    f = f * (f >= limit)
    ends = h.prefixes or (F,)
    variance = (x - x.mean(dim=0)).square().sum()
    errors = [(f[:, :, :m] @ p["W_dec"][:, :m] + b_dec - x).square().sum(dim=(1, 2)) for m in ends]
    return torch.stack(errors).mean(dim=0) / variance


def along_the_sphere(name: str, p: Stack, gradients: Stack) -> Stack:
    """Gradients with what would change the length of unit rows taken out."""
    if not ARCHITECTURES[name].unit_decoder:
        return gradients
    W, dW = p["W_dec"], gradients["W_dec"]
    return gradients | {"W_dec": dW - (dW * W).sum(dim=2, keepdim=True) * W}


def check(name: str, p: Stack, found: tuple[Outcome, Stack], losses: Tensor, leaves: Stack) -> None:
    outcome, gradients = found
    torch.testing.assert_close(outcome.loss, losses.detach())
    reverse = torch.autograd.grad(losses.sum(), list(leaves.values()))
    expected = along_the_sphere(name, p, dict(zip(leaves, reverse, strict=True)))
    assert set(gradients) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_loss_and_gradient_are_autograds(
    monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    monkeypatch.setattr(active, "SPARSE_SHARE", 0.0 if form == "dense" else 1.0)
    p, x = case(name, shift=-0.5)
    h = replace(hyper(name), mean_over_d=name == "tied_relu")
    leaves = {key: value.clone().requires_grad_() for key, value in p.items()}

    outcome, gradients = ARCHITECTURES[name].step(p, x, h)

    check(name, p, (outcome, gradients), reference(name, leaves, x, h), leaves)
    assert (outcome.l0 > 0).all()
    assert (outcome.l0 < F / 2).all()


@pytest.mark.parametrize("form", ["dense", "sparse", "as on a GPU"])
def test_dead_features_are_drawn_to_the_error(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """AuxK's loss and gradient; the error it explains is taken as given."""
    monkeypatch.setattr(active, "SPARSE_SHARE", 0.0 if form == "dense" else 1.0)
    if form == "as on a GPU":
        monkeypatch.setattr(TopK, "_revive", TopK._revive_all)
    p, x = case("top_k")
    dead = torch.zeros(MEMBERS, F, dtype=torch.bool)
    dead[0, :6] = True
    dead[2, 10:] = True
    h = replace(hyper("top_k"), aux_k=4, dead=dead)
    leaves = {key: value.clone().requires_grad_() for key, value in p.items()}

    found = ARCHITECTURES["top_k"].step(p, x, h)

    z = (x - leaves["b_dec"][:, None]) @ leaves["W_enc"].mT + leaves["b_enc"][:, None]
    given = z.detach().relu()
    f = given * (given >= torch.stack([given[e].topk(k).values[:, -1:] for e, k in enumerate(K)]))
    error = (x - p["b_dec"][:, None] - f @ p["W_dec"]).detach()
    losses = reference("top_k", leaves, x, h)
    among_dead = z.relu() * dead[:, None]
    strongest = among_dead.topk(4, dim=2)
    aux = torch.zeros_like(z).scatter(2, strongest.indices, strongest.values) @ leaves["W_dec"]
    share = (aux - error).square().sum(dim=(1, 2)) / error.square().sum(dim=(1, 2))
    losses = losses + h.aux_weight * share * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    # The gradient of b_dec within AuxK's encoding counts, too; the error's does not.
    check("top_k", p, found, losses, leaves)


def test_the_papers_dictionary_starts_xavier_uniform_with_no_bias() -> None:
    start = ARCHITECTURES["tied_relu"].start(400, 100, torch.ones(100), torch.Generator())

    bound = (6 / 500) ** 0.5
    assert set(start) == {"M", "b_enc"}
    assert not start["b_enc"].any()
    assert 0.999 * bound < start["M"].abs().max().item() <= bound
    assert start["M"].std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("name", ["tied_relu", "matryoshka", "jump_relu", "gated"])
def test_a_step_in_bfloat16_is_close_and_keeps_float32(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(active, "SPARSE_SHARE", 0.0)
    p, x = case(name)
    p, x = {key: value.float() for key, value in p.items()}, x.float()
    # Far from all thresholds, rounding turns no feature on or off.
    exact = replace(hyper(name), alpha=ALPHA.float(), k=(F,) * MEMBERS)
    p |= {key: p[key] + 30 for key in ("b_enc", "b_gate", "b_mag") if key in p}

    want, exact_gradients = ARCHITECTURES[name].step(p, x, exact)
    got, gradients = ARCHITECTURES[name].step(p, x, replace(exact, precision="bfloat16"))

    for key, gradient in exact_gradients.items():
        off = (gradients[key] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert gradients[key].dtype == torch.float32
        assert off < 0.02, key
    assert (got.loss != want.loss).any()
    torch.testing.assert_close(got.loss, want.loss, rtol=0.02, atol=0)


def test_a_product_in_bfloat16_rounds_its_factors_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 50, 50, generator=generator)
    shared = a[:1].expand(3, -1, -1)

    for left in (a, shared):
        want = left.bfloat16().double() @ b.bfloat16().double()
        torch.testing.assert_close(product(left, b, "bfloat16").double(), want, rtol=0, atol=1e-4)
        assert torch.equal(product(left, b, "float32"), left @ b)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_what_is_exported_encodes_and_decodes_as_in_training(name: str) -> None:
    p, x = case(name, shift=-0.5)
    p, x, scale = {key: value.float() for key, value in p.items()}, x.float(), 0.7
    h = hyper(name)
    h = replace(h, alpha=h.alpha.float())
    outcome, _ = ARCHITECTURES[name].step({key: v[:1] for key, v in p.items()}, x, one(h))
    exported = ARCHITECTURES[name].dictionary(
        {key: v[0] for key, v in p.items()}, scale, one(h), float(outcome.least_active)
    )

    f = exported.encode(x / scale)

    error = (exported.decode(f) * scale - x).square().sum() / (x - x.mean(dim=0)).square().sum()
    torch.testing.assert_close(error, outcome.fvu[0], rtol=1e-2, atol=1e-4)
    # The smallest activation that BatchTopK lets through lies at the threshold, not above it.
    assert abs(torch.count_nonzero(f) / TOKENS - outcome.l0[0]) <= 1.5 / TOKENS


def one(h: Hyper) -> Hyper:
    """For the first member alone."""
    return replace(h, alpha=h.alpha[:1], k=h.k[:1])


@pytest.mark.parametrize("members", [1, 3])
def test_wide_products_of_every_layout_are_the_products(members: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 256, generator=generator).expand(members, -1, -1)
    W = torch.randn(members, 1024, 256, generator=generator)
    f = torch.randn(members, 40, 1024, generator=generator)
    bias = torch.randn(members, 1024, generator=generator)

    encoded = x.double() @ W.double().mT + bias.double()[:, None]
    for found, expected in (
        (product(x, W.mT, "float32", bias), encoded),
        (product(x, W.mT, "float32"), encoded - bias[:, None]),
        (product(f, W, "float32"), f.double() @ W.double()),
        (
            product(f[:, :, 5:700], W[:, 5:700], "float32"),
            f[..., 5:700].double() @ W[:, 5:700].double(),
        ),
        (product(f.mT, x, "float32"), f.double().mT @ x.double()),
        (
            product(x, W.mT, "bfloat16", bias),
            x.bfloat16().double() @ W.bfloat16().double().mT + bias.double()[:, None],
        ),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
