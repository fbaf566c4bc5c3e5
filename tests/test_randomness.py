"""Measured rates of all that is random in training, at three places of the schedules.

Each rate is counted on what a module does to its input, and must lie within three standard errors of its schedule,
whose points stand here a second time. Seeds are fixed, so a test either always passes or never does.
N utterances, T frames, C channels.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from small_models import (
    BATCH_COUNTS,
    LAYER_SIZES,
    assert_rate,
    draw_parameters,
    encoder_layers,
    piecewise_linear,
    random_batch,
    small_model,
    stack_of,
)
from zipformer_crctc.attention import AttentionWeights, relative_positions
from zipformer_crctc.encoder import DownsampledStack
from zipformer_crctc.layers import EncoderLayer, FeedForward
from zipformer_crctc.model import CtcModel
from zipformer_crctc.norms import BiasNorm, Bypass
from zipformer_crctc.products import Linear
from zipformer_crctc.schedule import set_batch_count

UTTERANCES = 20_000
CALLS = 2_500
"""Draws of decisions that are taken once per call."""

Points = tuple[tuple[float, float], ...]
Measure = Callable[[float], tuple[int, int]]
"""From an adjusted batch count to (hits, trials)."""

SKIP: Points = ((0, 0.2), (4000, 0.05), (16000, 0.0))
FF_SKIP: Points = ((0, 0.1), (4000, 0.01), (50000, 0.0))
DROPOUT: Points = ((0, 0.3), (20000, 0.1))


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(1)
    torch.manual_seed(1)


def constant(p: float) -> Points:
    return ((0.0, p),)


def training(module: nn.Module, b: float) -> nn.Module:
    set_batch_count(module, b)
    return module.train()


class Ones(nn.Module):
    """Ones in some channels and zeros in the others, whatever the input."""

    def __init__(self, channels: slice = slice(None), channel_dim: int = -1) -> None:
        super().__init__()
        self.channels, self.channel_dim = channels, channel_dim

    def forward(self, x: Tensor, *_: object) -> Tensor:
        y = torch.zeros_like(x)
        y.transpose(self.channel_dim, -1)[..., self.channels] = 1.0
        return y


class EqualWeights(nn.Module):
    """Attention weights of one head, the same for all sources."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        frames, utterances = x.shape[:2]
        return x.new_full((1, utterances, frames, frames), 1.0 / frames)


def always(layer: nn.Linear | nn.Conv2d, value: float) -> None:
    """Let a layer give this value, whatever its input."""
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, value)


class NoNorm(BiasNorm):
    """Leaves everything as it is."""

    def forward(self, x: Tensor, bypass: tuple[Tensor, Bypass] | None = None) -> Tensor:
        super().forward(x)  # draws
        return x if bypass is None else bypass[1](bypass[0], x)


# Masks per utterance in an encoder layer

PARTS = (
    "feed_forward1",
    "nonlin_attention",
    "self_attn1",
    "conv_module1",
    "feed_forward2",
    "self_attn2",
    "conv_module2",
    "feed_forward3",
)


def show_masks(layer: EncoderLayer) -> EncoderLayer:
    """Replace the parts of a layer, so that its output less its input has in channel i what is kept of part i."""
    for i, name in enumerate(PARTS):
        setattr(layer, name, Ones(slice(i, i + 1)))
    layer.self_attn_weights = EqualWeights()  # type: ignore[assignment]
    layer.norm = NoNorm(layer.bypass_scale.shape[0])
    with torch.no_grad():
        layer.bypass_mid.bypass_scale.fill_(1.0)
        layer.bypass.bypass_scale.fill_(1.0)
    return layer


@torch.no_grad()
def kept(layer: EncoderLayer, b: float) -> dict[str, Tensor]:
    """For each part (N,) bool: the utterances that it was not skipped for."""
    training(layer, b)
    x = torch.zeros(1, UTTERANCES, layer.bypass_scale.shape[0])
    change = layer(x, torch.zeros(1, 1, 1)) - x
    assert set(change.unique().tolist()) <= {0.0, 1.0}
    return {name: change[0, :, i] == 1.0 for i, name in enumerate(PARTS)}


def skip_of(name: str) -> Measure:
    def measure(b: float) -> tuple[int, int]:
        return int((~kept(show_masks(EncoderLayer(LAYER_SIZES)), b)[name]).sum()), UTTERANCES

    return measure


@pytest.mark.parametrize("b", BATCH_COUNTS)
def test_attention_modules_share_a_mask(b: float) -> None:
    masks = kept(show_masks(EncoderLayer(LAYER_SIZES)), b)
    assert masks["feed_forward1"].all()
    assert torch.equal(masks["nonlin_attention"], masks["self_attn1"])
    assert torch.equal(masks["nonlin_attention"], masks["self_attn2"])


def test_other_masks_are_independent() -> None:
    """At b = 0, where two coincide often enough to be counted; the two views of an utterance count as two."""
    masks = kept(show_masks(EncoderLayer(LAYER_SIZES)), 0.0)
    for one, other, both in (
        ("conv_module1", "conv_module2", 0.2 * 0.2),
        ("nonlin_attention", "conv_module1", 0.2 * 0.2),
        ("feed_forward2", "feed_forward3", 0.1 * 0.1),
        ("feed_forward2", "conv_module2", 0.1 * 0.2),
    ):
        assert_rate(int((~masks[one] & ~masks[other]).sum()), UTTERANCES, both)
    first, second = masks["nonlin_attention"].chunk(2)
    assert_rate(int((~first & ~second).sum()), UTTERANCES // 2, 0.2 * 0.2)


# Decisions per call in an encoder layer


class Listener(nn.Module):
    """Takes note of the attention weights it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Tensor] = []

    def forward(self, x: Tensor, attn_weights: Tensor) -> Tensor:
        self.heard.append(attn_weights)
        return torch.zeros_like(x)


class FixedWeights(nn.Module):
    """Two heads over three sources, of which one is masked."""

    weights = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.9, 0.0]])[:, None, None].expand(2, 1, 3, 3)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.weights


@torch.no_grad()
def const_attention(b: float) -> tuple[int, int]:
    layer = training(show_masks(EncoderLayer(LAYER_SIZES)), b)
    nonlin, first, second = Listener(), Listener(), Listener()
    layer.self_attn_weights, layer.nonlin_attention = FixedWeights(), nonlin
    layer.self_attn1, layer.self_attn2 = first, second
    x = torch.zeros(3, 1, 16)
    for _ in range(CALLS):
        layer(x, x)
    assert all(torch.equal(w, FixedWeights.weights) for listener in (first, second) for w in listener.heard)
    uniform, as_is = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.7, 0.3, 0.0])
    hits = 0
    for weights in nonlin.heard:
        assert weights.shape == (1, 1, 3, 3)
        is_uniform = torch.equal(weights[0, 0, 0], uniform)
        assert is_uniform or torch.equal(weights[0, 0, 0], as_is)
        hits += is_uniform
    return hits, CALLS


def attention_weights(b: float) -> AttentionWeights:
    module = draw_parameters(AttentionWeights(6, 12, 2, 3, 4), 1.0)
    training(module, b)
    return module


@torch.no_grad()
def positional_skip(b: float) -> tuple[int, int]:
    module = attention_weights(b)
    x, pos_emb = torch.randn(3, 1, 6), relative_positions(3, 12)
    with_positions = module.eval()(x, pos_emb)
    without = module(x, torch.zeros_like(pos_emb))
    assert not torch.allclose(with_positions, without, atol=1e-2)
    module.train()
    hits = 0
    for _ in range(CALLS):
        weights = module(x, pos_emb)
        skipped = torch.allclose(weights, without)
        assert skipped or torch.allclose(weights, with_positions)
        hits += skipped
    return hits, CALLS


def score_penalty(b: float) -> tuple[int, int]:
    """With no gradient from the loss, the penalty's is all there is."""
    module = attention_weights(b)
    x, pos_emb = torch.randn(3, 1, 6), relative_positions(3, 12)
    with torch.no_grad():
        module.linear_pos.weight.zero_()
        query, key = (y.unflatten(-1, (2, 3)) for y in module.in_proj(x)[:, 0, :12].split(6, dim=-1))
        largest = torch.einsum("thc,shc->hts", query, key).abs().max()
        for p in module.in_proj.parameters():
            p.mul_((25.1 / largest).sqrt())  # just beyond the limit
    hits = 0
    for _ in range(CALLS // 2):
        (gradient,) = torch.autograd.grad((0.0 * module(x, pos_emb)).sum(), module.in_proj.weight)
        hits += bool(gradient.any())
    return hits, CALLS // 2


def bias_norm_limiter(b: float) -> tuple[int, int]:
    module = BiasNorm(4)
    training(module, b)
    x = torch.ones(1, 1, 4)
    hits = 0
    for i in range(CALLS):
        upper = i % 2 == 0
        with torch.no_grad():
            module.log_scale.fill_(1.51 if upper else -1.51)
        outwards = -1.0 if upper else 1.0  # a negative gradient makes the parameter grow
        (gradient,) = torch.autograd.grad(module(x).sum() * outwards, module.log_scale)
        hits += bool(gradient * outwards < 0.0)
    return hits, CALLS


def bypass_flips(bypass: Bypass, value: float, outwards: float, calls: int) -> int:
    """How often the gradient of a scale of this value, of the sign given, came out with the other sign."""
    with torch.no_grad():
        bypass.bypass_scale.fill_(value)
    zeros, ones = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    flips = 0
    for _ in range(calls):
        (gradient,) = torch.autograd.grad(bypass(zeros, ones).sum() * outwards, bypass.bypass_scale)
        flips += bool((gradient * outwards < 0.0).all())
    return flips


def bypass_limiter(b: float) -> tuple[int, int]:
    lowest = piecewise_linear(((0, 0.9), (20000, 0.2)), b)
    bypass = Bypass(2)
    training(bypass, b)
    inside = bypass_flips(bypass, lowest + 0.01, 1.0, 50) + bypass_flips(bypass, 0.99, -1.0, 50)
    assert inside == 0
    flips = bypass_flips(bypass, lowest - 0.01, 1.0, CALLS // 2) + bypass_flips(bypass, 1.01, -1.0, CALLS // 2)
    return flips, CALLS


# Dropouts


@torch.no_grad()
def convnext_layer_drop(b: float) -> tuple[int, int]:
    block = small_model().encoder_embed.convnext
    always(block.pointwise_conv2, 1.0)
    training(block, b)
    change = block(torch.zeros(UTTERANCES, block.depthwise_conv.in_channels, 2, 2)).flatten(1)
    assert set(change.unique().tolist()) <= {0.0, 1.0}  # whole utterances, not rescaled
    assert torch.equal(change, change[:, :1].expand_as(change))
    return int((change[:, 0] == 0.0).sum()), UTTERANCES


def dropped_channels(y: Tensor, time_dim: int, p: float, kept_value: float) -> tuple[int, int]:
    """Zeros of a mask that is shared over time and whose other values are rescaled."""
    first = y.select(time_dim, 0)
    assert torch.equal(y, first.unsqueeze(time_dim).expand_as(y))
    values = first[first != 0.0]
    assert torch.allclose(values, torch.full_like(values, kept_value / (1.0 - p)))
    return int((first == 0.0).sum()), first.numel()


SWOOSH_L_OF_1 = math.log(1 + math.exp(-3)) - 0.115


@torch.no_grad()
def frontend_dropout(b: float) -> tuple[int, int]:
    frontend = small_model().encoder_embed
    frontend.out_norm = Ones()  # type: ignore[assignment]
    training(frontend, b)
    y, _ = frontend(torch.zeros(800, 11, 80), torch.full((800,), 11))
    return dropped_channels(y, 1, piecewise_linear(DROPOUT, b), 1.0)


def feed_forward_dropout(name: str) -> Measure:
    @torch.no_grad()
    def measure(b: float) -> tuple[int, int]:
        *_, (_, _, layer) = encoder_layers(small_model().encoder)
        module = getattr(layer, name)
        assert isinstance(module, FeedForward)
        always(module.in_proj, 1.0)
        hidden = module.in_proj.out_features
        module.out_proj = Linear(hidden, hidden, bias=False)
        nn.init.eye_(module.out_proj.weight)
        training(module, b)
        y = module(torch.zeros(2, 4000, module.in_proj.in_features))
        return dropped_channels(y, 0, piecewise_linear(DROPOUT, b), SWOOSH_L_OF_1)

    return measure


@torch.no_grad()
def positional_dropout(b: float) -> tuple[int, int]:
    positions = stack_of(small_model().encoder, 0).positions
    training(positions, b)
    table = relative_positions(300, 48)
    y = positions(torch.zeros(300, 1, 1))
    entries = table.abs() > 1e-6
    dropped = entries & (y == 0.0)
    assert torch.allclose(y[entries & ~dropped], table[entries & ~dropped] / 0.85)
    return int(dropped.sum()), int(entries.sum())


@torch.no_grad()
def head_dropout(b: float) -> tuple[int, int]:
    """Element-wise, before the output layer."""
    model = small_model()
    model.encode = lambda features, num_frames, isolate=False: (torch.ones(50, 20, 40), num_frames)  # type: ignore[method-assign]
    model.ctc_output[1] = nn.Identity()
    training(model, b)
    log_probs, _ = model(torch.zeros(50, 47, 80), torch.full((50,), 20))
    dropped = log_probs < log_probs.amax(-1, keepdim=True) - 0.5
    differences = (log_probs.amax(-1, keepdim=True) - log_probs)[dropped]
    assert torch.allclose(differences, torch.full_like(differences, 1 / 0.9))
    return int(dropped.sum()), dropped.numel()


RATES: dict[str, tuple[Measure, Points]] = {
    "attention skip": (skip_of("self_attn1"), SKIP),
    "conv skip 1": (skip_of("conv_module1"), SKIP),
    "conv skip 2": (skip_of("conv_module2"), SKIP),
    "feed-forward 2 skip": (skip_of("feed_forward2"), FF_SKIP),
    "feed-forward 3 skip": (skip_of("feed_forward3"), FF_SKIP),
    "const attention": (const_attention, ((0, 0.25), (4000, 0.025))),
    "positional skip": (positional_skip, ((0, 0.5), (4000, 0.0))),
    "score penalty": (score_penalty, constant(0.1)),
    "limiter of BiasNorm": (bias_norm_limiter, constant(0.6)),
    "limiter of Bypass": (bypass_limiter, constant(0.6)),
    "ConvNeXt layer-drop": (convnext_layer_drop, ((0, 0.2), (20000, 0.015))),
    "front-end dropout": (frontend_dropout, DROPOUT),
    "feed-forward 1 dropout": (feed_forward_dropout("feed_forward1"), DROPOUT),
    "feed-forward 2 dropout": (feed_forward_dropout("feed_forward2"), DROPOUT),
    "feed-forward 3 dropout": (feed_forward_dropout("feed_forward3"), DROPOUT),
    "positional dropout": (positional_dropout, constant(0.15)),
    "head dropout": (head_dropout, constant(0.1)),
}


@pytest.mark.parametrize("b", BATCH_COUNTS)
@pytest.mark.parametrize("name", RATES)
def test_rate(name: str, b: float) -> None:
    measure, points = RATES[name]
    assert_rate(*measure(b), piecewise_linear(points, b))


# Layer-drop

NUM_LAYERS = (2, 2, 3, 4, 3, 2)
FACTORS = (1, 2, 4, 8, 4, 2)


@pytest.mark.parametrize("b", [*BATCH_COUNTS, 700.0, 2900.0])
def test_layer_drop_of_every_layer(b: float) -> None:
    model = small_model(num_encoder_layers=NUM_LAYERS, encoder_dim=(8,), encoder_unmasked_dim=(4,))
    masks = []
    for i, index, layer in encoder_layers(model.encoder):
        begin, step = 4000 * (i + 1) / 7, 4000 / 7 / NUM_LAYERS[i]
        points = ((begin + index * step, 0.5), (begin + (index + 1) * step, 0.035 * FACTORS[i] ** 0.5))
        mask = kept(show_masks(layer), b)["feed_forward1"]
        assert_rate(int((~mask).sum()), UTTERANCES, piecewise_linear(points, b))
        masks.append(mask)
    assert len(masks) == sum(NUM_LAYERS)
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(masks))


@pytest.mark.parametrize("b", BATCH_COUNTS)
@torch.no_grad()
def test_other_bypasses_drop_nothing(b: float) -> None:
    encoder = small_model().encoder
    bypasses = [layer.bypass_mid for _, _, layer in encoder_layers(encoder)]
    bypasses += [stack.out_combiner for stack in encoder.encoders if isinstance(stack, DownsampledStack)]
    assert len(bypasses) == 11
    for bypass in bypasses:
        training(bypass, b)
        x = torch.ones(1, UTTERANCES, len(bypass.bypass_scale))
        assert torch.equal(bypass(torch.zeros_like(x), x), 0.5 * x)


# Feature masks


def feature_masks(model: CtcModel, b: float) -> list[Tensor]:
    """The mask of each stack (N, C), as seen in its output."""
    encoder = model.encoder
    for i, stack in enumerate(encoder.encoders):
        stack_of(encoder, i).layers = nn.ModuleList([Ones()])
        if isinstance(stack, DownsampledStack):
            stack.out_combiner.bypass_scale.fill_(1.0)
    training(encoder, b)
    outputs = encoder.stack_outputs(torch.zeros(2, UTTERANCES, encoder.encoder_dim[0]))
    assert all(torch.equal(output[0], output[1]) for output in outputs)  # constant over time
    return [output[0] for output in outputs]


@pytest.mark.parametrize("b", BATCH_COUNTS)
@torch.no_grad()
def test_feature_masks(b: float) -> None:
    model = small_model()
    masks = feature_masks(model, b)
    shared = [masks[0][:, 16], masks[0][:, 23]]
    first, second = (int((mask == 0.0).sum()) for mask in shared)
    assert_rate(first, UTTERANCES, 0.125)
    assert_rate(second, UTTERANCES, 1 - 0.875**2)
    assert not (shared[1] > shared[0]).any()  # the second half is only kept where the first is
    for dim, mask in zip(model.encoder.encoder_dim, masks, strict=True):
        middle = 16 + (dim - 16) // 2
        want = [torch.ones(UTTERANCES, 16), shared[0][:, None].expand(-1, middle - 16)]
        want.append(shared[1][:, None].expand(-1, dim - middle))
        assert torch.equal(mask, torch.cat(want, dim=1))
    assert not torch.equal(feature_masks(model, b)[0], masks[0])  # drawn anew in each pass


@torch.no_grad()
def test_feature_masks_also_act_on_the_input_of_a_stack() -> None:
    encoder = training(small_model(), 0.0).get_submodule("encoder")
    heard: list[Tensor] = []
    for name in ("encoders.0.layers.0", "encoders.1.encoder.layers.0"):
        encoder.get_submodule(name).register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    encoder(torch.ones(8, 500, 24), torch.full((500,), 8))
    for x in heard:
        assert x[..., :16].ne(0.0).all()
        assert 0.15 < x[..., -1].eq(0.0).float().mean() < 0.35 or x[..., -1].eq(0.0).all()
    assert_rate(int((heard[0][0, :, 16] == 0.0).sum()), 500, 0.125)


def test_nothing_is_random_in_evaluation() -> None:
    model = draw_parameters(small_model(), 0.2)
    set_batch_count(model, 0.0)
    batch = random_batch([60, 41], ["", ""])
    state = random.getstate(), torch.get_rng_state()

    def outputs() -> Tensor:
        log_probs, _ = model(batch.features, batch.num_frames)
        model.zero_grad()
        log_probs.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model.eval()
    assert torch.equal(outputs(), outputs())
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    model.train()
    assert not torch.equal(outputs(), outputs())
