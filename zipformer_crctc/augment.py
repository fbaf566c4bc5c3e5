"""Augmentation of feature matrices inside the training step: time warping and SpecAugment masks.

Source: Park et al., "SpecAugment", Interspeech 2019, section 2, with more time masking as in Yao et al., "CR-CTC:
Consistency regularization on CTC for improved speech recognition", ICLR 2025, section 3.

All random numbers are drawn on the device of the features, or of the generator where one is given.
Dimension legend: N rows (utterances, or views of utterances), T frames of 10 ms, F mel bins, M masks, K taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BICUBIC_A = -0.75
"""Sharpness of the cubic convolution kernel; the value of torch.nn.functional.interpolate."""

FEATURE_MASKS = 2
FEATURE_MASK_BINS = 27
"""Frequency masks have 0 to FEATURE_MASK_BINS - 1 bins."""

FRAME_MASKS = 10
"""Largest number of time masks, times the time mask ratio."""
FRAME_MASK_FRAMES = 100
"""A time mask has fewer frames than this."""
FRAME_MASK_FRACTION = 0.15
"""Sum of the bounds on mask widths as a share of all frames, times the time mask ratio."""


def time_warp(
    features: Tensor, num_frames: Tensor, factor: int = 80, p: float = 0.9, generator: torch.Generator | None = None
) -> Tensor:
    """Stretch the first part of an utterance and squeeze the rest, or the reverse; lengths and padding stay.

    With probability p an utterance of t frames is cut at a frame ``center``, uniform in [factor + 1, t - factor), which
    moves to ``warped``, uniform in [center - factor, center + factor]; both parts are resized by bicubic interpolation
    along time. Utterances of up to 2 * factor + 1 frames stay as they are.

    Args:
        features: (N, T, F), not changed.
        num_frames: (N,) frames of each utterance.
        factor: largest shift in frames; below 1 nothing is warped.
        p: probability for each utterance.
        generator: source of the random numbers.

    Returns:
        (N, T, F)
    """
    if features.ndim != 3 or num_frames.shape != features.shape[:1]:
        raise ValueError(
            f"features of shape {tuple(features.shape)} and num_frames of shape {tuple(num_frames.shape)}: "
            "expected (N, T, F) and (N,)"
        )
    if factor < 1 or features.numel() == 0:
        return features
    lengths = num_frames.to(features.device)
    draws = _uniform((3, len(features)), features, generator)
    center = factor + 1 + _integers(draws[1], lengths - 2 * factor - 1)
    warped = center - factor + _integers(draws[2], torch.full_like(lengths, 2 * factor + 1))
    chosen = (draws[0] <= p) & (lengths - factor > factor + 1) & (warped != center)
    return warp_at(features, lengths, torch.where(chosen, center, 0), torch.where(chosen, warped, 0))


def warp_at(features: Tensor, num_frames: Tensor, center: Tensor, warped: Tensor) -> Tensor:
    """Resize frames [0, center) to ``warped`` frames and [center, t) to t - warped, bicubic, half-pixel centres.

    Args:
        features: (N, T, F).
        num_frames: (N,) t; frames from there on are copied.
        center: (N,) integers below t.
        warped: (N,) integers below t; a row with center = warped is copied.

    Returns:
        (N, T, F)
    """
    num_rows, num_times, num_bins = features.shape
    real = torch.float64 if features.dtype == torch.float64 else torch.float32
    t = torch.arange(num_times, device=features.device)[None, :]  # (1, T)
    center, warped, end = center[:, None], warped[:, None], num_frames[:, None]  # (N, 1)
    late = t >= warped
    first = torch.where(late, center, 0)  # source piece of each output frame: [first, last]
    last = torch.where(late, end, center) - 1
    ratio = torch.where(late, (end - center).to(real) / (end - warped), center.to(real) / warped.clamp(min=1))
    position = ratio * (t - torch.where(late, warped, 0) + 0.5) - 0.5  # within the piece, (N, T)
    left = position.floor()
    weights = _bicubic_weights(position - left).to(features.dtype)  # (N, T, K)
    taps = left.long()[..., None] + torch.arange(-1, 3, device=features.device)
    taps = (taps + first[..., None]).clamp(min=first[..., None]).minimum(last[..., None])
    output = torch.zeros_like(features)
    for k in range(taps.shape[-1]):
        index = taps[..., k].clamp(0, num_times - 1)[..., None].expand(num_rows, num_times, num_bins)
        output.addcmul_(features.gather(1, index), weights[..., k, None])
    moved = (t < end) & (center != warped)
    return torch.where(moved[..., None], output, features)


def spec_augment(
    features: Tensor, time_mask_ratio: float = 2.0, p: float = 0.9, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Mask bands of bins and stretches of frames of each row independently; masks may overlap.

    The padding of a row counts as part of it: masks can fall there, and the fill value is the mean over the whole row.

    Args:
        features: (N, T, F), not changed.
        time_mask_ratio: amount of time masking; 1.0 is the classic one.
        p: probability for each row to be masked at all.
        generator: source of the random numbers.

    Returns:
        the masked features (N, T, F), and the time mask (N, T) bool, True = masked; False in rows left alone.
    """
    if features.ndim != 3:
        raise ValueError(f"features of shape {tuple(features.shape)}: expected (N, T, F)")
    num_rows, num_times, num_bins = features.shape
    if features.numel() == 0:
        return features, torch.zeros(num_rows, num_times, dtype=torch.bool, device=features.device)
    chosen = _uniform((num_rows, 1), features, generator) <= p  # (N, 1)
    bins = _stripes((num_rows, FEATURE_MASKS), num_bins, min(FEATURE_MASK_BINS, num_bins + 1), features, generator)
    count, bound = time_mask_limits(num_times, time_mask_ratio)
    frames = _stripes((num_rows, count), num_times, bound, features, generator)
    bins, frames = bins & chosen, frames & chosen
    mean = features.mean(dim=(1, 2), keepdim=True)
    return torch.where(bins[:, None, :] | frames[:, :, None], mean, features), frames


def time_mask_limits(num_times: int, time_mask_ratio: float) -> tuple[int, int]:
    """Number of time masks in a row of ``num_times`` frames, and the bound that their widths stay below."""
    total = FRAME_MASK_FRACTION * time_mask_ratio * num_times
    count = min(int(FRAME_MASKS * time_mask_ratio), math.ceil(total / FRAME_MASK_FRAMES))
    if count < 1:
        return 0, 1
    return count, max(1, int(min(FRAME_MASK_FRAMES, total // count)))


def _stripes(
    shape: tuple[int, int], size: int, bound: int, features: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Union of M random stripes along an axis of ``size`` places: shape (N, M) -> (N, size) bool.

    Widths are uniform in 0 ... bound - 1, starts uniform over the places where the stripe fits.
    """
    draws = _uniform((2, *shape), features, generator)
    width = _integers(draws[0], torch.full(shape, bound, device=features.device))
    # The last place where a stripe fits, size - width, is left out, as published.
    start = _integers(draws[1], size - width)
    place = torch.arange(size, device=features.device)
    inside = (place >= start[..., None]) & (place < (start + width)[..., None])  # (N, M, size)
    return inside.any(dim=1)


def _bicubic_weights(fraction: Tensor) -> Tensor:
    """Weights of the neighbours at -1, 0, 1 and 2 of a place ``fraction`` past neighbour 0: (...) -> (..., 4)."""
    distance = torch.stack([fraction + 1, fraction, 1 - fraction, 2 - fraction], dim=-1)
    near = ((BICUBIC_A + 2) * distance - (BICUBIC_A + 3)) * distance**2 + 1
    far = ((BICUBIC_A * distance - 5 * BICUBIC_A) * distance + 8 * BICUBIC_A) * distance - 4 * BICUBIC_A
    return torch.where(distance <= 1, near, far)


def _uniform(shape: tuple[int, ...], features: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) on the device of the features."""
    device = features.device if generator is None else generator.device
    return torch.rand(shape, device=device, generator=generator).to(features.device)


def _integers(uniform: Tensor, count: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) to integers in 0 ... count - 1 (0 where count < 1)."""
    # float32 rounds u * count up to count now and then.
    return (uniform * count).long().minimum(count - 1).clamp(min=0)
