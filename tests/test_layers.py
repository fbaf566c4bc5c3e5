"""The encoder layer and its parts that do not attend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from small_models import LAYER_SIZES, draw_parameters
from zipformer_crctc.activations import swoosh_l, swoosh_r
from zipformer_crctc.attention import relative_positions
from zipformer_crctc.layers import ChunkCausalConv, ConvModule, EncoderLayer, FeedForward, depthwise_conv
from zipformer_crctc.norms import Bypass

T, N, C = 11, 3, 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_feed_forward_is_its_formula() -> None:
    module = draw_parameters(FeedForward(C, 20, dropout=0.5)).eval()
    x = torch.randn(T, N, C)
    assert torch.allclose(module(x), module.out_proj(swoosh_l(module.in_proj(x))))


@pytest.mark.parametrize("frames", [1, 4, 30])
@pytest.mark.parametrize("kernel", [5, 15])
def test_depthwise_conv_runs_over_time(frames: int, kernel: int) -> None:
    conv = nn.Conv1d(C, C, kernel, padding=kernel // 2, groups=C)
    x = torch.randn(frames, N, C)
    assert torch.allclose(depthwise_conv(x, conv), conv(x.permute(1, 2, 0)).permute(2, 0, 1), atol=1e-6)


def test_conv_module_is_its_formula() -> None:
    module = draw_parameters(ConvModule(C, 5, causal=False)).eval()
    x = torch.randn(T, N, C)
    padding = torch.arange(T) >= torch.tensor([11, 6, 1])[:, None]
    v, gate = module.in_proj(x).split(C, dim=-1)
    u = (v * gate.sigmoid()).permute(1, 2, 0) * ~padding[:, None]
    conv = module.depthwise_conv
    assert isinstance(conv, nn.Conv1d)
    want = module.out_proj(swoosh_r(conv(u).permute(2, 0, 1)))
    assert torch.allclose(module(x, padding), want, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_conv_module_ignores_padding(causal: bool) -> None:
    module = draw_parameters(ConvModule(C, 5, causal)).eval()
    x = torch.randn(T, N, C)
    padding = torch.arange(T) >= torch.tensor([11, 6, 1])[:, None]
    other = torch.where(padding.t()[:, :, None], torch.randn_like(x), x)
    valid = ~padding.t()
    assert torch.equal(module(x, padding)[valid], module(other, padding)[valid])
    assert not torch.allclose(module(x)[valid], module(other)[valid])


def chunk_causal_reference(conv: ChunkCausalConv, x: Tensor, chunk_size: int) -> Tensor:
    """The definition, one position at a time."""
    kernel, half, frames = conv.kernel_size, conv.kernel_size // 2, x.shape[0]
    size = frames if chunk_size < 0 or chunk_size > frames else chunk_size
    scale = conv.chunkwise_conv_scale
    assert conv.causal_conv.bias is not None and conv.chunkwise_conv.bias is not None
    result = torch.zeros_like(x)
    for t in range(frames):
        causal = conv.causal_conv.bias.expand(x.shape[1:]).clone()
        for j in range(half + 1):
            if t - half + j >= 0:
                causal += conv.causal_conv.weight[:, 0, j] * x[t - half + j]
        begin, k = t // size * size, t % size
        within = conv.chunkwise_conv.bias.expand(x.shape[1:]).clone()
        for j in range(kernel):
            if begin <= t - half + j < min(begin + size, frames):
                within += conv.chunkwise_conv.weight[:, 0, j] * x[t - half + j]
        gain = torch.ones(x.shape[2])
        if k < kernel:
            gain = gain + scale[0, :, k]
        if kernel - size + k >= 0:
            gain = gain + scale[1, :, kernel - size + k]
        result[t] = causal + within * gain
    return result


@pytest.mark.parametrize("chunk_size", [-1, 1, 3, 4, 7, 9, 11, 50])
def test_chunk_causal_conv_is_its_formula(chunk_size: int) -> None:
    conv = draw_parameters(ChunkCausalConv(C, 7))
    x = torch.randn(T, N, C)
    assert torch.allclose(conv(x, chunk_size), chunk_causal_reference(conv, x, chunk_size), atol=1e-5)


def test_chunk_causal_conv_begins_with_the_published_values() -> None:
    torch.manual_seed(0)
    conv = ChunkCausalConv(C, 31)
    assert {name: tuple(p.shape) for name, p in conv.named_parameters()} == {
        "causal_conv.weight": (C, 1, 16),
        "causal_conv.bias": (C,),
        "chunkwise_conv.weight": (C, 1, 31),
        "chunkwise_conv.bias": (C,),
        "chunkwise_conv_scale": (2, C, 31),
    }
    assert not conv.chunkwise_conv_scale.any()
    assert conv.causal_conv.bias is not None
    assert conv.causal_conv.bias.abs().max() <= 0.1
    assert 0.9 / 4 < conv.causal_conv.weight.abs().max() <= 1 / 4


def test_bypass_mixes_and_is_not_clipped() -> None:
    bypass = Bypass(4)
    assert bypass.bypass_scale.tolist() == [0.5] * 4
    original, x = torch.randn(T, N, 4), torch.randn(T, N, 4)
    with torch.no_grad():
        bypass.bypass_scale.copy_(torch.tensor([-0.5, 0.0, 1.0, 2.0]))
    want = original + (x - original) * torch.tensor([-0.5, 0.0, 1.0, 2.0])
    for module in (bypass.eval(), bypass.train()):
        assert torch.allclose(module(original, x), want)


def test_sizes_of_a_layer() -> None:
    layer = EncoderLayer(LAYER_SIZES)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    hidden = [shapes[f"feed_forward{i}.in_proj.weight"][0] for i in (1, 2, 3)]
    assert hidden == [18, 24, 30]  # 3/4, 1 and 5/4 of 24
    assert shapes["nonlin_attention.in_proj.weight"] == (36, 16)
    assert shapes["self_attn_weights.in_proj.weight"] == (2 * (2 * 6 + 4), 16)
    assert shapes["bypass_scale"] == shapes["bypass.bypass_scale"] == shapes["bypass_mid.bypass_scale"] == (16,)
    assert list(layer.buffers()) == []


@pytest.mark.parametrize("causal", [False, True])
def test_layer_is_its_table(causal: bool) -> None:
    """All steps in the published order, the attention weights computed from the layer's input."""
    layer = draw_parameters(EncoderLayer(LAYER_SIZES, causal), 0.3).eval()
    x0, pos_emb = torch.randn(T, N, C), relative_positions(T, 12)
    padding = torch.arange(T) >= torch.tensor([11, 6, 2])[:, None]
    attn_mask = torch.arange(T) // 4 > torch.arange(T)[:, None] // 4
    weights = layer.self_attn_weights(x0, pos_emb, padding, attn_mask)
    x = x0 + layer.feed_forward1(x0)
    x = x + layer.nonlin_attention(x, weights[:1])
    x = x + layer.self_attn1(x, weights)
    x = x + layer.conv_module1(x, padding, 4)
    x = x + layer.feed_forward2(x)
    x = x0 + (x - x0) * layer.bypass_mid.bypass_scale
    x = x + layer.self_attn2(x, weights)
    x = x + layer.conv_module2(x, padding, 4)
    x = x + layer.feed_forward3(x)
    x = layer.norm(x)
    want = x0 + (x - x0) * layer.bypass.bypass_scale
    assert torch.allclose(layer(x0, pos_emb, 4, attn_mask, padding), want, rtol=1e-5, atol=1e-5)


def test_layer_ignores_padding() -> None:
    """At the layer's own rate valid frames do not depend on padding; it leaks elsewhere (front-end, downsampling)."""
    layer = draw_parameters(EncoderLayer(LAYER_SIZES), 0.3).eval()
    x, pos_emb = torch.randn(T, N, C), relative_positions(T, 12)
    padding = torch.arange(T) >= torch.tensor([11, 6, 1])[:, None]
    valid = ~padding.t()
    other = torch.where(valid[:, :, None], x, 10 * torch.randn_like(x))
    got, want = layer(other, pos_emb, -1, None, padding), layer(x, pos_emb, -1, None, padding)
    assert torch.allclose(got[valid], want[valid], atol=1e-6)
    alone = layer(x[:6, 1:2], relative_positions(6, 12))
    assert torch.allclose(want[:6, 1], alone[:, 0], atol=1e-5)


def test_initial_values() -> None:
    torch.manual_seed(0)
    for layer, bound in (
        (FeedForward(256, 384).out_proj, 0.1 / 384**0.5),
        (FeedForward(256, 384).in_proj, 1 / 256**0.5),
        (ConvModule(256, 31, False).out_proj, 0.05 / 256**0.5),
        (ConvModule(256, 31, False).in_proj, 1 / 256**0.5),
    ):
        assert 0.95 * bound < layer.weight.abs().max() <= bound * 1.0001
    assert 0.009 < FeedForward(256, 384).out_proj.bias.abs().max() <= 0.01


def test_unused_parameter_gets_no_gradient() -> None:
    layer = EncoderLayer(LAYER_SIZES).eval()
    layer(torch.randn(T, N, C), relative_positions(T, 12)).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == ["bypass_scale"]
