"""CTC and consistency loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from small_models import numbers
from zipformer_crctc.losses import consistency_loss, ctc_loss, downsample_time_mask

LENGTHS = torch.tensor([12, 9, 12, 9])
TARGETS = [[3, 5, 5], [3, 4], [3, 5, 5], [3, 4]]


def known_log_probs(dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * numbers((4, 12, 6), 3)).log_softmax(-1).to(dtype)


def flat(targets: list[list[int]]) -> tuple[Tensor, Tensor]:
    labels = torch.tensor(list(itertools.chain.from_iterable(targets)), dtype=torch.long)
    return labels, torch.tensor([len(target) for target in targets])


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 2e-8), (torch.float32, 1e-6)])
def test_check_values(dtype: torch.dtype, rel: float) -> None:
    log_probs = known_log_probs(dtype)
    assert ctc_loss(log_probs, LENGTHS, *flat(TARGETS)).item() / 2 == pytest.approx(32.431148, rel=rel)
    assert consistency_loss(log_probs, LENGTHS).item() / 2 == pytest.approx(32.250592, rel=rel)


def test_ctc_sums_over_all_paths() -> None:
    """Against the sum over every path of 4 frames that reads "1 1 2"."""
    log_probs = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    total = 0.0
    for path in itertools.product(range(3), repeat=5):
        read = [symbol for symbol, _ in itertools.groupby(path)]
        if [symbol for symbol in read if symbol != 0] == [1, 1, 2]:
            total += math.exp(sum(log_probs[0, t, symbol].item() for t, symbol in enumerate(path)))
    assert ctc_loss(log_probs, torch.tensor([5]), *flat([[1, 1, 2]])).item() == pytest.approx(-math.log(total))


@pytest.mark.parametrize("target", [[1, 2, 3, 4, 5], [3, 3, 4], [5, 5, 5]])
def test_impossible_alignments_count_zero(target: list[int]) -> None:
    """More tokens and repeats than the three frames of the second row; the others are not touched."""
    logits = numbers((4, 12, 6), 3).requires_grad_()
    lengths = torch.tensor([12, 3 if len(target) < 5 else 4, 12, 9])
    targets = [TARGETS[0], target, *TARGETS[2:]]
    loss = ctc_loss(logits.log_softmax(-1), lengths, *flat(targets))
    (gradient,) = torch.autograd.grad(loss, logits)
    rest = [0, 2, 3]
    want = ctc_loss(logits[rest].log_softmax(-1), lengths[rest], *flat([targets[i] for i in rest]))
    (want_gradient,) = torch.autograd.grad(want, logits)
    assert math.isfinite(loss.item())
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()
    assert torch.allclose(gradient, want_gradient)


def test_an_empty_target_is_all_blanks() -> None:
    log_probs = known_log_probs()
    loss = ctc_loss(log_probs, LENGTHS, *flat([[], [], [], []]))
    want = -sum(log_probs[n, : LENGTHS[n], 0].sum().item() for n in range(4))
    assert loss.item() == pytest.approx(want)


def test_frames_beyond_the_length_do_not_count() -> None:
    log_probs = known_log_probs()
    other = log_probs.clone()
    other[1, 9:], other[3, 9:] = numbers((3, 6), 8).log_softmax(-1), -1e4
    assert torch.equal(ctc_loss(other, LENGTHS, *flat(TARGETS)), ctc_loss(log_probs, LENGTHS, *flat(TARGETS)))
    assert torch.equal(consistency_loss(other, LENGTHS), consistency_loss(log_probs, LENGTHS))


def test_consistency_is_a_divergence_from_the_other_view() -> None:
    log_probs = known_log_probs()
    want = 0.0
    for n in range(4):
        for t in range(int(LENGTHS[n])):
            this, other = log_probs[n, t], log_probs[(n + 2) % 4, t]
            want += (other.exp() * (other - this)).sum().item()
    assert consistency_loss(log_probs, LENGTHS).item() == pytest.approx(want)
    same = torch.cat([log_probs[:2], log_probs[:2]])
    assert consistency_loss(same, LENGTHS).item() == pytest.approx(0.0, abs=1e-12)


def test_consistency_has_its_gradient_through_the_second_argument() -> None:
    logits = (3 * numbers((4, 12, 6), 3)).requires_grad_()
    loss = consistency_loss(logits.log_softmax(-1), LENGTHS)
    (gradient,) = torch.autograd.grad(loss, logits)
    probs = logits.detach().softmax(-1)
    valid = torch.arange(12) < LENGTHS[:, None]
    # KL(q || softmax(z)) has the gradient softmax(z) - q where q is held constant
    want = (probs - probs[[2, 3, 0, 1]]) * valid[..., None]
    assert torch.allclose(gradient, want, atol=1e-12)


def test_masked_frames_may_weigh_more() -> None:
    log_probs = known_log_probs()
    mask = (numbers((4, 12, 1), 5) > 0).double()
    parts = [consistency_loss(log_probs, LENGTHS, mask, scale).item() for scale in (1.0, 3.0)]
    assert parts[0] == pytest.approx(consistency_loss(log_probs, LENGTHS).item())
    other = log_probs[[2, 3, 0, 1]]
    terms = (other.exp() * (other - log_probs)).sum(-1) * (torch.arange(12) < LENGTHS[:, None])
    assert parts[1] == pytest.approx((terms * (1 + 2 * mask[..., 0])).sum().item())


@pytest.mark.parametrize("frames", [9, 10, 11, 12, 40, 137])
def test_time_mask_at_the_output_rate(frames: int) -> None:
    generator = torch.Generator().manual_seed(frames)
    mask = torch.rand(3, frames, generator=generator) < 0.1
    got = downsample_time_mask(mask)
    assert got.shape == (3, (frames - 7) // 2, 1)
    assert got.dtype == torch.float32
    for t in range(got.shape[1]):  # the frames that the convolutions before the ConvNeXt block see
        assert torch.equal(got[:, t, 0] > 0, mask[:, 2 * t : 2 * t + 9].any(dim=1))
    halved = downsample_time_mask(mask, factor=2)
    assert halved.shape == (3, -(-got.shape[1] // 2), 1)
    for t in range(halved.shape[1]):
        assert torch.equal(halved[:, t], got[:, 2 * t : 2 * t + 2].amax(dim=1))
