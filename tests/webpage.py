"""The page of docs/web, built and served, and what one does with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from browser import Page

BUILD = Path(__file__).resolve().parents[1] / "docs" / "web" / "build.sh"
NOTHING_FETCHED = 3
"""Exit status of build.sh where the runtime cannot be fetched."""
_STATUS = "document.getElementById('status')?.textContent ?? ''"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def load(page: Page, url: str) -> None:
    """Open the page and wait for its model."""
    page.open(url)
    status = page.wait(_STATUS, lambda text: text.startswith(("Ready", "Failed")))
    assert status == "Ready.", status


def transcribe(page: Page, audio: Path) -> str:
    """The phones that the page hears in a file, without spaces."""
    _forget(page)
    page.choose_file("#file", audio)
    return _phones(page)


def record(page: Page, seconds: float) -> str:
    """The phones that the page hears from its microphone, without spaces."""
    _forget(page)
    page.click("#record")
    page.wait(_STATUS, lambda text: text.startswith(("Recording", "Failed")))
    time.sleep(seconds)
    page.click("#record")
    return _phones(page)


def _forget(page: Page) -> None:
    page.value("document.getElementById('status').textContent = ''")


def _phones(page: Page) -> str:
    status = page.wait(_STATUS, lambda text: "of audio in" in text or text.startswith("Failed"))
    assert "of audio in" in status, status
    return "".join(page.text("#phones").split()).removesuffix("–")
