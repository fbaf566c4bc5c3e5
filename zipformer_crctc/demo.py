"""A page that this machine serves to its own browser: `python zipformer_crctc/demo.py --model MODEL`.

Record or upload, see the phones at their times and a spectrogram, take them along as a TextGrid. Nothing comes from or
goes to any other machine. `--help` lists the flags.

Legend: S samples at 16 kHz.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.audio import AudioError, AudioStream
from zipformer_crctc.commandline import run_program
from zipformer_crctc.features import SAMPLING_RATE
from zipformer_crctc.recognizerflags import ModelFlags, RecognizerArgs, parse_recognizer_args
from zipformer_crctc.reportcolours import colour, definitions
from zipformer_crctc.spectrogram import Tier, spectrogram
from zipformer_crctc.text import visible
from zipformer_crctc.timefiles import TimedUtterance, join_marks, textgrid
from zipformer_crctc.times import Segment
from zipformer_crctc.transcriber import PhoneRecognizer

logger = logging.getLogger(__name__)

DECODE_FIELDS = ("decoding_method", "beam", "insertion_bonus", "blank_penalty", "device", "precision", "num_threads")
"""The fields of DecodeConfig that are flags here too."""
ALL_PHONES = "all phones"
SHOWN_SECONDS = 60.0
"""A browser would be slow with the pictures and phones of hours; the text and the TextGrid hold all."""
LABEL_WIDTH = 60
"""Pixels that a spectrogram needs beside its picture."""
KEPT_SECONDS = 3600
"""Recordings are deleted when they are as old as this, and all files when the program ends."""
FONTS = ("Noto Sans", "DejaVu Sans", "Segoe UI", "Lucida Grande", "Charis SIL", "Doulos SIL", "sans-serif")
"""Those of the machine that have many IPA symbols; what one lacks is taken from the next."""

STYLE = """
.heard svg { display: block; max-width: 100%; height: auto; margin-bottom: 12px }
.dark .heard svg image { filter: invert(1) }
.heard ol { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: 4px 0; padding: 0 }
.heard ol li { min-width: 62px; margin: 0; padding: 2px 6px; text-align: center;
  border: 1px solid var(--line); border-radius: 6px }
.heard b { display: block; font-size: 21px; font-weight: 400; line-height: 1.5; color: var(--first) }
.heard small { font-size: 11px; color: var(--grey); font-variant-numeric: tabular-nums }
@media (max-width: 640px) { .heard ol { gap: 4px } .heard ol li { min-width: 0; width: 44px; padding: 2px 4px }
  .heard small { display: block; font-size: 10px; line-height: 1.3 } }
.heard p { color: var(--grey) }
.heard .problem { color: var(--wrong); overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class DemoConfig(ModelFlags):
    """Which model is shown, and where."""

    program = "demo"
    inventories: Path | None = None
    """Folder of phone inventories to choose from, files LANGUAGE.txt as local/phone_inventory.py writes them."""
    host: str = "127.0.0.1"
    """Address to serve; 0.0.0.0 lets other machines in, where browsers allow files but no microphone."""
    port: int = 0
    """Port to serve; 0 is the first free one from 7860 on."""
    open_browser: bool = True
    """Open the page in the browser of this machine."""


@dataclass(frozen=True)
class Heard:
    """What the page shows of a recording."""

    html: str
    phones: str
    """With spaces between them."""
    textgrid: str | None
    """The path of the file; None where there is nothing to take along."""


class Demo:
    """What happens when something is pressed.

    Args:
        recognizer: the model.
        inventories: phone inventories by name, each the text of its file.
        folder: for TextGrids.
    """

    def __init__(self, recognizer: PhoneRecognizer, inventories: Mapping[str, str], folder: Path) -> None:
        self.recognizer = recognizer
        self.inventories = inventories
        self.folder = folder

    def transcribe(self, audio: str | None, inventory: str, width: float | None = None) -> Heard:
        """Transcribe a recording; what is wrong with the input becomes a message on the page.

        audio: path of a file. inventory: phones that may come out, none for all. width: of the page in pixels.
        """
        try:
            if audio is None:
                raise ValueError("no audio: record something or upload a file first")
            path = Path(audio)
            samples, warning = _read(path)
            recognizer = self.recognizer.with_inventory(inventory) if inventory.strip() else self.recognizer
            (result,) = recognizer.transcribe(samples)
            if result.problem is not None:
                raise ValueError(f"{path.name}: {result.problem}")
        except ValueError as error:
            return Heard(_note(str(error), "problem"), "", None)
        segments = join_marks(result.segments)
        file = Path(tempfile.mkdtemp(dir=self.folder)) / f"{path.stem}.TextGrid"
        file.write_text(textgrid(TimedUtterance(path.stem, result.duration, segments)), encoding="utf-8")
        notes = [f"{path.name}: {warning}"] if warning else []
        return Heard(picture(samples, segments, width, notes), " ".join(s.phone for s in segments), str(file))

    def inventory(self, name: str) -> str:
        """The phones of the inventory that was chosen; none for all phones."""
        return self.inventories.get(name, "")


def picture(
    samples: NDArray[np.float32], segments: Sequence[Segment], width: float | None = None, notes: Sequence[str] = ()
) -> str:
    """HTML of a recording: its spectrogram, and below it the phones with their times.

    samples: (S,). width: of the page in pixels.
    """
    notes = [*notes, *([] if segments else ["No phones were heard."])]
    if len(samples) > SHOWN_SECONDS * SAMPLING_RATE:
        notes.append(f"Shown are the first {SHOWN_SECONDS:g} s; the text and the TextGrid hold all.")
        samples = samples[: round(SHOWN_SECONDS * SAMPLING_RATE)]
        segments = [segment for segment in segments if segment.end <= SHOWN_SECONDS]
    tier = Tier("", colour("first"), [(s.phone, s.start, s.end) for s in segments])
    strip = round(min(1200, max(240, (width or 860) - LABEL_WIDTH)))
    items = "".join(
        f'<li title="confidence {s.confidence:.2f}"><b>{escape(visible(s.phone))}</b>'
        f"<small>{s.start:.2f}–{s.end:.2f}</small></li>"
        for s in segments
    )
    phones = f'<ol lang="und-fonipa" aria-label="phones, with start and end in seconds">{items}</ol>' if items else ""
    return f"{''.join(map(_note, notes))}{spectrogram(samples, SAMPLING_RATE, [tier], strip)}{phones}"


def _note(text: str, kind: str = "note") -> str:
    role = ' role="alert"' if kind == "problem" else ""
    return f'<p class="{kind}"{role}>{escape(text)}</p>'


def _read(path: Path) -> tuple[NDArray[np.float32], str | None]:
    """The samples (S,) of a file, and what is odd about it. Raises ValueError with the name of one that is no audio."""
    stream = AudioStream(path)
    try:
        return np.concatenate(list(stream)), stream.warning
    except AudioError as error:
        raise ValueError(f"{path.name}: {error}") from error


def read_inventories(folder: Path) -> dict[str, str]:
    """The texts of the inventories LANGUAGE.txt in a folder, by language. Raises ValueError where there are none."""
    texts = {path.stem: read_text(path) for path in sorted(folder.glob("*.txt"))}
    if not texts:
        raise ValueError(
            f"--inventories {folder}: no file LANGUAGE.txt there; write some with local/phone_inventory.py"
        )
    return texts


def read_text(path: str | Path) -> str:
    """The text of an inventory. Raises ValueError with the file's name for what is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{Path(path).name}: cannot be read as UTF-8 text ({error})") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; status 2 for a bad configuration or model."""
    run_program("demo.py", lambda: parse_args(argv), run)


def parse_args(argv: Sequence[str] | None = None) -> RecognizerArgs[DemoConfig]:
    """The checked configuration. Raises ConfigError; exits with status 2 for unknown flags and with 0 for --help."""
    parser = argparse.ArgumentParser(description="Show a model in the browser of this machine.", allow_abbrev=False)
    return parse_recognizer_args(parser, DemoConfig, DECODE_FIELDS, argv, lambda config, inputs: [])


def run(args: RecognizerArgs[DemoConfig]) -> None:
    """Load the model and serve the page until the program is interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it names every request to the page itself
    for warning in args.warnings:
        logger.warning(warning)
    inventories = {} if args.config.inventories is None else read_inventories(args.config.inventories)
    recognizer = args.load()
    with tempfile.TemporaryDirectory() as folder:
        page, url = serve(Demo(recognizer, inventories, Path(folder)), args.config)
        logger.info("the page is at %s; Ctrl-C ends it", url)
        page.block_thread()


def serve(demo: Demo, config: DemoConfig) -> tuple[Any, str]:
    """Start to serve the page; returns gradio's Blocks, whose `close()` ends it, and the address.

    Raises ValueError for a port or an address that cannot be had.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which may report already
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", font=[gr.themes.Font(name) for name in FONTS])
    page = build_page(demo, str(config.model))
    try:
        _, url, _ = page.launch(
            server_name=config.host,
            server_port=config.port or None,
            inbrowser=config.open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            theme=theme,
            css=definitions(dark_class="dark") + STYLE,
        )
    except OSError as error:
        raise ValueError(f"--host {config.host} --port {config.port}: {error}; give another port") from error
    return page, url


def build_page(demo: Demo, model: str) -> Any:
    """The page as gradio's Blocks."""
    import gradio as gr

    def transcribe(audio: str | None, inventory: str, width: float | None) -> tuple[str, str, Any]:
        heard = demo.transcribe(audio, inventory, width)
        return heard.html, heard.phones, gr.DownloadButton(value=heard.textgrid, interactive=heard.textgrid is not None)

    def upload(path: str) -> tuple[str, str]:
        try:
            return read_text(path), ""
        except ValueError as error:
            return "", _note(str(error), "problem")

    with gr.Blocks(title="Speech to IPA", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gr.Markdown(f"# Speech to IPA\nModel: {escape(Path(model).name)}. Recordings stay on this machine.")
        with gr.Row():
            audio = gr.Audio(
                sources=["upload", "microphone"], type="filepath", label="Recording", scale=3, buttons=["download"]
            )
            with gr.Column(scale=2):
                names = [ALL_PHONES, *demo.inventories]
                language = gr.Dropdown(names, label="Phone inventory", visible=len(names) > 1)
                inventory = gr.Textbox(
                    label="Phones that may come out",
                    lines=4,
                    max_lines=6,
                    placeholder="all phones, or such as: a i u p t k",
                    elem_id="inventory",
                )
                file = gr.UploadButton("Phones from a file", file_types=["text"], size="sm")
        button = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
        with gr.Row():
            phones = gr.Textbox(
                label="Phones", interactive=False, buttons=["copy"], elem_id="phones", scale=4, min_width=320
            )
            download = gr.DownloadButton(
                "Download TextGrid", interactive=False, elem_id="textgrid", size="md", scale=1, min_width=180
            )
        shown = gr.HTML(elem_id="heard", elem_classes="heard")
        width = gr.Number(visible=False)
        # The browser alone knows how wide the page is.
        measured = "(audio, phones) => [audio, phones, document.getElementById('heard').clientWidth]"
        button.click(transcribe, [audio, inventory, width], [shown, phones, download], js=measured)
        language.change(demo.inventory, language, inventory)
        file.upload(upload, file, [inventory, shown])
    return page


if __name__ == "__main__":
    main()
