"""Compare the page of docs/web with the recogniser in Python, on recordings, in headless Chromium:

    docs/web/build.sh exp/espeak/onnx/model-audio.onnx FOLDER
    python tests/optional/web_page.py FOLDER --model exp/espeak AUDIO... --screenshots DIR

Each recording goes in as a file, and with --microphone once more through a made-up microphone, as it is played. Printed
are the symbols in which each differs from Python's; exit status 1 where one of the files does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parents[level]) for level in (2, 1)]

from browser import Page
from webpage import load, record, served, transcribe
from zipformer_crctc.metrics import edit_distance
from zipformer_crctc.transcriber import PhoneRecognizer

LOOKS = {"desktop": (1280, 720), "narrow": (400, 720)}
"""Sizes of the screenshots in pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made by docs/web/build.sh")
    parser.add_argument("audio", type=Path, nargs="+")
    parser.add_argument("--model", required=True, help="as of zipa transcribe")
    parser.add_argument("--avg", type=int, default=1)
    parser.add_argument("--iter", type=int, default=0)
    parser.add_argument("--microphone", action="store_true", help="play the recordings to a microphone as well")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the page")
    args = parser.parse_args()
    recognizer = PhoneRecognizer.from_pretrained(args.model, device="cpu", avg=args.avg, iter=args.iter)
    results = dict(zip(args.audio, recognizer.transcribe(list(map(str, args.audio))), strict=True))
    wanted = {path: "".join(result.phones) for path, result in results.items()}
    with served(args.folder) as url:
        with Page() as page:
            load(page, url)
            wrong = compare("file", ((path, transcribe(page, path)) for path in args.audio), wanted)
            if args.screenshots is not None:
                take_pictures(page, args.screenshots)
            elsewhere = [request for request in page.requests if not request.startswith((url, "data:", "blob:"))]
        if args.microphone:
            played = ((path, from_microphone(url, path, results[path].duration)) for path in args.audio)
            compare("microphone", played, wanted)
    print(f"requests to other places: {elsewhere or 'none'}")
    sys.exit(1 if wrong or elsewhere else 0)


def from_microphone(url: str, path: Path, seconds: float) -> str:
    """The phones of a recording that is played to the microphone, once."""
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with Page(*flags, f"--use-file-for-fake-audio-capture={path.resolve()}%noloop") as page:
        load(page, url)
        return record(page, seconds + 0.5)


def compare(kind: str, heard: Iterable[tuple[Path, str]], wanted: dict[Path, str]) -> int:
    """Print how far each is from what is wanted; returns the number of symbols that differ."""
    total = 0
    for path, phones in heard:
        errors = edit_distance(wanted[path], phones)
        total += errors
        print(f"{kind}: {path.name}: {len(wanted[path])} symbols, {errors} differ", flush=True)
    print(f"{kind}: {len(wanted)} recordings, {sum(map(len, wanted.values()))} symbols, {total} differ")
    return total


def take_pictures(page: Page, folder: Path) -> None:
    """Write the page as it is now, wide and narrow, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in LOOKS.items():
        for dark in (False, True):
            page.look(*size, dark)
            page.screenshot(folder / f"{name}-{'dark' if dark else 'light'}.png")


if __name__ == "__main__":
    main()
