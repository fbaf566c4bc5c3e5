"""Runs a beam search block by block: called on a CPU, on a GPU captured once as a CUDA graph and replayed.

A graph plays its kernels on the same memory every time, so its blocks all have the same size (the last one is filled up
with padding, which leaves the hypotheses as they are) and the input is copied to where the graph reads it. Graphs stay
for later batches of the same shape. Nothing is read back to the host between blocks.

The capture has not run on a GPU yet; that blocks filled up and buffers used again give what plain calls give is tested
on a CPU (`fixed_size`).

Legend: N utterances, T'' frames to search, F frames of a block, V pieces.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from zipformer_crctc.beamblock import BeamBlock, BlockShape
from zipformer_crctc.ngram import Fusion

logger = logging.getLogger(__name__)

BLOCK = 32
"""F."""
MAX_KEPT = 8
"""Graphs kept for later batches; the one that was not used for longest goes first."""
_Key = tuple[BlockShape, torch.device, int]


class BlockRunner:
    """One block's buffers, and how it is run."""

    def __init__(self, block: BeamBlock, fixed_size: bool) -> None:
        self.block, self.fixed_size = block, fixed_size
        self.call: Callable[[int], None] = block.run
        if block.device.type == "cuda":
            self.call = _captured(block)

    def run(self, log_probs: Tensor, valid: Tensor, blank: Tensor | None, offsets: Tensor) -> list[Tensor]:
        """The codes of all blocks of a batch, (F, N, B) each; the last one has what is left.

        log_probs: (N, T'', V); valid, blank: (N, T''); offsets: (V,), see `BeamBlock`.
        """
        block = self.block
        block.start()
        block.offsets.copy_(offsets)
        if blank is None:
            block.blank.fill_(float("nan"))
        size, codes = block.shape.frames, []
        for start in range(0, log_probs.size(1), size):
            part = slice(start, start + size)
            count = min(size, log_probs.size(1) - start)
            block.log_probs[:, :count] = log_probs[:, part]
            block.valid[:, :count] = valid[:, part]
            block.valid[:, count:] = False
            if blank is not None:
                block.blank[:, :count] = blank[:, part]
            self.call(size if self.fixed_size else count)
            codes.append(block.codes[:count].clone())
        return codes


_kept: OrderedDict[_Key, BlockRunner] = OrderedDict()


@contextmanager
def block_runner(
    log_probs: Tensor,
    beam: int,
    top_tokens: int,
    blank_id: int,
    fusion: Fusion | None,
    fixed_size: bool | None = None,
) -> Iterator[BlockRunner]:
    """A runner for log-probs (N, T'', V), of which the caller has the sole use until the end of the context.

    fixed_size: run full blocks only, in buffers that are kept for later calls; None: on a GPU.
    """
    if fixed_size is None:
        fixed_size = log_probs.device.type == "cuda"
    num, frames, vocab = log_probs.shape
    size = BLOCK if fixed_size else max(1, min(BLOCK, frames))
    shape = BlockShape(num, size, vocab, beam, top_tokens, blank_id, log_probs.dtype)
    if not fixed_size:
        yield BlockRunner(BeamBlock(shape, fusion, log_probs.device), fixed_size)
        return
    key = (shape, log_probs.device, id(fusion))  # the kept block holds the fusion, so its id is not given again
    runner = _kept.pop(key, None)
    if runner is None:
        with torch.inference_mode(False):  # tensors made in that mode could not be updated outside it later
            runner = BlockRunner(BeamBlock(shape, fusion, log_probs.device), fixed_size)
    yield runner
    _kept[key] = runner
    while len(_kept) > MAX_KEPT:
        _kept.popitem(last=False)


def _captured(block: BeamBlock) -> Callable[[int], None]:
    """The block as a CUDA graph; where that fails, a warning and plain calls."""
    try:
        stream = torch.cuda.Stream(block.device)
        with torch.cuda.device(block.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up in their first calls, outside the graph
                block.run(block.shape.frames)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                block.run(block.shape.frames)
    except RuntimeError as error:
        logger.warning("beam search: no CUDA graph (%s); every frame is launched apart, which is slower", error)
        return block.run
    return lambda frames: graph.replay()
