"""A headless Chromium for tests of pages, driven over a pair of pipes (Chrome DevTools Protocol); no package needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""The program; the environment variable CHROMIUM goes first."""
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; or set CHROMIUM to its path")

PATIENCE = 120.0
"""Seconds until a page that does not answer fails the test."""
AGAIN = 15.0
"""Seconds after which an action without effect is taken again."""
# Chromium reads commands from descriptor 3 and answers to 4; they are put there between fork and exec.
_START = """
import os, sys
read, write = (os.dup(os.dup(int(fd))) for fd in sys.argv[1:3])
os.dup2(read, 3); os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A tab of a browser of its own; a context manager. Flags are Chromium's."""

    def __init__(self, *flags: str) -> None:
        assert CHROMIUM is not None
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        self.errors: list[str] = []
        """Exceptions that no script caught."""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._last, self._buffer, self._session = 0, b"", None
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        headless = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        start = [sys.executable, "-ISc", _START, str(commands), str(answers), CHROMIUM, "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [*start, f"--user-data-dir={self._profile.name}", *headless, *quiet, *flags],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)

    def __enter__(self) -> Page:
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Network", "Page", "Runtime", "DOM"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._session = None
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for fd in (self._to, self._from):
            os.close(fd)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and what it gives back."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"]))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            if not (data := os.read(self._from, 1 << 16)):
                raise EOFError("Chromium has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, script: str, holds: Callable[[Any], bool] = bool, patience: float = PATIENCE) -> Any:
        """The value of an expression as soon as it is true, or as something holds of it; patience in seconds."""
        deadline = time.monotonic() + patience
        while not holds(value := self.value(script)):
            if time.monotonic() > deadline:
                shown = self.value("document.body.innerText")
                raise TimeoutError(
                    f"waited in vain for {script}; it is {value!r}; errors: {self.errors}; page: {shown}"
                )
            time.sleep(0.05)
        return value

    def until(self, action: Callable[[], None], script: str, holds: Callable[[Any], bool] = bool) -> Any:
        """The same after an action, taken again now and then: what a page gets before it listens is lost."""
        last = time.monotonic() + PATIENCE - AGAIN
        while time.monotonic() < last:
            action()
            with contextlib.suppress(TimeoutError):
                return self.wait(script, holds, AGAIN)
        action()
        return self.wait(script, holds, AGAIN)

    def text(self, selector: str) -> str:
        """The text of an element; empty where there is none."""
        return str(self.value(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))

    def click(self, selector: str) -> None:
        """Click an element, as soon as it is there and enabled."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"{found} && !{found}.disabled")
        self.value(f"{found}.click()")

    def download(self, selector: str, folder: Path) -> Path:
        """Click an element that downloads one file; where the file is, in an empty folder."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.click(selector)
        deadline = time.monotonic() + PATIENCE
        while not (files := [file for file in folder.iterdir() if file.suffix != ".crdownload"]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{selector}: nothing was downloaded")
            self.value("0")  # a sign of life, and events are received
            time.sleep(0.05)
        return files[0]

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an <input type="file">."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path.resolve())], nodeId=node)

    def type(self, selector: str, text: str) -> None:
        """Give a text to an <input> or <textarea>, as if it were typed."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window in pixels, and whether the screen is dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
