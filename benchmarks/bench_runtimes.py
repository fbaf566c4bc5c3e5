"""The same utterances through every runtime: phones, log-probs, PER, size on disk and speed, beside PyTorch's.

    python benchmarks/bench_runtimes.py --exp-dir exp/espeak --iter 1000000 --avg 2 --num-threads 2 \
      --data-config data/espeak/data.yaml --test-sets test,dev,data/espeak/train

Takes the flags of decode.py. The runtimes are PyTorch as `zipa transcribe` runs it, onnxruntime and sherpa-onnx with
the files of export_onnx.py, transformers with the folder of save_pretrained.py, and the page of docs/web in headless
Chromium, which needs npm (--page 0 leaves it out). Each gets the samples of one utterance after the other and gives
phones. All take turns in passes over the utterances, and the fastest of --repeats passes counts; the page makes one.
Rows go to benchmarks/results/runtimes.json: seconds of audio per second, and what differs from PyTorch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import soundfile
import torch
from torch import Tensor

from benchmarks.results_file import result_path, row, write_rows
from benchmarks.speech import utterances
from zipformer_crctc import checkpoint
from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.config import Config, config_to_dict
from zipformer_crctc.features import SAMPLING_RATE, Fbank
from zipformer_crctc.metrics import edit_distance, score
from zipformer_crctc.onnx_files import file_name, write_onnx, write_tokens
from zipformer_crctc.onnx_model import OnnxModel
from zipformer_crctc.recogniser import Recogniser, choose_test_sets, load_recogniser
from zipformer_crctc.save_pretrained import save_pretrained
from zipformer_crctc.search import greedy_search
from zipformer_crctc.text import normalise
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.transcriber import PhoneRecognizer

RESULTS = result_path("runtimes")
CHECKPOINT, TRANSFORMERS, PAGE = "model.pt", "transformers", "page"
FILES = [("features", "fp32"), ("features", "fp16"), ("features", "int8"), ("audio", "fp32")]
PYTORCH = f"PyTorch {torch.__version__}, fp32"


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    utterances: int = 200
    """How many, from the first set on."""
    page: int = 10
    """How many of them go through the web page."""
    repeats: int = 3
    """Passes over the utterances."""
    output: Path = RESULTS
    """JSON file of rows."""


@dataclass(frozen=True)
class Spoken:
    """An utterance."""

    samples: np.ndarray
    """(S,) at 16 kHz."""
    phones: list[str]
    """Its reference."""


@dataclass(frozen=True)
class Runtime:
    """What recognises."""

    name: str
    path: Path
    """The file of its model."""
    phones: Callable[[np.ndarray], list[str]]
    """Samples (S,) to phones."""
    log_probs: Callable[[np.ndarray], Tensor] | None = None
    """Samples (S,) to log-probs (T', V), where they are to be had."""


@dataclass(frozen=True)
class Heard:
    """What a runtime made of the first utterances, or of all."""

    phones: list[list[str]]
    seconds: float
    threads: int


def main() -> None:
    about = "Compare all runtimes with PyTorch."
    run_program("bench_runtimes.py", lambda: parse_decode_args(None, BenchConfig, about), run)


@torch.inference_mode()
def run(args: DecodeArgs) -> None:
    """Measure, and write the rows."""
    own: BenchConfig = args.own
    recogniser = load_recogniser(args)
    spoken = read_utterances(args, recogniser.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(recogniser, folder)
        pytorch, *others = list(runtimes(folder, recogniser.tokenizer))
        heard = in_turns([pytorch, *others], spoken, own.repeats)
        rows = [make_row(pytorch, spoken, heard[PYTORCH], heard[PYTORCH])]
        for runtime in others:
            difference = largest_difference(pytorch, runtime, spoken)
            rows.append(make_row(runtime, spoken, heard[runtime.name], heard[PYTORCH], difference))
        if own.page:
            found = through_the_page(folder, recogniser.tokenizer, spoken[: own.page])
            page = Runtime(f"page in Chromium, fp32, {own.page} utterances", folder / file_name(*FILES[-1]), list)
            rows.append(make_row(page, spoken, found, heard[PYTORCH]))
    write_rows(own.output, rows)


def read_utterances(args: DecodeArgs, tokenizer: PhoneTokenizer) -> list[Spoken]:
    """The first utterances of the sets that the flags name."""
    folders = choose_test_sets(args.decode.test_sets, args.data.data_config).values()
    found = islice(chain.from_iterable(map(utterances, folders)), args.own.utterances)
    return [
        Spoken(samples, tokenizer.phones(tokenizer.encode(normalise(text, tokenizer.pieces))))
        for samples, text in found
    ]


def write_models(recogniser: Recogniser, folder: Path) -> None:
    """The model in every form."""
    config = config_to_dict(Config(recogniser.config))
    state = recogniser.model.state_dict()
    checkpoint.save(folder / CHECKPOINT, {"model": state, "config": config, "tokenizer": recogniser.tokenizer.proto})
    for inputs, precision in FILES:
        write_onnx(recogniser, folder / file_name(inputs, precision), inputs, precision)
    write_tokens(recogniser, folder / "tokens.txt")
    save_pretrained(recogniser, folder / TRANSFORMERS, "")


def runtimes(folder: Path, tokenizer: PhoneTokenizer) -> Iterator[Runtime]:
    """PyTorch first."""
    yield with_pytorch(folder / CHECKPOINT)
    for inputs, precision in FILES:
        yield with_onnxruntime(folder / file_name(inputs, precision), tokenizer, inputs, precision)
    for precision in ("fp32", "int8"):
        yield with_sherpa(folder / file_name("features", precision), precision)
    yield with_transformers(folder / TRANSFORMERS)


def with_pytorch(path: Path) -> Runtime:
    recogniser, fbank = PhoneRecognizer.from_pretrained(path, device="cpu"), Fbank()

    def log_probs(samples: np.ndarray) -> Tensor:
        features = fbank(torch.from_numpy(samples))[None]
        return recogniser.recogniser.log_probs_of(features, torch.tensor([features.shape[1]]))[0][0]

    return Runtime(PYTORCH, path, lambda samples: recogniser.transcribe(samples)[0].phones, log_probs)


def with_onnxruntime(path: Path, tokenizer: PhoneTokenizer, inputs: str, precision: str) -> Runtime:
    model, fbank = OnnxModel(path, torch.get_num_threads()), Fbank()

    def log_probs(samples: np.ndarray) -> Tensor:
        given = torch.from_numpy(samples)
        data = (fbank(given) if inputs == "features" else given)[None]
        return model(data, torch.tensor([data.shape[1]]))[0][0]

    def phones(samples: np.ndarray) -> list[str]:
        found = log_probs(samples)
        return tokenizer.phones(greedy_search(found[None], torch.tensor([len(found)]))[0].tokens)

    return Runtime(f"onnxruntime, {inputs} in, {precision}", path, phones, log_probs)


def with_sherpa(path: Path, precision: str) -> Runtime:
    import sherpa_onnx

    model = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
        model=str(path), tokens=str(path.with_name("tokens.txt")), num_threads=torch.get_num_threads()
    )

    def phones(samples: np.ndarray) -> list[str]:
        stream = model.create_stream()
        stream.accept_waveform(SAMPLING_RATE, samples)
        model.decode_stream(stream)
        return [token for token in stream.result.tokens if token.strip(" ▁")]

    return Runtime(f"sherpa-onnx, {precision}", path, phones)


def with_transformers(folder: Path) -> Runtime:
    # Nothing is asked for on the network, and the small file of remote code is copied to a folder of this run.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    import transformers

    model = transformers.AutoModelForCTC.from_pretrained(folder, trust_remote_code=True).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def log_probs(samples: np.ndarray) -> Tensor:
        logits: Tensor = model(**processor(samples, sampling_rate=SAMPLING_RATE)).logits
        return logits[0]

    def phones(samples: np.ndarray) -> list[str]:
        return list(processor.decode(log_probs(samples).argmax(dim=1)).split())

    return Runtime("transformers, fp32", folder / "model.safetensors", phones, log_probs)


def in_turns(runtimes: Sequence[Runtime], spoken: Sequence[Spoken], repeats: int) -> dict[str, Heard]:
    """What each runtime hears, by its name."""
    for runtime in runtimes:
        runtime.phones(spoken[0].samples)  # what is made once is made now
    heard: dict[str, Heard] = {}
    for _ in range(repeats):
        for runtime in runtimes:
            started = time.perf_counter()
            phones = [runtime.phones(one.samples) for one in spoken]
            seconds = time.perf_counter() - started
            if runtime.name not in heard or seconds < heard[runtime.name].seconds:
                heard[runtime.name] = Heard(phones, seconds, torch.get_num_threads())
    return heard


def largest_difference(pytorch: Runtime, runtime: Runtime, spoken: Sequence[Spoken]) -> float | None:
    """The largest difference of any log-prob from PyTorch's."""
    if pytorch.log_probs is None or runtime.log_probs is None:
        return None
    return max(float((runtime.log_probs(one.samples) - pytorch.log_probs(one.samples)).abs().max()) for one in spoken)


def through_the_page(folder: Path, tokenizer: PhoneTokenizer, spoken: Sequence[Spoken]) -> Heard:
    """What the page of docs/web hears in files of 16 bits, and the seconds that it states; it runs on one thread."""
    from browser import Page
    from webpage import load, served, transcribe

    subprocess.run([ROOT / "docs/web/build.sh", folder / file_name(*FILES[-1]), folder / PAGE], check=True)
    phones, seconds = [], 0.0
    with served(folder / PAGE) as url, Page() as page:
        load(page, url)
        for number, one in enumerate(spoken):
            audio = folder / f"{number}.wav"  # the same name again would be no change to the page
            soundfile.write(audio, one.samples, SAMPLING_RATE, subtype="PCM_16")
            phones.append(tokenizer.phones(tokenizer.encode(transcribe(page, audio))))
            found = re.search(r"in ([\d.]+) s$", page.text("#status"))
            assert found is not None
            seconds += float(found[1])
    return Heard(phones, seconds, threads=1)


def make_row(
    runtime: Runtime, spoken: Sequence[Spoken], heard: Heard, pytorch: Heard, difference: float | None = None
) -> dict[str, Any]:
    """The row of a runtime that heard the first utterances, or all."""
    audio = sum(len(one.samples) for one in spoken[: len(heard.phones)]) / SAMPLING_RATE
    pytorch_speed = sum(len(one.samples) for one in spoken) / SAMPLING_RATE / pytorch.seconds
    speed = audio / heard.seconds
    is_pytorch = heard is pytorch
    pairs = list(zip(heard.phones, pytorch.phones, strict=False))
    counts = score(zip([one.phones for one in spoken], heard.phones, strict=False))
    return row(
        runtime.name,
        "audio s/s",
        round(speed, 1),
        None if is_pytorch else {"name": "PyTorch", "speed": round(pytorch_speed, 1)},
        None if is_pytorch else round(speed / pytorch_speed, 2),
        device=f"CPU, {heard.threads} thread(s)",
        columns={
            "symbols that differ": sum(edit_distance(theirs, ours) for ours, theirs in pairs),
            "of": sum(len(theirs) for _, theirs in pairs),
            "largest log-prob difference": difference and float(f"{difference:.2g}"),
            "PER %": round(counts.per, 3),
            "MB": round(runtime.path.stat().st_size / 1e6, 1),
        },
    )


if __name__ == "__main__":
    main()
