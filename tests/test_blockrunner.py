"""Blocks of a fixed size in buffers that are used again: what a CUDA graph replays, run here on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from test_beam import fusions, random_log_probs
from zipformer_crctc import blockrunner
from zipformer_crctc.beamblock import BeamBlock, BlockShape
from zipformer_crctc.blockrunner import BLOCK, MAX_KEPT, BlockRunner, block_runner
from zipformer_crctc.ngram import Fusion


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockrunner, "_kept", type(blockrunner._kept)())


def results(log_probs: Tensor, lengths: list[int], fusion: Fusion | None, fixed_size: bool) -> list[Tensor]:
    """Codes of the frames that count, masses and states."""
    valid = torch.arange(log_probs.size(1)) < torch.tensor(lengths).unsqueeze(1)
    with block_runner(log_probs, 8, 0, 0, fusion, fixed_size) as runner:
        codes = runner.run(log_probs, valid, None, torch.zeros(log_probs.size(2), dtype=torch.float64))
        assert [len(part) for part in codes[:-1]] == [BLOCK] * (len(codes) - 1)
        found = [torch.cat(codes), runner.block.log_mass().clone()]
        return [*found, runner.block.final_states()] if runner.block.has_lm else found


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["alone", "bonus", "lm"])
def test_fixed_blocks_equal_plain_calls(kind: int) -> None:
    """Also the last, partial one, in buffers used before for other data, and for another number of utterances."""
    generator = torch.Generator().manual_seed(kind)
    fusion = fusions(generator, 9)[kind]
    for num, frames, lengths in ((3, 75, [75, 1, 40]), (3, 20, [0, 20, 3]), (2, 32, [32, 31]), (3, 75, [2, 75, 75])):
        log_probs = random_log_probs(generator, num, frames, 9, peaky=3.0)
        plain = results(log_probs, lengths, fusion, fixed_size=False)
        for found, wanted in zip(results(log_probs, lengths, fusion, fixed_size=True), plain, strict=True):
            assert torch.equal(found, wanted)
    assert len(blockrunner._kept) == 2


def test_runners_are_kept_by_shape_and_for_one_user() -> None:
    log_probs = torch.zeros(1, 4, 3)

    def runner(values: Tensor = log_probs, **more: int) -> BlockRunner:
        with block_runner(values, more.get("beam", 2), 0, 0, None, fixed_size=True) as made:
            return made

    first = runner()
    assert runner() is first and runner(torch.zeros(1, 900, 3)) is first
    assert runner(log_probs.double()) is not first and runner(beam=3) is not first
    with block_runner(log_probs, 2, 0, 0, None, True) as one, block_runner(log_probs, 2, 0, 0, None, True) as other:
        assert one is first and other is not first
    for num in range(2, 3 + MAX_KEPT):
        runner(torch.zeros(num, 4, 3))
    assert len(blockrunner._kept) == MAX_KEPT
    assert runner() is not first


def test_buffers_made_in_inference_mode_serve_outside_it() -> None:
    log_probs = random_log_probs(torch.Generator().manual_seed(3), 2, 5, 4)
    with torch.inference_mode():
        inside = results(log_probs, [5, 3], None, fixed_size=True)
    for found, wanted in zip(results(log_probs, [5, 3], None, fixed_size=True), inside, strict=True):
        assert torch.equal(found, wanted)


def test_without_a_graph_the_block_is_called(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no stream")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    block = BeamBlock(BlockShape(1, 2, 3, 2, 0, 0, torch.float32), None, torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        call: Callable[[int], None] = blockrunner._captured(block)
    assert call == block.run and "no CUDA graph (no stream)" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_block_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    log_probs = random_log_probs(torch.Generator().manual_seed(0), 2, 40, 6).cuda()
    with caplog.at_level(logging.WARNING), block_runner(log_probs, 4, 0, 0, None) as runner:
        assert runner.fixed_size and runner.call != runner.block.run
    assert caplog.text == ""
