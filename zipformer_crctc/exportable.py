"""The model as graphs can hold it: tensors in, tensors out, every size free, with or without the features.

The operations of the model that tracing cannot follow, or that graph runtimes run slowly, are replaced by equal ones
while it is exported; the model itself stays as it is. All utterances of a batch get what they get alone.
N utterances, S samples, T feature frames, T' output frames, C channels, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipformer_crctc import activations, attention, encoder, features, frontend, layers, native, norms
from zipformer_crctc.features import FRAME_LENGTH, FRAME_SHIFT
from zipformer_crctc.model import CtcModel
from zipformer_crctc.recogniser import with_silence


class FeatureGraph(nn.Module):
    """Features (N, T, 80) to log-probabilities (N, T', V), in float32 on both sides whatever the model's precision."""

    input_names = ("x", "x_lens")

    def __init__(self, model: CtcModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        if self.model.encoder.causal:
            x, x_lens = with_silence(x, x_lens)
        return self.model(x.to(self.model.encoder_embed.out.weight.dtype), x_lens, isolate=True)


class AudioGraph(nn.Module):
    """Samples (N, S) at 16 kHz in [-1, 1] to log-probabilities (N, T', V).

    At least 9 frames of audio, 1360 samples: the shortest that the model takes.
    """

    input_names = ("audio", "audio_lens")

    def __init__(self, model: CtcModel) -> None:
        super().__init__()
        self.fbank = FbankGraph()
        self.model = FeatureGraph(model)

    def forward(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(self.fbank(audio, audio_lens), self.num_frames(audio_lens))

    @staticmethod
    def num_frames(audio_lens: Tensor) -> Tensor:
        """As `features.num_feature_frames`."""
        return (audio_lens + FRAME_SHIFT // 2) // FRAME_SHIFT


class FbankGraph(nn.Module):
    """`features.Fbank` for a batch, each waveform mirrored at its own ends; the spectrum by a matrix product."""

    window: Tensor
    fourier: Tensor
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(FRAME_LENGTH)[:, None] * torch.arange(features.FFT_LENGTH // 2 + 1)
        angle = (angle % features.FFT_LENGTH).double() * (2 * math.pi / features.FFT_LENGTH)
        self.register_buffer("window", features.povey_window())
        self.register_buffer("fourier", torch.cat([angle.cos(), angle.sin()], dim=1).float())  # (400, 2 * 257)
        self.register_buffer("mel", features.mel_filters().float())

    def forward(self, audio: Tensor, audio_lens: Tensor) -> Tensor:
        num_frames = (audio.shape[1] + FRAME_SHIFT // 2) // FRAME_SHIFT
        start = torch.arange(num_frames) * FRAME_SHIFT - features.LEFT_PAD
        place = (start[:, None] + torch.arange(FRAME_LENGTH)).flatten()  # (T * 400,)
        place = torch.where(place < 0, -1 - place, place)
        place = place.minimum(2 * audio_lens[:, None] - 1 - place).clamp(min=0)  # (N, T * 400)
        frames = audio.gather(1, place).reshape(audio.shape[0], num_frames, FRAME_LENGTH)
        frames = frames - frames.mean(dim=2, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        frames = (frames - features.PREEMPHASIS * previous) * self.window
        real, imaginary = torch.matmul(frames, self.fourier).chunk(2, dim=2)  # (N, T, 257) each
        power = real * real + imaginary * imaginary
        return torch.matmul(power, self.mel).clamp(min=features.FLOOR).log()


def _swoosh(x: Tensor, kind: tuple[float, float]) -> Tensor:
    (shift, offset), wide = kind, x.float()
    return (F.softplus(wide - shift) - 0.08 * wide - offset).to(x.dtype)


def _swoosh_linear(x: Tensor, mask: None, weight: Tensor, bias: Tensor | None, kind: tuple[float, float]) -> Tensor:
    return F.linear(_swoosh(x, kind), weight, bias)


def _gated(x: Tensor, gate: Tensor, kind: str, padding: Tensor | None) -> Tensor:
    y = x * activations._OPENINGS[kind][0](gate)
    return y if padding is None else y.masked_fill(padding.t()[:, :, None], 0.0)


def _bias_norm(x: Tensor, bias: Tensor, log_scale: Tensor, original: Tensor | None, scale: Tensor | None) -> Tensor:
    wide = x.float()
    inverse_rms = (wide - bias).square().mean(-1, keepdim=True).rsqrt()
    y = (wide * (inverse_rms * log_scale.exp())).to(x.dtype)
    return y if original is None or scale is None else original + (y - original) * scale


def _bypass(original: Tensor, x: Tensor, scale: Tensor, repeat: int) -> Tensor:
    return original + (norms._repeated(x, repeat, original.shape[0]) - original) * scale


def _positions(module: attention.RelativePositions, x: Tensor, left_context: int = 0) -> Tensor:
    """The table of `attention.relative_positions` and, for `_align_offsets`, one more row: (1, 2 T, dim)."""
    frames = x.shape[0]
    offsets = torch.arange(2 * frames).float() - (frames - 1)
    width = math.sqrt(module.dim)
    compressed = width * offsets.sign() * torch.log1p(offsets.abs() / width)
    angle = torch.atan(2.0 * math.pi / module.dim * compressed)
    phases = angle[:, None] * torch.arange(1, module.dim // 2 + 1)
    table = torch.stack([phases.cos(), phases.sin()], dim=2).flatten(1)
    table = torch.cat([table[:, :-1], torch.ones_like(table[:, :1])], dim=1)
    return table.to(x.dtype)[None]


def _align_offsets(by_offset: Tensor) -> Tensor:
    """(H, N, T, 2 T) over offsets to (H, N, T, T) over sources: row t begins at column T - 1 - t.

    So each row begins 2 T - 1 places after the one before.
    """
    heads, utterances, frames, _ = by_offset.shape
    rows = by_offset.flatten(2)[..., frames - 1 : -1]  # T (2 T - 1) of 2 T^2
    return rows.reshape(heads, utterances, frames, 2 * frames - 1)[..., :frames]


def _depthwise_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return conv(x.permute(1, 2, 0)).permute(2, 0, 1)


def _chunk_causal_conv(module: layers.ChunkCausalConv, x: Tensor, chunk_size: int, lengths: Tensor) -> Tensor:
    """Chunks may be longer than the utterances here: nothing is known of that when the graph is made."""
    frames, utterances = x.shape[:2]
    past = F.pad(x, (0, 0, 0, 0, module.kernel_size // 2, 0))
    causal = _depthwise_conv(past, module.causal_conv)
    if chunk_size < 0:
        return causal + _depthwise_conv(x, module.chunkwise_conv) * module._edge_scales(frames, lengths)
    chunks = (frames + chunk_size - 1) // chunk_size
    padded = torch.cat([x, x.new_zeros((chunks * chunk_size - frames, *x.shape[1:]))])
    by_chunk = padded.reshape(chunks, chunk_size, utterances, -1).transpose(0, 1).flatten(1, 2)
    within = _depthwise_conv(by_chunk, module.chunkwise_conv).reshape(chunk_size, chunks, utterances, -1)
    within = within * module._edge_scales(chunk_size, lengths.clamp(max=chunk_size))[:, None]
    return causal + within.transpose(0, 1).flatten(0, 1)[:frames]


def _downsample(module: encoder.Downsample, x: Tensor, lengths: Tensor) -> Tensor:
    groups = (x.shape[0] + module.factor - 1) // module.factor
    x = encoder.repeat_last(x, lengths, groups * module.factor)
    x = x.reshape(groups, module.factor, x.shape[1], x.shape[2])
    return (x * module.bias.softmax(dim=0)[:, None, None]).sum(dim=1)


def _unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """As Tensor.unflatten, which the exporter takes for one of fixed sizes."""
    dim = dim % x.dim()
    shape = list(x.shape)
    return x.reshape(*shape[:dim], *sizes, *shape[dim + 1 :])


def _upsample(x: Tensor, factor: int) -> Tensor:
    return x[:, None].expand(-1, factor, -1, -1).flatten(0, 1)


@contextmanager
def exportable_operations() -> Iterator[None]:
    """Within this context the model computes the same, in evaluation mode, by operations that graphs can hold."""
    replaced = [
        (activations._Swoosh, "apply", _swoosh),
        (activations._SwooshLinear, "apply", _swoosh_linear),
        (activations._Gated, "apply", _gated),
        (norms._BiasNormFunction, "apply", _bias_norm),
        (norms._BypassFunction, "apply", _bypass),
        (attention.RelativePositions, "forward", _positions),
        (attention._AlignOffsets, "apply", _align_offsets),
        (encoder.Downsample, "forward", _downsample),
        (norms, "upsample", _upsample),
        (frontend, "check_lengths", lambda features, num_frames: None),
        (frontend, "in_parts", lambda image, hidden_channels: [image]),
        (layers, "depthwise_conv", _depthwise_conv),
        (layers.ChunkCausalConv, "forward", _chunk_causal_conv),
        (Tensor, "unflatten", _unflatten),
    ]
    with ExitStack() as stack:
        stack.enter_context(native.disabled())
        for owner, name, equal in replaced:
            stack.enter_context(mock.patch.object(owner, name, equal))
        yield
