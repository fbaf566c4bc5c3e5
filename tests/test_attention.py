"""Relative positions, attention weights, and the modules that use them."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from small_models import draw_parameters
from zipformer_crctc import native
from zipformer_crctc.attention import (
    AttentionWeights,
    NonlinAttention,
    RelativePositions,
    SelfAttention,
    averaged,
    relative_positions,
    uniform_attention,
)
from zipformer_crctc.schedule import set_batch_count

T, N, C, H = 7, 3, 10, 2

needs_kernels = pytest.mark.skipif(
    not native.suits(torch.zeros(1)), reason="no C kernels: no compiler, or ZIPA_NATIVE=0"
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def attention_weights() -> AttentionWeights:
    return draw_parameters(AttentionWeights(C, 12, H, query_head_dim=5, pos_head_dim=4), 0.4).eval()


def random_weights(heads: int = H) -> Tensor:
    return torch.randn(heads, N, T, T).softmax(-1)


def test_positional_table_check_values() -> None:
    table = relative_positions(9, 48)[0]
    assert table.shape == (17, 48)
    assert table.dtype == torch.float32
    later, earlier = table[8 + 1], table[8 - 4]
    assert later[:4].tolist() == pytest.approx([0.992607, 0.121370, 0.970539, 0.240945], abs=1e-6)
    assert later[46:].tolist() == pytest.approx([-0.975564, 1.0], abs=1e-6)
    assert earlier[:4].tolist() == pytest.approx([0.924172, -0.381976, 0.708189, -0.706022], abs=1e-6)


def test_positional_table_is_its_formula() -> None:
    dim, frames = 12, 40
    table = relative_positions(frames, dim)[0]
    width = math.sqrt(dim)
    for offset in range(-frames + 1, frames):
        distance = width * math.copysign(math.log(abs(offset) + width) - math.log(width), offset)
        angle = math.atan(2 * math.pi * distance / dim)
        want = [f((m + 1) * angle) for m in range(dim // 2) for f in (math.cos, math.sin)]
        want[-1] = 1.0
        assert table[offset + frames - 1].tolist() == pytest.approx(want, abs=2e-6)


def test_left_context_adds_earlier_offsets() -> None:
    assert torch.equal(relative_positions(4, 12, left_context=5)[0], relative_positions(9, 12)[0, : 5 + 4 + 4 - 1])


def test_positions_do_not_depend_on_earlier_calls() -> None:
    positions = RelativePositions(12).eval()
    for frames, left in ((5, 0), (1200, 0), (3, 2), (1300, 4), (1, 0)):
        got = positions(torch.zeros(frames, 1, 1), left)
        assert got.shape == (1, left + 2 * frames - 1, 12)
        assert torch.equal(got, relative_positions(frames, 12, left))
    assert not positions.state_dict()


def test_scores_are_their_formula() -> None:
    """Layout of the projection (queries, keys, positions; heads within each), and offset = source - target."""
    module = attention_weights()
    x, pos_emb = torch.randn(T, N, C), relative_positions(T, 12)
    projected = module.in_proj(x)
    query, key, pos_query = projected[..., :10], projected[..., 10:20], projected[..., 20:]
    pos_key = module.linear_pos(pos_emb[0])  # (2T - 1, H * 4)
    scores = torch.zeros(H, N, T, T)
    for head in range(H):
        own, pos = slice(5 * head, 5 * head + 5), slice(4 * head, 4 * head + 4)
        for n in range(N):
            for target in range(T):
                for source in range(T):
                    content = query[target, n, own] @ key[source, n, own]
                    place = pos_query[target, n, pos] @ pos_key[source - target + T - 1, pos]
                    scores[head, n, target, source] = content + place
    assert torch.allclose(module(x, pos_emb), scores.softmax(-1), atol=1e-6)


def test_gradients_of_the_scores() -> None:
    module = attention_weights().double()
    x, pos_emb = torch.randn(4, 2, C).double().requires_grad_(), relative_positions(4, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: module(*inputs), (x, pos_emb))


def test_large_scores_are_penalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 1e-4 for each unit of a score beyond 25 were part of the loss, in content and positional part together."""
    module = draw_parameters(AttentionWeights(C, 12, 1, 5, 4), 1.5).train()
    module.balance_keys, module.whiten_keys = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    set_batch_count(module, 4000.0)
    monkeypatch.setattr("random.random", lambda: 0.09)
    x, pos_emb = torch.randn(T, 1, C, requires_grad=True), relative_positions(T, 12)
    query, key, pos_query = module.in_proj(x)[:, 0].split([5, 5, 4], dim=-1)
    pos_scores = pos_query @ module.linear_pos(pos_emb[0]).t()  # (T, 2T - 1)
    offsets = torch.arange(T) - torch.arange(T)[:, None] + T - 1
    scores = query @ key.t() + pos_scores.gather(1, offsets)
    over = scores.abs() > 25.0
    assert 3 < over.sum() < T * T - 3
    (want,) = torch.autograd.grad(1e-4 * (scores.abs() - 25.0).relu().sum(), x)
    (got,) = torch.autograd.grad((0.0 * module(x, pos_emb)).sum(), x)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-8)


def test_masked_sources_get_no_weight() -> None:
    module = attention_weights()
    x, pos_emb = torch.randn(T, N, C), relative_positions(T, 12)
    padding = torch.arange(T) >= torch.tensor([7, 4, 1])[:, None]
    forbidden = torch.arange(T) > torch.arange(T)[:, None]  # no later sources
    for attn_mask in (forbidden, forbidden.expand(N, T, T)):
        weights = module(x, pos_emb, padding, attn_mask)
        assert torch.allclose(weights.sum(-1), torch.ones(H, N, T))
        masked = padding[:, None, :] | forbidden
        assert weights.masked_select(masked).max() < 1e-30
        assert (weights.masked_select(~masked) > 0.0).all()


def test_padding_does_not_change_the_weights_of_valid_sources() -> None:
    module = attention_weights()
    x, pos_emb = torch.randn(T, 1, C), relative_positions(T, 12)
    alone = module(x[:4], relative_positions(4, 12))
    padded = module(x, pos_emb, torch.arange(T)[None] >= 4)
    assert torch.allclose(padded[:, :, :4, :4], alone, atol=1e-6)


def test_self_attention_averages_values() -> None:
    module = draw_parameters(SelfAttention(C, H, value_head_dim=6)).eval()
    x, weights = torch.randn(T, N, C), random_weights()
    values = module.in_proj(x)
    averages = torch.cat([torch.einsum("nts,snc->tnc", weights[h], values[..., 6 * h : 6 * h + 6]) for h in (0, 1)], -1)
    assert torch.allclose(module(x, weights), module.out_proj(averages), atol=1e-5)


def test_nonlin_attention_gates_an_average() -> None:
    module = draw_parameters(NonlinAttention(C, 8)).eval()
    x, weights = torch.randn(T, N, C), random_weights(1)
    s, v, y = module.in_proj(x).split(8, dim=-1)
    want = module.out_proj(torch.einsum("nts,snc->tnc", weights[0], s.tanh() * v) * y)
    assert torch.allclose(module(x, weights), want, atol=1e-5)


def test_uniform_attention_spreads_over_allowed_sources() -> None:
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    third = 1 / 3
    want = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [third, third, third]])
    assert torch.allclose(uniform_attention(weights), want)


def test_initial_values() -> None:
    torch.manual_seed(0)
    module = AttentionWeights(256, 48, 4, 32, 4)
    for weight, bound in (
        (module.in_proj.weight, 32**-0.25 / 256**0.5),
        (module.in_proj.bias, 0.1 * 32**-0.25),
        (module.linear_pos.weight, 0.05 / 48**0.5),
        (SelfAttention(256, 4, 12).out_proj.weight, 0.05 / 48**0.5),
        (NonlinAttention(256, 192).out_proj.weight, 0.05 / 192**0.5),
        (NonlinAttention(256, 192).out_proj.bias, 0.005),
        (NonlinAttention(256, 192).in_proj.bias, 1 / 256**0.5),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound * 1.0001
    assert module.linear_pos.bias is None


all_kinds = pytest.mark.parametrize(
    ("masks", "positions", "penalised", "key"),
    [
        ("", True, False, nn.Identity()),
        ("padding", False, False, nn.Identity()),
        ("padding, forbidden", True, True, nn.Identity()),
        ("forbidden, each", True, False, nn.Tanh()),
        ("padding, forbidden, each", False, True, nn.Tanh()),
    ],
)


class Attention(nn.Module):
    """The modules of a layer that share attention weights, with sizes that fill no vector.

    Args:
        positions: whether scores depend on positions.
        penalised: whether large scores are penalised.
        key: what is done with keys.
    """

    def __init__(self, positions: bool, penalised: bool, key: nn.Module) -> None:
        super().__init__()
        self.weights = AttentionWeights(C, 12, H, query_head_dim=17, pos_head_dim=3)
        self.self_attention = SelfAttention(C, H, value_head_dim=5)
        self.nonlin_attention = NonlinAttention(C, 38).eval()
        draw_parameters(self, 0.4)
        self.weights.pos_emb_skip_rate = 0.0 if positions else 1.0  # type: ignore[assignment]
        self.weights.penalty_prob = float(penalised)
        self.weights.balance_keys, self.weights.whiten_keys = nn.Identity(), key  # type: ignore[assignment]
        self.self_attention.eval()

    def forward(self, x: Tensor, pos_emb: Tensor, padding: Tensor | None, forbidden: Tensor | None) -> list[Tensor]:
        """Sequences (T, N, C)."""
        weights = self.weights(x, pos_emb, padding, forbidden)
        once, twice = self.self_attention(x, weights), self.self_attention(x.tanh(), weights)
        return [once, twice, self.nonlin_attention(x, weights[:1]), self.nonlin_attention(x, weights[1:])]


def results(module: Attention, frames: int, utterances: int, masks: str, dtype: torch.dtype) -> list[Tensor]:
    """Weights, sequences, and the gradients of all inputs and parameters that there are."""
    module = module.to(dtype)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    x = torch.randn((frames, utterances, C), generator=generator).to(dtype).requires_grad_()
    pos_emb = relative_positions(frames, 12).to(dtype).requires_grad_()
    padding = forbidden = None
    if "padding" in masks:
        padding = torch.arange(frames) >= torch.linspace(frames, 0.6 * frames, utterances)[:, None]
    if "forbidden" in masks:
        shape = (utterances, frames, frames) if "each" in masks else (frames, frames)
        forbidden = torch.rand(shape, generator=generator) < 0.3
        forbidden[..., -1, :] = True
    sequences = module(x, pos_emb, padding, forbidden)
    total = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in sequences)
    inputs = [x, pos_emb, *module.parameters()]
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return [module.weights(x, pos_emb, padding, forbidden), *sequences, *(grad for grad in grads if grad is not None)]


@needs_kernels
@pytest.mark.parametrize("frames", [1, 7, 63, 130])
@all_kinds
@pytest.mark.parametrize("utterances", [1, 3])
def test_kernels_are_as_good_as_operations(
    frames: int, utterances: int, masks: str, positions: bool, penalised: bool, key: nn.Module
) -> None:
    module = Attention(positions, penalised, key)
    exact = results(module, frames, utterances, masks, torch.float64)
    got = results(module, frames, utterances, masks, torch.float32)
    with native.disabled():
        plain = results(module, frames, utterances, masks, torch.float32)
    assert len(got) == len(plain) == len(exact)
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        # Some gradients are zero but for rounding, like that of the bias of keys: hence the error of the operations.
        error = (theirs - want).abs().max() + 1e-5 * want.abs().max() + 1e-5
        assert (ours - want).abs().max() <= 3.0 * error


@needs_kernels
def test_kernels_ignore_the_number_of_threads() -> None:
    frames = 130
    module = AttentionWeights(C, 12, H, query_head_dim=5, pos_head_dim=4).eval()
    module.in_proj, module.linear_pos = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    shapes = ((frames, N, 2 * H * 5 + H * 4), (1, 2 * frames - 1, H * 4), (frames, N, 12))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    threads, grads = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            averages = averaged(module(*inputs[:2]), inputs[2])
            grads.append(torch.autograd.grad(averages, inputs, torch.ones_like(averages) + averages.detach()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_weights_take_gradients_of_any_operation() -> None:
    """Of averages by all and by some heads, which kernels keep as products, and of other uses."""
    module, x, pos_emb = attention_weights(), torch.randn(T, N, C), relative_positions(T, 12)
    values, factor = torch.randn(T, N, 12), torch.randn(H, N, T, T)
    for others in (False, True):
        grads = []
        for context in (nullcontext(), native.disabled()):
            with context:
                weights = module(x, pos_emb)
                heads = [weights, weights[:1], weights[-1:]] + [weights.flip(0)] * others
                total = torch.stack([averaged(w, values).square().sum() for w in heads]).sum()
                total = total + others * (weights * factor).sum()
                grads.append(torch.autograd.grad(total, [weights, module.in_proj.weight, module.linear_pos.weight]))
        for got, want in zip(*grads, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
