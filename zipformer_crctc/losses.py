"""CTC loss and consistency regularisation between two augmented views of each utterance (CR-CTC).

N utterances; with consistency the batch holds 2N rows, rows n and n + N being the two views of utterance n.
T' output frames, V vocabulary. Losses are sums over rows, frames and symbols, in nats.
Source: CR-CTC (Yao et al., ICLR 2025), section 3; ZIPA (Zhu et al., ACL 2025), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zipformer_crctc.model import padding_mask


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int = 0) -> Tensor:
    """Sum of the CTC losses of all rows; an impossible alignment counts zero and has no gradient.

    Args:
        log_probs: (rows, T', V), float32.
        lengths: (rows,) output frames.
        targets: (sum of target_lengths,) labels of all rows.
        target_lengths: (rows,).
        blank: id of the blank.
    """
    return F.ctc_loss(
        log_probs.transpose(0, 1), targets, lengths, target_lengths, blank=blank, reduction="sum", zero_infinity=True
    )


def consistency_loss(
    log_probs: Tensor, lengths: Tensor, time_mask: Tensor | None = None, masked_scale: float = 1.0
) -> Tensor:
    """Sum over rows and valid frames of KL(other view || this view); the other view gets no gradient.

    Args:
        log_probs: (2N, T', V), float32.
        lengths: (2N,) output frames.
        time_mask: (2N, T', 1), 1 at frames that SpecAugment masked.
        masked_scale: weight of the terms of masked frames.
    """
    other = torch.cat(log_probs.detach().chunk(2)[::-1])
    divergence = F.kl_div(log_probs, other, reduction="none", log_target=True)
    if time_mask is not None and masked_scale != 1.0:
        divergence = divergence * (1.0 + time_mask * (masked_scale - 1.0))
    return divergence.masked_fill(padding_mask(lengths, log_probs.shape[1])[:, :, None], 0.0).sum()


def downsample_time_mask(mask: Tensor, factor: int = 1) -> Tensor:
    """The time mask at the output's rate: (N, T) bool to (N, ceil((T - 7) // 2 / factor), 1) float, by max-pooling.

    An output frame counts as masked where any input frame that the front-end's strided convolutions see is; ``factor``
    is the model's output downsampling factor.
    """
    pooled = mask[:, None].float()
    for stride in (1, 2, 1):
        pooled = F.max_pool1d(pooled, kernel_size=3, stride=stride)
    return F.max_pool1d(pooled, factor, factor, ceil_mode=True).transpose(1, 2)
