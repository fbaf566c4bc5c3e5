"""What the tests of the model share: small models, made-up batches, and the pseudo-random numbers of check values.

N utterances, T frames, C channels, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from zipformer_crctc.config import Config, DataConfig, ModelConfig, TrainConfig
from zipformer_crctc.encoder import DownsampledStack, Stack, Zipformer
from zipformer_crctc.features import LOG_EPS
from zipformer_crctc.layers import EncoderLayer, LayerSizes
from zipformer_crctc.loader import Batch
from zipformer_crctc.model import CtcModel, build_model
from zipformer_crctc.shar import Utterance

BATCH_COUNTS = (0.0, 4000.0, 20000.0)
"""Adjusted batch counts at which training-time randomness is measured."""

SMALL_MODEL = ModelConfig(
    num_encoder_layers=(1,),
    feedforward_dim=(32,),
    num_heads=(2,),
    encoder_dim=(24, 32, 32, 40, 32, 32),
    encoder_unmasked_dim=(16,),
    query_head_dim=(8,),
    value_head_dim=(6,),
    cnn_module_kernel=(7, 7, 5, 5, 5, 7),
    frontend_channels=(4, 8, 16),
    frontend_hidden=24,
)
"""Six stacks with the published frame rates and about 0.1 M parameters."""

LAYER_SIZES = LayerSizes(
    embed_dim=16,
    pos_dim=12,
    num_heads=2,
    query_head_dim=6,
    pos_head_dim=4,
    value_head_dim=5,
    feedforward_dim=24,
    cnn_module_kernel=7,
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def numbers(shape: Sequence[int], r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """u(0, r), u(1, r), ... in [-1, 1), by 64-bit integer arithmetic and so the same on every machine."""
    k = torch.arange(math.prod(shape))
    return (((7919 * k * k + 104729 * k + 1299709 * r + 12345) % 65537).double() / 32768 - 1).to(dtype).view(*shape)


def piecewise_linear(points: Sequence[tuple[float, float]], b: float) -> float:
    """A schedule's value by its definition, written apart from the library's."""
    for (b0, v0), (b1, v1) in itertools.pairwise(points):
        if b0 <= b <= b1:
            return v0 + (v1 - v0) * (b - b0) / (b1 - b0)
    return points[0][1] if b < points[0][0] else points[-1][1]


def assert_rate(hits: int, trials: int, p: float) -> None:
    """The measured rate lies within three standard errors of p; a rate of 0 or 1 must be met exactly."""
    limit = 3.0 * math.sqrt(p * (1.0 - p) / trials)
    assert abs(hits / trials - p) <= limit + 1e-12, f"measured {hits / trials:.5f} of {trials}, want {p:.5f}"


def loud_first_channel(metric: float, channels: int, groups: int = 1) -> Tensor:
    """(frames, groups * channels) of this metric exactly: orthogonal channels, the first of a group louder."""
    # metric = C (a^2 + C - 1) / (a + C - 1)^2 for variances a, 1, 1, ...
    c = float(channels)
    first, second, third = c - metric, -2 * metric * (c - 1), (c - 1) * (c - metric * (c - 1))
    loud = (-second + math.sqrt(second**2 - 4 * first * third)) / (2 * first)
    scales = torch.ones(channels, dtype=torch.float64)
    scales[0] = math.sqrt(loud)
    return torch.cat([torch.diag(scales), -torch.diag(scales)]).repeat(1, groups)


def draw_parameters(module: ModuleT, scale: float = 0.5, seed: int = 0) -> ModuleT:
    """Give every parameter new random values; initial ones leave too many modules close to zero."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, device="cpu"))
    return module


def small_model(vocab_size: int = 11, seed: int = 0, **sizes: object) -> CtcModel:
    """A model of SMALL_MODEL's sizes, or others."""
    torch.manual_seed(seed)
    return build_model(SMALL_MODEL.with_values(sizes), vocab_size)


def small_run(**train: object) -> Config:
    """A configuration around SMALL_MODEL."""
    return Config(SMALL_MODEL, DataConfig(max_duration=40), replace(TrainConfig(), **train))  # type: ignore[arg-type]


def small_encoder(causal: bool = False, chunk_size: int = -1, left_context: int = -1, factor: int = 1) -> Zipformer:
    """One stack of two layers, with weights that let every part matter."""
    torch.manual_seed(0)
    encoder = Zipformer(
        (factor,), (2,), (LAYER_SIZES,), (LAYER_SIZES.embed_dim,), causal, (chunk_size,), (left_context,)
    )
    return draw_parameters(encoder, 0.3).eval()


def stack_of(encoder: Zipformer, index: int) -> Stack:
    """A stack of layers, out of its downsampling if it has one."""
    stack = encoder.encoders[index]
    inner = stack.encoder if isinstance(stack, DownsampledStack) else stack
    assert isinstance(inner, Stack)
    return inner


def encoder_layers(encoder: Zipformer) -> Iterator[tuple[int, int, EncoderLayer]]:
    """(stack, layer in the stack, layer) of every layer."""
    for i in range(len(encoder.encoders)):
        for index, layer in enumerate(stack_of(encoder, i).layers):
            assert isinstance(layer, EncoderLayer)
            yield i, index, layer


def make_batch(features: Tensor, num_frames: Sequence[int], texts: Sequence[str]) -> Batch:
    """A batch as the loader makes it, from features (N, T, 80); frames beyond an utterance become padding."""
    features = features.clone()
    for row, frames in zip(features, num_frames, strict=True):
        row[frames:] = LOG_EPS
    utterances = [
        Utterance(f"utt{i}", frames / 100, frames * 160, text, "", "", "", 0, 0)
        for i, (frames, text) in enumerate(zip(num_frames, texts, strict=True))
    ]
    return Batch(features, torch.tensor(num_frames), utterances)


def random_batch(num_frames: Sequence[int], texts: Sequence[str], seed: int = 0) -> Batch:
    """A batch of noise at the level of speech features."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(num_frames), max(num_frames), 80), generator=generator)
    return make_batch(2.0 * noise - 6.0, num_frames, texts)
