from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_crctc import augment
from zipformer_crctc.augment import spec_augment, time_mask_limits, time_warp, warp_at

BINS = 80


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_rate(hits: int, draws: int, p: float) -> None:
    """Within three standard errors of a probability."""
    assert abs(hits / draws - p) <= 3 * math.sqrt(p * (1 - p) / draws)


def check_mean(values: Tensor, mean: float, std: float) -> None:
    """Within three standard errors of an expectation."""
    assert abs(values.double().mean().item() - mean) <= 3 * std / math.sqrt(values.numel())


def check_uniform(values: Tensor, low: int, high: int) -> None:
    """Integers uniform in [low, high]: bounds, mean, and spread."""
    count = high - low + 1
    assert low <= int(values.min()) and int(values.max()) <= high
    check_mean(values, (low + high) / 2, math.sqrt((count**2 - 1) / 12))
    variance = (count**2 - 1) / 12
    fourth = (count**2 - 1) * (3 * count**2 - 7) / 240
    check_mean((values.double() - (low + high) / 2) ** 2, variance, math.sqrt(fourth - variance**2))


# Time warp


def resize(piece: Tensor, frames: int) -> Tensor:
    """Reference: bicubic resize along time of (T, F)."""
    image = F.interpolate(piece[None, None], size=(frames, piece.shape[1]), mode="bicubic", align_corners=False)
    return image[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_warp_resizes_both_pieces(dtype: torch.dtype) -> None:
    x = torch.randn(4, 300, BINS, generator=generator(1)).to(dtype)
    lengths, center, warped = torch.tensor([300, 250, 220, 164]), torch.tensor([90, 160, 82, 83]), [30, 239, 82, 3]
    got = warp_at(x, lengths, center, torch.tensor(warped))
    for row, (t, c, w) in enumerate(zip(lengths.tolist(), center.tolist(), warped, strict=True)):
        want = torch.cat([resize(x[row, :c], w), resize(x[row, c:t], t - w), x[row, t:]])
        torch.testing.assert_close(got[row], want, atol=1e-9 if dtype == torch.float64 else 1e-3, rtol=0)
    assert torch.equal(got[2], x[2])


def test_time_warp_rate_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuts that time_warp hands on; what becomes of them is tested above."""
    rows, t, factor = 20000, 300, 80
    drawn: list[Tensor] = []

    def record(features: Tensor, num_frames: Tensor, center: Tensor, warped: Tensor) -> Tensor:
        drawn.extend((center, warped))
        return features

    monkeypatch.setattr(augment, "warp_at", record)
    augment.time_warp(torch.zeros(rows, t, 1), torch.full((rows,), t), generator=generator(2))
    center, warped = drawn
    moved = center != warped
    check_rate(int(moved.sum()), rows, 0.9 * (1 - 1 / (2 * factor + 1)))  # a shift of 0 changes nothing
    center, shift = center[moved], (warped - center)[moved]
    check_uniform(center, factor + 1, t - factor - 1)
    check_uniform(torch.where(shift > 0, shift - 1, shift), -factor, factor - 1)  # without the 0
    correlation = torch.corrcoef(torch.stack([center, shift]).double())[0, 1].item()
    assert abs(correlation) <= 3 / math.sqrt(len(center))
    assert bool((warped[moved] >= 1).all()) and bool((warped[moved] < t).all())


def test_time_warp_rate_of_changed_rows() -> None:
    rows = 1000
    x = torch.randn(rows, 170, 2, generator=generator(20))
    changed = (time_warp(x, torch.full((rows,), 170), 20, generator=generator(21)) != x).flatten(1).any(dim=1)
    check_rate(int(changed.sum()), rows, 0.9 * (1 - 1 / 41))


def test_short_utterances_are_not_warped() -> None:
    x = torch.randn(200, 170, 3, generator=generator(3))
    lengths = torch.tensor([161, 162] * 100)
    got = time_warp(x, lengths, p=1.0, generator=generator(4))
    changed = (got != x).flatten(1).any(dim=1)
    assert not changed[::2].any()
    assert changed[1::2].float().mean() > 0.9
    assert torch.equal(got[1::2, 162:], x[1::2, 162:])  # padding stays


def test_time_warp_off() -> None:
    x = torch.randn(8, 300, 3, generator=generator(5))
    lengths = torch.full((8,), 300)
    assert torch.equal(time_warp(x, lengths, factor=0), x)
    assert torch.equal(time_warp(x, lengths, p=0.0, generator=generator(6)), x)
    assert not torch.equal(time_warp(x, lengths, generator=generator(6)), x)
    assert time_warp(x[:0], lengths[:0]).shape == (0, 300, 3)
    with pytest.raises(ValueError, match=r"num_frames of shape \(3,\)"):
        time_warp(x, lengths[:3])


def test_time_warp_is_given_by_the_generator() -> None:
    x, lengths = torch.randn(6, 300, 3), torch.full((6,), 300)
    first = time_warp(x, lengths, generator=generator(7))
    assert torch.equal(first, time_warp(x, lengths, generator=generator(7)))
    assert not torch.equal(first, time_warp(x, lengths, generator=generator(8)))


# SpecAugment


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """(start, width) of each run of True."""
    edges = torch.diff(torch.nn.functional.pad(mask.long(), (1, 1)))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("frames", "ratio", "want"),
    [
        (1000, 2.0, (3, 100)),
        (1001, 2.0, (4, 75)),
        (300, 2.0, (1, 90)),
        (10000, 2.0, (20, 100)),
        (9, 2.0, (1, 2)),
        (1000, 1.0, (2, 75)),
        (1000, 0.0, (0, 1)),
        (1, 2.0, (1, 1)),
    ],
)
def test_number_and_bound_of_time_masks(frames: int, ratio: float, want: tuple[int, int]) -> None:
    assert time_mask_limits(frames, ratio) == want


def test_time_masks() -> None:
    """Rows of 300 frames have one mask, so each can be read off."""
    rows, frames, bound = 6000, 300, 90
    x = torch.randn(rows, frames, 4, generator=generator(10))
    got, mask = spec_augment(x, generator=generator(11))
    assert mask.shape == (rows, frames) and mask.dtype == torch.bool
    widths = mask.sum(dim=1)
    check_rate(int((widths > 0).sum()), rows, 0.9 * (1 - 1 / bound))  # a width of 0 leaves no trace
    seen = mask[widths > 0]
    width, start = seen.sum(dim=1), seen.long().argmax(dim=1)
    assert all(len(runs(row)) == 1 for row in seen[:200])
    check_uniform(width, 1, bound - 1)
    # Uniform over [0, frames - width): compare each start with its own range.
    place = (start + 0.5) / (frames - width)
    assert bool((start < frames - width).all())
    check_mean(place, 0.5, math.sqrt(1 / 12))
    check_mean((place - 0.5) ** 2, 1 / 12, math.sqrt(1 / 180))
    # Masked frames hold the mean of the row, in all bins.
    mean = x.mean(dim=(1, 2))
    torch.testing.assert_close(got[mask], mean[:, None, None].expand(got.shape)[mask])


def test_share_of_masked_frames() -> None:
    """Several masks per row, overlaps included, against the exact expectation."""
    rows, frames = 1500, 1000
    _, mask = spec_augment(torch.zeros(rows, frames, 1), generator=generator(12))
    count, bound = time_mask_limits(frames, 2.0)
    places = torch.arange(frames)
    covered = torch.zeros(frames, dtype=torch.float64)
    for width in range(bound):
        starts = frames - width
        ways = torch.minimum(places, torch.tensor(starts - 1)) - torch.clamp(places - width + 1, min=0) + 1
        covered += ways.clamp(min=0) / starts / bound if width else 0.0
    want = 0.9 * (1 - (1 - covered) ** count).mean().item()
    shares = mask.double().mean(dim=1)
    check_mean(shares, want, shares.std().item())
    assert want == pytest.approx(0.125, abs=0.005)


def test_frequency_masks() -> None:
    """Two masks of 0 to 26 bins; without time masks."""
    rows, frames = 6000, 12
    x = torch.randn(rows, frames, BINS, generator=generator(13))
    got, mask = spec_augment(x, time_mask_ratio=0.0, generator=generator(14))
    assert not mask.any()
    masked = (got != x).all(dim=1)  # (rows, BINS)
    assert torch.equal(masked, (got != x).any(dim=1))  # whole bins
    check_rate(int(masked.any(dim=1).sum()), rows, 0.9 * (1 - 1 / 27**2))
    assert max(masked.sum(dim=1).tolist()) <= 52
    stripes = Counter(len(runs(row)) for row in masked[:1000])
    assert set(stripes) <= {0, 1, 2} and stripes[2] > 300

    places, covered = torch.arange(BINS), torch.zeros(BINS, dtype=torch.float64)
    for width in range(1, 27):
        starts = BINS - width
        ways = torch.minimum(places, torch.tensor(starts - 1)) - torch.clamp(places - width + 1, min=0) + 1
        covered += ways.clamp(min=0) / starts / 27
    rates = 0.9 * (1 - (1 - covered) ** 2)
    shares = masked.double().mean(dim=1)
    check_mean(shares, rates.mean().item(), shares.std().item())
    for place in (0, 10, 40, BINS - 2):
        check_rate(int(masked[:, place].sum()), rows, rates[place].item())
    assert not masked[:, -1].any()  # the last place where a mask fits is never drawn
    mean = x.mean(dim=(1, 2))[:, None, None].expand(x.shape)
    torch.testing.assert_close(got[got != x], mean[got != x])


def test_fill_value_counts_the_padding() -> None:
    x = torch.zeros(40, 300, BINS)
    x[:, 150:] = math.log(1e-10)
    got, mask = spec_augment(x, p=1.0, generator=generator(15))
    torch.testing.assert_close(got[mask], torch.full_like(got[mask], math.log(1e-10) / 2))
    assert mask[:, 150:].any()  # masks fall into the padding, too


def test_rows_are_independent_and_the_input_is_kept() -> None:
    row = torch.randn(1, 400, BINS, generator=generator(16))
    x = row.repeat(2, 1, 1)
    got, mask = spec_augment(x, p=1.0, generator=generator(17))
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(x, row.repeat(2, 1, 1))
    again, same_mask = spec_augment(x, p=1.0, generator=generator(17))
    assert torch.equal(got, again) and torch.equal(mask, same_mask)


def test_spec_augment_off() -> None:
    x = torch.randn(5, 100, BINS)
    got, mask = spec_augment(x, p=0.0)
    assert torch.equal(got, x) and not mask.any()
    assert spec_augment(x[:0])[1].shape == (0, 100)
    with pytest.raises(ValueError, match=r"expected \(N, T, F\)"):
        spec_augment(x[0])
