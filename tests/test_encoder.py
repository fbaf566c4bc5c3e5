"""Stacks, their frame rates and their wiring; chunks."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_models import LAYER_SIZES, draw_parameters, encoder_layers, small_encoder, small_model
from zipformer_crctc.encoder import (
    Downsample,
    DownsampledStack,
    Stack,
    Zipformer,
    chunk_attention_mask,
    left_context_chunks,
)
from zipformer_crctc.layers import EncoderLayer
from zipformer_crctc.model import padding_mask
from zipformer_crctc.norms import upsample

FACTORS = (1, 2, 4, 8, 4, 2)
DIMS = (24, 32, 32, 40, 32, 32)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


class Recorder(nn.Module):
    """Stands for a stack or a layer: returns its input and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        self.calls.append((x, *args))
        return x


def test_downsampling_weighs_groups_and_repeats_the_last_frame() -> None:
    module = Downsample(3)
    x = torch.arange(7.0)[:, None, None].expand(7, 2, 4)
    assert torch.allclose(module(x)[:, 0, 0], torch.tensor([1.0, 4.0, 6.0]))
    with torch.no_grad():
        module.bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    assert torch.allclose(module(x)[:, 1, 3], torch.tensor([1.1, 4.1, 6.0]))


def test_upsampling_repeats() -> None:
    assert upsample(torch.tensor([[[1.0]], [[2.0]]]), 3).flatten().tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("frames", [5, 8])
def test_downsampled_stack_is_combined_with_its_input(frames: int) -> None:
    layers = [EncoderLayer(LAYER_SIZES) for _ in range(2)]
    stack = draw_parameters(DownsampledStack(Stack(layers, 12), 16, 4), 0.3).eval()
    x = torch.randn(frames, 2, 16)
    padding = torch.zeros(2, 2, dtype=torch.bool)
    low = stack.downsample(x)
    pos_emb = stack.encoder.positions(low)
    for layer in layers:
        low = layer(low, pos_emb, -1, None, padding)
    high = torch.stack([low[t // 4] for t in range(frames)])
    want = x + (high - x) * stack.out_combiner.bypass_scale
    assert torch.allclose(stack(x, -1, None, None, padding), want, atol=1e-6)


def test_channels_are_cut_or_padded_between_stacks_and_pieced_together_at_the_end() -> None:
    model = draw_parameters(small_model(), 0.2).eval()
    encoder = model.encoder
    inputs: list[Tensor] = []
    for stack in encoder.encoders:
        stack.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    x = torch.randn(20, 2, 24)
    outputs = encoder.stack_outputs(x)
    assert [output.shape[-1] for output in outputs] == list(DIMS)
    for previous, given, dim in zip([x, *outputs], inputs, DIMS, strict=False):
        shared = min(dim, previous.shape[-1])
        assert given.shape[-1] == dim
        assert torch.equal(given[..., :shared], previous[..., :shared])
        assert not given[..., shared:].any()
    y, lengths = encoder(x, torch.tensor([20, 13]))
    assert torch.equal(y, torch.cat([outputs[5], outputs[3][..., 32:]], dim=-1))
    assert lengths.tolist() == [20, 13]


def test_the_last_stack_that_has_a_channel_gives_it() -> None:
    model = small_model(encoder_dim=(40, 36, 28, 32, 24, 28))
    outputs = [torch.full((1, 1, dim), float(i)) for i, dim in enumerate((40, 36, 28, 32, 24, 28))]
    pieces = [5.0] * 28 + [3.0] * 4 + [1.0] * 4 + [0.0] * 4
    assert model.encoder._combine(outputs).flatten().tolist() == pieces


def test_output_downsampling_rounds_lengths_up() -> None:
    encoder = Zipformer((1,), (1,), (LAYER_SIZES,), (16,), output_downsampling_factor=2).eval()
    y, lengths = encoder(torch.randn(7, 2, 16), torch.tensor([7, 4]))
    assert y.shape == (4, 2, 16)
    assert lengths.tolist() == [4, 2]


def test_masks_and_chunks_of_each_stack() -> None:
    """The padding mask takes the first frame of each group; chunks are counted at the stack's own rate."""
    model = small_model(causal=True, chunk_size=(16,), left_context_frames=(32,)).eval()
    layers = [Recorder() for _ in FACTORS]
    for i, _, _ in encoder_layers(model.encoder):
        stack = model.encoder.encoders[i]
        inner = stack.encoder if isinstance(stack, DownsampledStack) else stack
        assert isinstance(inner, Stack)
        inner.layers = nn.ModuleList([layers[i]])
    padding = padding_mask(torch.tensor([50, 33]), 50)
    model.encoder(torch.randn(50, 2, 24), torch.tensor([50, 33]), padding)
    full_rate = chunk_attention_mask(50, 16, 2)
    for recorder, factor in zip(layers, FACTORS, strict=True):
        ((x, pos_emb, chunk_size, attn_mask, key_padding_mask, _),) = recorder.calls
        frames = -(-50 // factor)
        assert x.shape[0] == frames
        assert pos_emb.shape[1] == 2 * frames - 1
        assert chunk_size == 16 // factor
        assert torch.equal(attn_mask, full_rate[::factor, ::factor])
        assert torch.equal(key_padding_mask, padding[:, ::factor])


@pytest.mark.parametrize(("chunk_size", "left_frames"), [(1, 0), (4, -1), (4, 0), (4, 4), (4, 11), (8, 16), (50, 8)])
def test_chunk_mask_is_its_rule(chunk_size: int, left_frames: int) -> None:
    left_chunks = left_context_chunks(chunk_size, left_frames)
    assert left_chunks == (-1 if left_frames < 0 else max(1, left_frames // chunk_size))
    mask = chunk_attention_mask(21, chunk_size, left_chunks)
    for target in range(21):
        for source in range(21):
            behind = target // chunk_size - source // chunk_size
            allowed = behind >= 0 and (left_chunks < 0 or behind <= left_chunks)
            assert bool(mask[target, source]) is not allowed


def test_no_chunks_no_left_context() -> None:
    assert left_context_chunks(-1, 64) == -1


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("left_context", [-1, 8])
def test_later_input_does_not_change_finished_chunks(factor: int, left_context: int) -> None:
    encoder = small_encoder(True, 8, left_context, factor)
    x = torch.randn(40, 2, 16)
    lengths = torch.tensor([40, 40])
    y, _ = encoder(x, lengths)
    for boundary in (8, 16, 32):
        changed = torch.cat([x[:boundary], torch.randn(40 - boundary, 2, 16)])
        other, _ = encoder(changed, lengths)
        assert torch.equal(other[:boundary], y[:boundary])
        assert not torch.allclose(other[boundary:], y[boundary:])
        # and later frames of the chunk at hand do matter
        changed = torch.cat([x[: boundary - 1], torch.randn(41 - boundary, 2, 16)])
        assert not torch.allclose(encoder(changed, lengths)[0][boundary - 8], y[boundary - 8])


def test_finished_chunks_of_a_whole_encoder() -> None:
    model = draw_parameters(small_model(causal=True, chunk_size=(16,), left_context_frames=(64,)), 0.2).eval()
    x, lengths = torch.randn(64, 1, 24), torch.tensor([64])
    y, _ = model.encoder(x, lengths)
    other, _ = model.encoder(torch.cat([x[:32], torch.randn(32, 1, 24)]), lengths)
    assert torch.allclose(other[:32], y[:32], atol=1e-6)
    assert not torch.allclose(other[32:], y[32:], atol=1e-2)


def test_left_context_is_bounded() -> None:
    """A layer attends three times in a row; without its convolutions nothing before as many left contexts is seen."""
    encoder = Zipformer((1,), (1,), (LAYER_SIZES,), (16,), True, (8,), (8,))
    draw_parameters(encoder, 0.3).eval()
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if "depthwise_conv" in name:
                p.zero_()
    x = torch.randn(48, 1, 16, requires_grad=True)
    y, _ = encoder(x, torch.tensor([48]))
    (gradient,) = torch.autograd.grad(y[40:].sum(), x)
    assert not gradient[: 40 - 3 * 8].any()
    assert gradient[40 - 3 * 8 :].abs().amax(dim=(1, 2)).min() > 0.0


@pytest.mark.parametrize(
    ("chunk_size", "left_context", "widest"),
    [((16, 8), (16, 32), (16, 32)), ((16, -1), (16, 32), (-1, -1)), ((16,), (32, -1), (16, -1))],
)
def test_evaluation_takes_the_widest_chunks(
    chunk_size: tuple[int, ...], left_context: tuple[int, ...], widest: tuple[int, int]
) -> None:
    several = draw_parameters(Zipformer((1,), (1,), (LAYER_SIZES,), (16,), True, chunk_size, left_context)).eval()
    one = Zipformer((1,), (1,), (LAYER_SIZES,), (16,), True, widest[:1], widest[1:]).eval()
    one.load_state_dict(several.state_dict())
    x, lengths = torch.randn(50, 1, 16), torch.tensor([50])
    random_state = random.getstate()
    assert torch.equal(several(x, lengths)[0], one(x, lengths)[0])
    assert random.getstate() == random_state


def test_not_causal_means_no_chunks() -> None:
    encoder = Zipformer((1,), (1,), (LAYER_SIZES,), (16,), False, (16, 32), (64, 128)).eval()
    recorder = Recorder()
    encoder.encoders[0] = recorder
    encoder(torch.randn(20, 1, 16), torch.tensor([20]))
    assert recorder.calls[0][1:] == (-1, None, None, None, None)


def test_training_draws_chunks_from_the_lists() -> None:
    encoder = Zipformer((1,), (1,), (LAYER_SIZES,), (16,), True, (4, 8, -1), (8, 32)).train()
    recorder = Recorder()
    encoder.encoders[0] = recorder
    x, lengths = torch.zeros(32, 1, 16), torch.tensor([32])
    for _ in range(1200):
        encoder(x, lengths)
    seen: Counter[tuple[int, int]] = Counter()
    masks = {(c, left): chunk_attention_mask(32, c, left_context_chunks(c, left)) for c in (4, 8) for left in (8, 32)}
    for _, chunk_size, _, attn_mask, *_ in recorder.calls:
        if chunk_size == -1:
            assert attn_mask is None
            seen[-1, -1] += 1
            continue
        fits = [left for left in (8, 32) if torch.equal(masks[chunk_size, left], attn_mask)]
        seen[chunk_size, fits[0]] += 1
    assert seen[-1, -1] == pytest.approx(400, abs=50)
    for chunk_size in (4, 8):
        for left in (8, 32):
            assert seen[chunk_size, left] == pytest.approx(200, abs=40)


def test_layers_of_a_stack_begin_with_different_values() -> None:
    model = small_model(num_encoder_layers=(3,))
    by_stack: dict[int, list[EncoderLayer]] = {}
    for i, _, layer in encoder_layers(model.encoder):
        by_stack.setdefault(i, []).append(layer)
    for layers in by_stack.values():
        assert len(layers) == 3
        for name, first in layers[0].named_parameters():
            values = [dict(layer.named_parameters())[name] for layer in layers]
            if first.dim() >= 2:
                assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2]), name


def test_evaluation_has_no_feature_masks() -> None:
    encoder = small_encoder()
    recorder = Recorder()
    encoder.encoders[0] = recorder
    encoder.eval()(torch.randn(5, 2, 16), torch.tensor([5, 5]))
    assert recorder.calls[0][2] is None
