"""The whole acoustic model: log-mel features to log-probabilities of phones at 50 Hz.

N utterances, T feature frames of 10 ms, T' = (T - 7) // 2 output frames of 20 ms, V vocabulary size. With an output
downsampling factor D the output frames last D * 20 ms, and there are ceil(T' / D).
Source: ZIPA (Zhu et al., ACL 2025), section 3.
"""

from __future__ import annotations

from torch import Tensor, nn

from zipformer_crctc import lowprecision
from zipformer_crctc.activations import Dropout
from zipformer_crctc.config import ModelConfig
from zipformer_crctc.encoder import Zipformer
from zipformer_crctc.frontend import Conv2dSubsampling, padding_mask
from zipformer_crctc.layers import LayerSizes
from zipformer_crctc.products import Linear
from zipformer_crctc.schedule import Schedule

FEATURE_DIM = 80


class CtcModel(nn.Module):
    """Front-end, encoder and CTC head; state-dict keys are those of the published checkpoints.

    Args:
        encoder_embed: the front-end.
        encoder: the stacks.
        vocab_size: V, blank included.
    """

    def __init__(self, encoder_embed: Conv2dSubsampling, encoder: Zipformer, vocab_size: int) -> None:
        super().__init__()
        self.encoder_embed = encoder_embed
        self.encoder = encoder
        self.ctc_output = nn.Sequential(Dropout(0.1), Linear(max(encoder.encoder_dim), vocab_size))

    def forward(self, features: Tensor, num_frames: Tensor, isolate: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities of a batch.

        Args:
            features: (N, T, 80), padded with ln(1e-10), T the longest of num_frames.
            num_frames: (N,) feature frames of each utterance, at least 9.
            isolate: give each utterance what it gets alone; as published, padding leaks into the frames before it.

        Returns:
            log-probabilities (N, T', V) in float32, and the number of output frames (N,).
        """
        encoded, lengths = self.encode(features, num_frames, isolate)
        return self.ctc_output(encoded).float().log_softmax(dim=-1), lengths

    def encode(self, features: Tensor, num_frames: Tensor, isolate: bool = False) -> tuple[Tensor, Tensor]:
        """Encoder output (N, T', max encoder_dim) and the number of output frames (N,)."""
        if self.training:  # else a change that PyTorch does not count is not expected
            lowprecision.new_pass(self)
        embedded, lengths = self.encoder_embed(features, num_frames, isolate)
        mask = padding_mask(lengths, embedded.shape[1])
        encoded, lengths = self.encoder(embedded.transpose(0, 1), lengths, mask, isolate)
        return encoded.transpose(0, 1), lengths


def build_model(config: ModelConfig, vocab_size: int) -> CtcModel:
    """A model with new random weights.

    Args:
        config: sizes; validated by the configuration.
        vocab_size: V, from the tokenizer.
    """
    dropout = Schedule((0, 0.3), (20000, 0.1))
    sizes = [
        LayerSizes(
            embed_dim=dim,
            pos_dim=config.pos_dim,
            num_heads=heads,
            query_head_dim=query,
            pos_head_dim=pos,
            value_head_dim=value,
            feedforward_dim=feedforward,
            cnn_module_kernel=kernel,
        )
        for dim, heads, query, pos, value, feedforward, kernel in zip(
            config.encoder_dim,
            config.num_heads,
            config.query_head_dim,
            config.pos_head_dim,
            config.value_head_dim,
            config.feedforward_dim,
            config.cnn_module_kernel,
            strict=True,
        )
    ]
    embed = Conv2dSubsampling(
        FEATURE_DIM, config.encoder_dim[0], config.frontend_channels, config.frontend_hidden, dropout
    )
    encoder = Zipformer(
        config.downsampling_factor,
        config.num_encoder_layers,
        sizes,
        config.encoder_unmasked_dim,
        config.causal,
        config.chunk_size,
        config.left_context_frames,
        dropout,
        config.warmup_batches,
        config.output_downsampling_factor,
    )
    return CtcModel(embed, encoder, vocab_size)
