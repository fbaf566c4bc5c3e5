"""Speed of the searches against pyctcdecode and flashlight-text, on the same log-probs in the same run.

    pip install kenlm flashlight-text; pip install --no-deps pyctcdecode; pip install pygtrie hypothesis
    python benchmarks/bench_search.py                      # synthetic log-probs, as peaky as a trained model's
    python benchmarks/bench_search.py --log-probs model.npy --lm lm.arpa

Rows `greedy`, `beam 4`, `beam 16`, `beam 64`, each also `+ lm`, with batches of 1, 32 and 128, go to
benchmarks/results/search.json: utterances per second, of ours and of the faster peer, and their ratio. The peers have
no greedy search, there they have a beam of 1; `greedy + lm` is a beam of 1 for all.

Equal for all: log-probs, beam, language model and its weight, one CPU thread (--threads for ours only, then said in the
row), and the --top-tokens most probable tokens of each frame. pyctcdecode knows no such number; it takes the tokens
above the log-probability that leaves as many on average. The peers decode one utterance after the other, so their
speed does not depend on the batch, and --peer-utterances of it are timed. A peer that cannot be imported is reported
as absent.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.results_file import result_path, row, write_rows
from local.kneser_ney import estimate, write_arpa
from zipformer_crctc.beam import BeamOptions, prefix_beam_search
from zipformer_crctc.ngram import Fusion, NgramLM, read_arpa
from zipformer_crctc.search import FRAME_SHIFT, greedy_search
from zipformer_crctc.tokenizer import PhoneTokenizer

LM_WEIGHT = 0.5
FIRST_LETTER = 0x4E00
"""Peers get token i as this letter plus i: marks and special pieces mean other things to them."""
Decoder = Callable[[np.ndarray], Any]
"""Decodes (N, T, V) log-probs."""


@dataclass(frozen=True)
class Setting:
    """One row, without its batch."""

    beam: int
    greedy: bool
    lm: bool
    top_tokens: int

    @property
    def name(self) -> str:
        return ("greedy" if self.greedy else f"beam {self.beam}") + (" + lm" if self.lm else "")


def synthetic(num: int, frames: int, vocab: int, seed: int = 0) -> tuple[np.ndarray, list[list[int]]]:
    """Log-probs (num, frames, vocab) with a phone in about a quarter of the frames, and texts of the same kind.

    Each phone is followed by one of six, so a language model has something to say; a fifth of the peaks is split
    between two phones, as a recogniser in doubt does.
    """
    rng = np.random.default_rng(seed)
    successors = rng.integers(4, vocab, size=(vocab, 6))

    def text(length: int) -> list[int]:
        tokens = [3]
        while len(tokens) < length:
            tokens.append(int(successors[tokens[-1], min(int(rng.exponential(1.5)), 5)]))
        return tokens

    logits = rng.normal(size=(num, frames, vocab)).astype(np.float32)
    logits[:, :, 0] += 9.0
    for scores in logits:
        places = np.flatnonzero(rng.random(frames) < 0.25)
        for place, token in zip(places, text(max(len(places), 1)), strict=False):
            scores[place, token] += 12.0
            if rng.random() < 0.2:
                scores[place, rng.integers(4, vocab)] += rng.uniform(10.0, 13.0)
    logits -= np.logaddexp.reduce(logits, axis=2, keepdims=True)
    return logits, [text(30) for _ in range(2000)]


def for_peers(arpa: Path, tokenizer: PhoneTokenizer, output: Path) -> None:
    """The same model with the peers' letters."""
    letters = {piece: chr(FIRST_LETTER + number) for number, piece in enumerate(tokenizer.pieces) if number != 2}
    lines = []
    for line in arpa.read_text(encoding="utf-8").splitlines():
        fields = line.split("\t")
        if len(fields) > 1:
            fields[1] = " ".join(letters.get(word, word) for word in fields[1].split(" "))
        lines.append("\t".join(fields))
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def ours(setting: Setting, lm: NgramLM, device: torch.device) -> Decoder:
    """Our search, copying to the device and making lists of phones included."""
    options = BeamOptions(setting.beam, top_tokens=setting.top_tokens)
    fusion = Fusion(lm.to(device), LM_WEIGHT) if setting.lm else None

    def decode(log_probs: np.ndarray) -> Any:
        tensor = torch.from_numpy(log_probs).to(device)
        lengths = torch.full((len(log_probs),), log_probs.shape[1], device=device)
        if setting.greedy and not setting.lm:
            return greedy_search(tensor, lengths)
        return prefix_beam_search(tensor, lengths, options, fusion=fusion)

    return decode


def pyctcdecode_peer(setting: Setting, lm: Path, vocab: int, threshold: float) -> Decoder:
    """Every token a word of its own, so that its word-level language model scores each."""
    import pyctcdecode

    labels = ["", *(f"▁{chr(FIRST_LETTER + number)}" for number in range(1, vocab))]
    if setting.lm:
        decoder = pyctcdecode.build_ctcdecoder(labels, str(lm), alpha=LM_WEIGHT, beta=0.0)
    else:
        decoder = pyctcdecode.build_ctcdecoder(labels)

    def decode(log_probs: np.ndarray) -> Any:
        return [
            decoder.decode_beams(
                utterance, beam_width=setting.beam, beam_prune_logp=-1e9, token_min_logp=threshold, prune_history=False
            )[0]
            for utterance in log_probs
        ]

    return decode


def flashlight_peer(setting: Setting, lm: Path, vocab: int, threshold: float) -> Decoder:
    """Its lexicon-free decoder."""
    from flashlight.lib.text import decoder as fl
    from flashlight.lib.text.dictionary import Dictionary

    if setting.lm:
        from flashlight.lib.text.decoder.kenlm import KenLM

        model = KenLM(str(lm), Dictionary([chr(FIRST_LETTER + number) for number in range(vocab)]))
    else:
        model = fl.ZeroLM()
    options = fl.LexiconFreeDecoderOptions(
        beam_size=setting.beam,
        beam_size_token=min(setting.top_tokens + 1, vocab),  # it counts the blank
        beam_threshold=1e9,
        lm_weight=LM_WEIGHT * math.log(10.0) if setting.lm else 0.0,  # it leaves KenLM's decimal logarithms as they are
        sil_score=0.0,
        log_add=True,
        criterion_type=fl.CriterionType.CTC,
    )
    decoder = fl.LexiconFreeDecoder(options, model, -1, 0, [])

    def decode(log_probs: np.ndarray) -> Any:
        return [decoder.decode(utterance.ctypes.data, *utterance.shape)[0] for utterance in log_probs]

    return decode


PEERS = {"pyctcdecode": pyctcdecode_peer, "flashlight": flashlight_peer}


def utterances_per_second(decode: Decoder, log_probs: np.ndarray, rounds: int) -> float:
    """The best of some rounds, after one utterance to warm up."""
    decode(log_probs[:1])
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        decode(log_probs)
        times.append(time.perf_counter() - started)
    return len(log_probs) / min(times)


def peer_speeds(setting: Setting, lm: Path, log_probs: np.ndarray, threshold: float, rounds: int) -> dict[str, Any]:
    """Utterances per second of every peer, or why there are none."""
    speeds: dict[str, Any] = {}
    for name, build in PEERS.items():
        if importlib.util.find_spec(name) is None:
            speeds[name] = "absent: not installed"
            continue
        try:
            speeds[name] = utterances_per_second(build(setting, lm, log_probs.shape[2], threshold), log_probs, rounds)
        except ImportError as error:  # flashlight-text without KenLM, say
            speeds[name] = f"absent: {error}"
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-probs", type=Path, help="(N, T, 127) float32 .npy file of a trained model")
    parser.add_argument("--lm", type=Path, help="ARPA file (default: estimated on synthetic texts)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--frames", type=int, default=1500, help="of synthetic log-probs")
    parser.add_argument("--top-tokens", type=int, default=20, help="tokens that may extend in each frame")
    parser.add_argument("--device", default="cpu", help="of ours: cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of ours; the peers have one")
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts")
    parser.add_argument("--peer-utterances", type=int, default=8, help="the peers are timed on so many of a batch")
    parser.add_argument("--output", type=Path, default=result_path("search"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = PhoneTokenizer.from_table()
    num = max(args.batches)
    if args.log_probs is None:
        log_probs, texts = synthetic(num, args.frames, tokenizer.vocab_size)
    else:
        log_probs, texts = np.load(args.log_probs).astype(np.float32), []
        log_probs = np.concatenate([log_probs] * (-(-num // len(log_probs))))[:num]
        if args.lm is None:
            parser.error("--log-probs needs --lm: a model of synthetic texts would not fit them")
    log_probs = np.ascontiguousarray(log_probs)
    with tempfile.TemporaryDirectory() as folder:
        arpa, peer_arpa = args.lm or Path(folder) / "lm.arpa", Path(folder) / "peer.arpa"
        if args.lm is None:
            predicted = [number for number in range(tokenizer.vocab_size) if number > 1]
            write_arpa(estimate(texts, tokenizer.pieces, predicted, order=4), arpa)
        for_peers(arpa, tokenizer, peer_arpa)
        rows = run(args, log_probs, read_arpa(arpa, tokenizer), peer_arpa)
    write_rows(args.output, rows)


def run(args: argparse.Namespace, log_probs: np.ndarray, lm: NgramLM, peer_lm: Path) -> list[dict[str, Any]]:
    """All rows, each reported when it is there."""
    device = torch.device(args.device)
    described = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    threshold = float(np.sort(log_probs[0], axis=1)[:, -args.top_tokens - 1].mean())
    seconds = log_probs.shape[1] * FRAME_SHIFT
    settings = [
        Setting(beam, greedy, with_lm, args.top_tokens)
        for beam, greedy in ((1, True), *((beam, False) for beam in args.beams))
        for with_lm in (False, True)
    ]
    rows = []
    for setting in settings:
        some = log_probs[: min(args.peer_utterances, len(log_probs))]
        peers = peer_speeds(setting, peer_lm, some, threshold, args.rounds)
        measured = {name: value for name, value in peers.items() if isinstance(value, float)}
        fastest = max(measured, key=lambda name: measured[name], default=None)
        decode = ours(setting, lm, device)
        for batch in args.batches:
            speed = utterances_per_second(decode, log_probs[:batch], args.rounds)
            peer = None if fastest is None else measured[fastest]
            rows.append(
                row(
                    f"{setting.name}, batch {batch}",
                    f"utterances of {seconds:g} s per second",
                    round(speed, 3),
                    None if peer is None else {"name": fastest, "speed": round(peer, 3)},
                    None if peer is None else round(speed / peer, 2),
                    device=described,
                    real_time_factor=float(f"{1 / (speed * seconds):.3g}"),
                    peers={name: round(v, 3) if isinstance(v, float) else v for name, v in peers.items()},
                    top_tokens=setting.top_tokens,
                )
            )
            print(f"{rows[-1]['case']:24} ratio {rows[-1]['ratio']}", file=sys.stderr, flush=True)  # as they come
    return rows


if __name__ == "__main__":
    main()
