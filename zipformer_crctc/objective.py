"""From a batch to its loss: views, forward pass, CTC and consistency loss.

N utterances, T feature frames, T' output frames; with CR-CTC the model sees 2N rows, two views of each utterance.
Source: CR-CTC (Yao et al., ICLR 2025), section 3; ZIPA (Zhu et al., ACL 2025), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipformer_crctc.augment import spec_augment, time_warp
from zipformer_crctc.config import Config
from zipformer_crctc.features import LOG_EPS
from zipformer_crctc.loader import Batch
from zipformer_crctc.losses import consistency_loss, ctc_loss, downsample_time_mask
from zipformer_crctc.products import missing_to_grid
from zipformer_crctc.text import UnknownSymbols, normalise, remove_diacritics
from zipformer_crctc.tokenizer import PhoneTokenizer

Model = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From features and frame counts to log-probabilities and lengths."""

SUM_NAMES = ("loss", "ctc_loss", "cr_loss", "frames", "utterances", "seconds")
"""What is summed over batches: losses in nats, output frames of 20 ms, utterances, seconds of audio."""


class TargetEncoder:
    """From the text of an utterance to the labels that CTC is trained on.

    Args:
        tokenizer: the phone tokenizer.
        without_diacritics: delete diacritics first.
    """

    def __init__(self, tokenizer: PhoneTokenizer, without_diacritics: bool = False) -> None:
        self.tokenizer = tokenizer
        self.without_diacritics = without_diacritics
        self.unknown = UnknownSymbols()

    def text(self, text: str) -> str:
        """The text as it is encoded: normalised, without spaces (as published), without diacritics where asked for."""
        text = normalise(text, self.tokenizer.pieces, self.unknown.dropped).replace(" ", "")
        return remove_diacritics(text) if self.without_diacritics else text

    def __call__(self, text: str) -> list[int]:
        """Token ids; symbols that are not known are counted in `unknown`."""
        text = self.text(text)
        ids = self.tokenizer.encode(text)
        self.unknown.add(text, self.tokenizer, ids)
        return ids


@dataclass(frozen=True)
class Loss:
    """Loss of a batch and what is logged about it."""

    total: Tensor
    """Scalar with gradient: s_ctc * L_ctc + s_cr * L_cr, a sum over utterances and frames, in nats."""
    sums: Tensor
    """Values of SUM_NAMES, without gradient."""


class Objective:
    """Computes the loss of batches.

    Args:
        config: of the run.
        encode: from a text to token ids.
    """

    def __init__(self, config: Config, encode: Callable[[str], Sequence[int]]) -> None:
        self.encode = encode
        self.consistent = config.model.use_cr_ctc
        self.augment_plain = config.data.enable_spec_aug
        self.output_factor = config.model.output_downsampling_factor
        self.cr_scale = config.train.cr_loss_scale
        self.masked_scale = config.train.cr_loss_masked_scale
        self.time_mask_ratio = config.train.time_mask_ratio
        self.warp_factor = config.data.spec_aug_time_warp_factor

    def train_loss(self, model: Model, batch: Batch, autocast: torch.autocast, plain: bool = False) -> Loss:
        """Loss of a training batch, augmented.

        Args:
            model: a module, or passes through one.
            batch: on the model's device; an empty one gives a loss of zero that reaches every parameter.
            autocast: context of the forward pass.
            plain: CTC on the features as they are, also where the configuration asks for CR-CTC.
        """
        features, num_frames, targets = self._inputs(batch)
        features = F.pad(features, (0, 0, 0, missing_to_grid(features.shape[1])), value=LOG_EPS)
        time_mask = None
        consistent = self.consistent and not plain
        if consistent:
            features = time_warp(features, num_frames, self.warp_factor).repeat(2, 1, 1)
            num_frames, targets = num_frames.repeat(2), targets * 2
            features, time_mask = spec_augment(features, self.time_mask_ratio)
        elif self.augment_plain and not plain:
            features, _ = spec_augment(time_warp(features, num_frames, self.warp_factor), time_mask_ratio=1.0)
        with autocast:
            log_probs, lengths = model(features, num_frames)
        ctc = self._ctc(log_probs, lengths, targets)
        cr = torch.zeros_like(ctc)
        if consistent:
            mask = None
            if time_mask is not None and self.masked_scale != 1.0:
                mask = downsample_time_mask(time_mask, self.output_factor)
            ctc, cr = ctc / 2, consistency_loss(log_probs, lengths, mask, self.masked_scale) / 2
            lengths = lengths.chunk(2)[0]
        total = ctc + self.cr_scale * cr
        return self._loss(total * 0.0 if batch.is_empty else total, ctc, cr, lengths, batch)

    @torch.no_grad()
    def valid_loss(self, model: nn.Module, batch: Batch) -> Loss:
        """CTC loss of a batch as it is; the two views would be equal, so there is no consistency loss."""
        features, num_frames, targets = self._inputs(batch)
        log_probs, lengths = model(features, num_frames)
        ctc = self._ctc(log_probs, lengths, targets)
        return self._loss(ctc, ctc, torch.zeros_like(ctc), lengths, batch)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, list[Sequence[int]]]:
        if batch.is_empty:  # any input will do; its loss counts zero
            device = batch.features.device
            return torch.full((1, 64, 80), LOG_EPS, device=device), torch.tensor([64], device=device), [[]]
        return batch.features, batch.num_frames, [self.encode(text) for text in batch.texts]

    @staticmethod
    def _ctc(log_probs: Tensor, lengths: Tensor, targets: list[Sequence[int]]) -> Tensor:
        labels = torch.tensor([token for target in targets for token in target], device=log_probs.device)
        target_lengths = torch.tensor([len(target) for target in targets], device=log_probs.device)
        return ctc_loss(log_probs, lengths, labels.long(), target_lengths)

    @staticmethod
    def _loss(total: Tensor, ctc: Tensor, cr: Tensor, lengths: Tensor, batch: Batch) -> Loss:
        losses = torch.stack([total.detach(), ctc.detach(), cr.detach(), lengths.sum().to(total.dtype)])
        counts = losses.new_tensor([len(batch.utterances), batch.seconds])
        sums = torch.cat([losses, counts])
        return Loss(total, torch.zeros_like(sums) if batch.is_empty else sums)
