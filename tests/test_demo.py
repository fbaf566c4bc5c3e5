"""The page of `zipa demo`: what its buttons do, and the page itself in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from browser import Page, needs_chromium
from random_checkpoint import write_checkpoint
from shar_folder import tone
from zipformer_crctc import demo
from zipformer_crctc.transcriber import PhoneRecognizer

RATE = 16_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("demo") / "model.pt")


@pytest.fixture
def shown(model: Path, tmp_path: Path) -> demo.Demo:
    (tmp_path / "results").mkdir()
    inventories = {"two": "# two: phones\na\nb\n"}
    return demo.Demo(PhoneRecognizer.from_pretrained(model, device="cpu"), inventories, tmp_path / "results")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a <b>.wav", tone(1.0), RATE)
    return tmp_path / "a <b>.wav"


def test_a_recording_becomes_phones_a_picture_and_a_textgrid(shown: demo.Demo, recording: Path) -> None:
    (want,) = shown.recognizer.transcribe(str(recording))
    heard = shown.transcribe(str(recording), "  ", 400)
    assert want.phones and heard.phones.replace(" ", "") == "".join(want.phones)
    assert heard.html.count("<li ") == len(heard.phones.split())
    assert f"<small>{want.starts[0]:.2f}–" in heard.html and 'class="problem"' not in heard.html
    assert [int(width) for width in re.findall(r'<svg [^>]*? width="(\d+)"', heard.html)] == [300]
    assert heard.textgrid is not None and Path(heard.textgrid).name == "a <b>.TextGrid"
    grid = Path(heard.textgrid).read_text(encoding="utf-8")
    assert [text for text in re.findall(r'text = "(.*)"', grid) if text] == heard.phones.split()


def test_only_phones_of_the_inventory_come_out(shown: demo.Demo, recording: Path) -> None:
    heard = shown.transcribe(str(recording), shown.inventory("two"))
    assert set(heard.phones.split()) <= {"a", "b"} and 'class="problem"' not in heard.html
    assert shown.inventory(demo.ALL_PHONES) == ""
    again = shown.transcribe(str(recording), "")
    assert not set(again.phones.split()) <= {"a", "b"}, "the inventory is of one request"


def test_bad_input_is_named_on_the_page(shown: demo.Demo, recording: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "short.wav", np.zeros(100), RATE)
    (tmp_path / "text.wav").write_text("no audio")
    messages = {
        (None, ""): "no audio: record something or upload a file first",
        ("none.wav", ""): "none.wav: no samples",
        ("short.wav", ""): "short.wav: too short",
        ("text.wav", ""): "text.wav: cannot be decoded",
        ("gone.wav", ""): "gone.wav: no such file",
        (recording.name, "a\nPH b"): "phone inventory: the tokenizer cannot write these phones: PH (line 2)",
        (recording.name, "# nothing"): "phone inventory: lists no phones",
    }
    for (name, inventory), message in messages.items():
        heard = shown.transcribe(None if name is None else str(tmp_path / name), inventory)
        assert 'class="problem" role="alert"' in heard.html and message in heard.html, message
        assert heard.phones == "" and heard.textgrid is None


def test_silence_and_long_recordings_say_what_is_shown(
    shown: demo.Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No phones were heard." in demo.picture(np.zeros(RATE, np.float32), [])
    monkeypatch.setattr(demo, "SHOWN_SECONDS", 0.5)
    soundfile.write(tmp_path / "long.wav", tone(1.0), RATE)
    heard = shown.transcribe(str(tmp_path / "long.wav"), "")
    assert "Shown are the first 0.5 s" in heard.html and "from 0.00 to 0.50 s" in heard.html
    assert heard.html.count("<li ") < len(heard.phones.split())


def test_inventories_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file LANGUAGE\.txt there"):
        demo.read_inventories(tmp_path)
    (tmp_path / "es.txt").write_text("a e", encoding="utf-8")
    assert demo.read_inventories(tmp_path) == {"es": "a e"}
    (tmp_path / "fr.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"fr\.txt: cannot be read as UTF-8"):
        demo.read_inventories(tmp_path)


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--avg", "0", "--beam", "0"])
    problems = capsys.readouterr().err
    assert stop.value.code == 2 and "--model is missing" in problems and "--avg 0: must be at least 1" in problems
    demo.main(["--model", "m.pt", "--beam", "8", "--decoding-method", "ctc-prefix-beam-search", "--print-config"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["demo"]["model"] == "m.pt" and printed["decode"]["beam"] == 8


@needs_chromium
def test_the_page_in_a_browser(shown: demo.Demo, recording: Path, tmp_path: Path) -> None:
    """A file goes in, phones, their times and a TextGrid come out; nothing is asked of any other machine."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[demo]'")
    want = shown.transcribe(str(recording), "a b")
    page, url = demo.serve(shown, demo.DemoConfig(model="model.pt", open_browser=False))
    try:
        with Page() as browser:
            browser.open(url)
            # The upload comes first: its answer shows that the page is ready for what is typed.
            play = "!!document.querySelector('[aria-label=\"Play\"]')"
            browser.until(lambda: browser.choose_file("input[type=file]", recording), play)
            browser.type("#inventory textarea", "a b")
            shown_phones = "[...document.querySelectorAll('#heard li b')].map((node) => node.textContent)"
            found = browser.until(lambda: browser.click("#transcribe"), shown_phones)
            assert found == want.phones.split()
            assert browser.value("document.querySelector('#phones textarea').value") == want.phones
            assert browser.value("document.querySelectorAll('#heard svg image').length") == 1
            (tmp_path / "downloads").mkdir()
            file = browser.download("#textgrid", tmp_path / "downloads")
            assert want.textgrid is not None and file.suffix == ".TextGrid"
            assert file.read_text(encoding="utf-8") == Path(want.textgrid).read_text(encoding="utf-8")
            browser.until(lambda: browser.click('[aria-label="Clear"]'), f"!({play})")
            problem = "document.querySelector('#heard .problem')?.textContent"
            browser.until(lambda: browser.click("#transcribe"), problem, lambda text: "no audio" in (text or ""))
            elsewhere = [address for address in browser.requests if not address.startswith((url, "data:", "blob:"))]
            assert elsewhere == [] and browser.errors == []
    finally:
        page.close()
