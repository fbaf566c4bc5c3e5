"""Inference gives an utterance what it gets alone, whatever else is in the batch."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from small_models import draw_parameters, make_batch, random_batch, small_model
from zipformer_crctc.config import ModelConfig
from zipformer_crctc.features import LOG_EPS
from zipformer_crctc.layers import ChunkCausalConv
from zipformer_crctc.model import CtcModel
from zipformer_crctc.recogniser import Recogniser
from zipformer_crctc.tokenizer import PhoneTokenizer

TOLERANCE = 1e-4
"""On log-probabilities: matrix products of other sizes round in another way."""

UTTERANCES = int(os.environ.get("ISOLATION_UTTERANCES", "12"))
"""200 for the full check, which takes minutes."""

MODELS: dict[str, dict[str, Any]] = {
    "not causal": {},
    "whole-utterance chunks": {"causal": True, "chunk_size": (-1,), "left_context_frames": (-1,)},
    "chunks of 32": {"causal": True, "chunk_size": (32,), "left_context_frames": (64,)},
}


def recogniser(sizes: dict[str, Any], factor: int, published_padding: bool = False) -> Recogniser:
    model = draw_parameters(small_model(vocab_size=127, output_downsampling_factor=factor, **sizes), 0.15).eval()
    config = ModelConfig(output_downsampling_factor=factor).with_values(sizes)
    return Recogniser(model, PhoneTokenizer.from_table(), config, published_padding)


def mixed_lengths(count: int) -> list[int]:
    """From the shortest that there is to four seconds; all remainders of the frame rates come up."""
    drawn = random.Random(0).sample(range(9, 400), count)
    drawn[:3] = [9, 10, 400]
    return drawn


@torch.inference_mode()
def differences(
    model: Recogniser, num_frames: list[int], batch_sizes: tuple[int, ...], features: Tensor | None = None
) -> Tensor:
    """(batch sizes, utterances): the largest difference between its log-probs alone and in a batch with others."""
    if features is None:
        features = random_batch(num_frames, [""] * len(num_frames)).features
    alone = [
        model.log_probs(make_batch(row[None, :frames], [frames], [""]))[0][0]
        for row, frames in zip(features, num_frames, strict=True)
    ]
    worst = []
    for size in batch_sizes:
        for start in range(0, len(num_frames), size):
            chosen = num_frames[start : start + size]
            batch = make_batch(features[start : start + size, : max(chosen)], chosen, [""] * len(chosen))
            together, lengths = model.log_probs(batch)
            for row, length, want in zip(together, lengths.tolist(), alone[start : start + size], strict=True):
                assert length == len(want)
                worst.append((row[:length] - want).abs().max())
    return torch.stack(worst).view(len(batch_sizes), -1)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_log_probs_do_not_depend_on_the_batch(sizes: dict[str, Any], factor: int) -> None:
    model = recogniser(sizes, factor)
    assert float(differences(model, mixed_lengths(UTTERANCES), (8, 64)).max()) < TOLERANCE


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_the_published_behaviour_comes_back(sizes: dict[str, Any]) -> None:
    """It is the model's own default, and there the shorter utterances of a batch do change."""
    model = recogniser(sizes, 1, published_padding=True)
    found = differences(model, [120, 75, 50, 33], (4,))[0]
    assert float(found[0]) < TOLERANCE
    assert float(found[1:].min()) > 100 * TOLERANCE
    if not sizes:
        batch = random_batch([60, 31], ["", ""])
        with torch.inference_mode():
            assert torch.equal(model.log_probs(batch)[0], model.model(batch.features, batch.num_frames)[0])


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_a_batch_of_one_is_the_reference(sizes: dict[str, Any]) -> None:
    model: CtcModel = recogniser(sizes, 1).model
    features = random_batch([101], [""]).features
    frames = torch.tensor([101])
    with torch.inference_mode():
        assert torch.equal(model(features, frames, isolate=True)[1], model(features, frames)[1])
        assert torch.allclose(model(features, frames, isolate=True)[0], model(features, frames)[0], atol=1e-6)


@torch.inference_mode()
def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = recogniser({}, 1).model
    batch = random_batch([90, 41], ["", ""])
    spoilt = batch.features.clone()
    spoilt[1, 41:] = 7.0
    clean, lengths = model(batch.features, batch.num_frames, isolate=True)
    other, _ = model(spoilt, batch.num_frames, isolate=True)
    assert torch.allclose(clean[1, : lengths[1]], other[1, : lengths[1]], atol=1e-5)
    assert float(batch.features[1, 41:].max()) == pytest.approx(LOG_EPS)


@pytest.mark.parametrize("chunk_size", [-1, 4, 8, 40])
def test_edges_of_chunks_are_those_of_each_utterance(chunk_size: int) -> None:
    conv = draw_parameters(ChunkCausalConv(6, 7), 0.5)
    lengths = torch.tensor([20, 13, 5, 2])
    x = torch.randn(20, 4, 6, generator=torch.Generator().manual_seed(0))
    x = x.masked_fill((torch.arange(20)[:, None] >= lengths)[:, :, None], 0.0)
    together = conv(x, chunk_size, lengths)
    for n, length in enumerate(lengths.tolist()):
        alone = conv(x[:length, n : n + 1], chunk_size)
        assert torch.allclose(together[:length, n : n + 1], alone, atol=1e-6)
