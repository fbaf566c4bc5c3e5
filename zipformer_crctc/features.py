"""Log-mel filterbank features, equal to lhotse's ``Fbank`` with its default settings.

Shapes: S samples, T frames of 10 ms, F = 80 mel bins, B = 257 frequency bins.
Audio is mono, 16 kHz, float32 in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

SAMPLING_RATE = 16_000
FRAME_LENGTH = 400  # samples, 25 ms
FRAME_SHIFT = 160  # samples, 10 ms
NUM_BINS = 80
LOG_EPS = math.log(1e-10)  # pads feature batches, in training and everywhere else

FFT_LENGTH = 512
LEFT_PAD = (FRAME_LENGTH - FRAME_SHIFT) // 2  # 120 samples: frame t is centred on sample 160 t + 80
PREEMPHASIS = 0.97
_LOW_FREQUENCY = 20.0  # Hz
_HIGH_FREQUENCY = 7600.0  # Hz
FLOOR = torch.finfo(torch.float32).eps  # digital silence becomes log of this, -15.94
BANDS = (
    (slice(0, 17), slice(0, 16)),
    (slice(15, 40), slice(16, 32)),
    (slice(39, 79), slice(32, 48)),
    (slice(76, 142), slice(48, 64)),
    (slice(137, 244), slice(64, 80)),
)
"""Frequency bins and the 16 mel bins they reach: outside of these blocks the filters are zero."""
_FRAMES_PER_BLOCK = 320  # at most; keeps the work arrays (0.6 MB each) inside a core's cache


def num_feature_frames(num_samples: int) -> int:
    """Number of 10 ms frames of ``num_samples`` samples at 16 kHz."""
    return (num_samples + FRAME_SHIFT // 2) // FRAME_SHIFT


class Fbank:
    """80-bin log-mel filterbank (Povey window, pre-emphasis 0.97, no dither, no normalisation).

    ``zero_padded=False``: every waveform is mirrored at its own two ends, alone or in a batch.
    ``zero_padded=True``: ``batch`` first pads with zeros to the longest waveform, as the published system did, so the
    last frame or two of the shorter ones see zeros instead of their mirrored end.
    """

    def __init__(self, zero_padded: bool = False) -> None:
        self.zero_padded = zero_padded

    def __call__(self, waveform: Tensor) -> Tensor:
        """Features (T, 80) float32 of a waveform (S,), T = floor((S + 80) / 160)."""
        if waveform.ndim != 1 or not waveform.is_floating_point():
            raise ValueError(
                f"waveform: shape {tuple(waveform.shape)}, {waveform.dtype}; "
                "pass one channel as a float tensor of shape (samples,) with values in [-1, 1]"
            )
        num_frames = num_feature_frames(waveform.shape[0])
        if num_frames == 0:
            return waveform.new_zeros((0, NUM_BINS), dtype=torch.float32)
        frames = _mirror_edges(waveform.float(), num_frames).unfold(0, FRAME_LENGTH, FRAME_SHIFT)  # (T, 400), views
        num_blocks = -(-num_frames // _FRAMES_PER_BLOCK)
        return torch.cat([log_mel(block, *_constants(block.device)) for block in frames.chunk(num_blocks)])

    def batch(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Features [(T_i, 80)] of several waveforms [(S_i,)], see the class for the treatment of their ends."""
        if not self.zero_padded:
            return [self(waveform) for waveform in waveforms]
        longest = max((waveform.shape[0] for waveform in waveforms), default=0)
        padded = [torch.nn.functional.pad(waveform, (0, longest - waveform.shape[0])) for waveform in waveforms]
        counts = [num_feature_frames(waveform.shape[0]) for waveform in waveforms]
        return [self(waveform)[:count] for waveform, count in zip(padded, counts, strict=True)]

    def mirrored(self, waveform: Tensor) -> Tensor:
        """(S,) with its own mirrored ends, ((T - 1) 160 + 400,): what ``of_mirrored`` takes, T at least 1."""
        return _mirror_edges(waveform.float(), num_feature_frames(waveform.shape[0]))

    def of_mirrored(self, waveforms: Tensor, num_frames: Tensor) -> Tensor:
        """Features (N, T, 80) of mirrored waveforms (N, (T - 1) 160 + 400) that are padded at their ends.

        On the device of the waveforms; equal to ``__call__`` of each, with ln(1e-10) from ``num_frames`` (N,) on.
        """
        if not len(waveforms):
            return waveforms.new_zeros(0, 0, NUM_BINS)
        features = log_mel(waveforms.unfold(1, FRAME_LENGTH, FRAME_SHIFT), *_constants(waveforms.device))
        valid = torch.arange(features.shape[1], device=features.device) < num_frames[:, None]  # (N, T)
        return features.masked_fill(~valid[:, :, None], LOG_EPS)


def log_mel(frames: Tensor, window: Tensor, mel: Sequence[Tensor]) -> Tensor:
    """(..., 400) samples, (400,) window and the filters of each of BANDS to (..., 80).

    Next to a strong tone the weak bins hold little but float32 rounding, so the order of these operations is part
    of the result: it is the reference's (mean, product, difference, window), with no fused multiply-add.
    """
    padded = frames.new_zeros(*frames.shape[:-1], FFT_LENGTH)
    centred = padded[..., :FRAME_LENGTH]
    torch.sub(frames, frames.mean(dim=-1, keepdim=True), out=centred)
    previous = centred * PREEMPHASIS
    centred[..., 1:] -= previous[..., :-1]
    centred[..., 0] -= previous[..., 0]  # a frame knows no earlier sample
    centred *= window
    spectrum = torch.fft.rfft(padded)  # (..., 257) complex
    squares = torch.view_as_real(spectrum).square_()  # all in one go: a sixth of the cost of abs().square()
    power = squares[..., 0] + squares[..., 1]
    energy = power.new_empty(*power.shape[:-1], NUM_BINS)
    for (rows, columns), filters in zip(BANDS, mel, strict=True):
        torch.matmul(power[..., rows], filters, out=energy[..., columns])
    return energy.clamp_(min=FLOOR).log_()


@cache
@torch.inference_mode(False)  # they stay, whatever mode they are first needed in
def _constants(device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The window and the filters of each of BANDS."""
    filters = mel_filters().float()
    return povey_window().to(device), [filters[band].contiguous().to(device) for band in BANDS]


def povey_window() -> Tensor:
    """(400,)"""
    return torch.hann_window(FRAME_LENGTH, periodic=False).pow(0.85)


def mel_filters() -> Tensor:
    """Triangular filters (257, 80), float64: equally spaced and straight on the scale 1127 ln(1 + f/700)."""

    def mel(frequency: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(frequency / 700.0)

    limits = mel(torch.tensor([_LOW_FREQUENCY, _HIGH_FREQUENCY], dtype=torch.float64))
    edges = torch.linspace(float(limits[0]), float(limits[1]), NUM_BINS + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]  # (80,)
    frequencies = torch.arange(FFT_LENGTH // 2 + 1, dtype=torch.float64) * (SAMPLING_RATE / FFT_LENGTH)
    position = mel(frequencies)[:, None]  # (257, 1)
    rising = (position - left) / (centre - left)
    falling = (right - position) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0.0)


def _mirror_edges(waveform: Tensor, num_frames: int) -> Tensor:
    """Both ends mirrored with the edge sample repeated: (S,) to ((T - 1) 160 + 400,)."""
    num_samples = waveform.shape[0]
    total = (num_frames - 1) * FRAME_SHIFT + FRAME_LENGTH
    right_pad = total - num_samples - LEFT_PAD
    if num_samples >= max(LEFT_PAD, right_pad):
        return torch.cat([waveform[:LEFT_PAD].flip(0), waveform, waveform[num_samples - right_pad :].flip(0)])
    # Shorter than the mirror: reflect back and forth.
    index = (torch.arange(total) - LEFT_PAD) % (2 * num_samples)
    return waveform[torch.minimum(index, 2 * num_samples - 1 - index)]
