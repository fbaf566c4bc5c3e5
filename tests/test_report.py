"""The report as a whole."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scored_results import random_results
from shar_folder import write_folder
from zipformer_crctc import report, reportsections
from zipformer_crctc.results import UtteranceResult, json_lines

EVIL = '<script>alert("x")</script>'


class Tags(HTMLParser):
    """Collects tags, and checks that they close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def write(path: Path, results: list[UtteranceResult]) -> Path:
    path.write_text(json_lines(results), encoding="utf-8")
    return path


def run(*flags: object) -> str:
    report.main([str(flag) for flag in flags])
    page = Path(str(flags[flags.index("--output") + 1])).read_text(encoding="utf-8")
    tags = Tags(page)
    for tag, attributes in tags.seen:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), "everything is inside"
    assert not re.search(r"@import|url\(", page)
    return page


def test_one_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "results-mine-iter-1-avg-1.jsonl", random_results(40))
    page = run(file, "--output", tmp_path / "report.html", "--worst", 5)
    for title in (
        "Summary",
        "Languages",
        "Phones",
        "Confusions",
        "Features",
        "Speakers",
        "Worst utterances",
    ):
        assert f">{title}</h2>" in page
    assert page.count("<article>") == 5
    assert "report.md" in capsys.readouterr().out
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| l00 | 14 |" in markdown and "| total" not in markdown
    assert re.search(r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", markdown)
    assert page == run(file, "--output", tmp_path / "again.html", "--worst", 5), "seeded"


def test_two_systems_with_audio(tmp_path: Path) -> None:
    ids = write_folder(tmp_path / "test", [0.5] * 12)
    config = tmp_path / "data.yaml"
    config.write_text("test: {mine: test}\n", encoding="utf-8")
    files = []
    for rate in (0.5, 0.1):
        results = [replace(r, id=name) for r, name in zip(random_results(12, rate), ids, strict=True)]
        files.append(write(tmp_path / f"results-mine-iter-{round(10 * rate)}-avg-1.jsonl", results))
    page = run(
        *files, "--names", f"first,{EVIL}", "--data-config", config, "--clips", 3, "--output", tmp_path / "report.html"
    )
    assert ">B better</h2>" in page and "is better: a PER of" in page
    assert page.count("<audio") == page.count("<image") == 3, "once each, although utterances stand in several lists"
    linked = re.findall(r'<a href="#(utterance-\d+)">Audio', page)
    assert linked and all(f'<h3 id="{anchor}">' in page for anchor in linked)
    assert "spectrogram" in page and "Audio is embedded for 3 of the 12" in page
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| first |" in markdown and "<script" not in markdown.replace("\\<", "")


def test_text_is_escaped(tmp_path: Path) -> None:
    results = [UtteranceResult(EVIL, ["a", EVIL], [EVIL, EVIL, "b"], EVIL, EVIL), *random_results(5)]
    file = write(tmp_path / "results-x&<b>.jsonl", results)
    run(file, "--output", tmp_path / "report.html")
    assert "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8").replace("\\<", "")


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    results = [*random_results(5), UtteranceResult("noref", [], ["p"]), UtteranceResult("nohyp", ["ʜ", "a"], [])]
    write(tmp_path / "results-a-iter-1-avg-1.jsonl", results)
    write(tmp_path / "results-b-iter-1-avg-1.jsonl", [UtteranceResult("x", [], ["a"])])
    page = run(tmp_path, "--output", tmp_path / "report.html")
    assert "a: without a reference and not scored: 1 utterances (noref)." in page
    assert "b: none of the 1 utterances has a reference; nothing of it is scored." in page
    assert "Empty hypotheses, scored as deletions: 1 utterances (nohyp)." in page
    assert "LETTER SMALL CAPITAL H" in page


def test_nothing_to_score(tmp_path: Path) -> None:
    file = write(tmp_path / "results-a.jsonl", [UtteranceResult("x", [], ["a"])])
    assert "nothing is scored" in run(file, "--output", tmp_path / "report.html")
    assert "nothing is scored" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_all_correct(tmp_path: Path) -> None:
    file = write(tmp_path / "results-a.jsonl", [UtteranceResult("x", ["a"], ["a"])])
    assert "No errors." in run(file, "--output", tmp_path / "report.html")


@pytest.mark.parametrize("systems", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_few_utterances_without_language_and_speaker(count: int, systems: int, tmp_path: Path) -> None:
    files = []
    for number in range(systems):
        results = [UtteranceResult(f"x{i}", ["a", "p"], ["a"][number:]) for i in range(count)]
        files.append(write(tmp_path / f"results-{'ab'[number]}.jsonl", results))
    page = run(*files, "--output", tmp_path / "report.html")
    assert "No utterance names its language." in page and ">Speakers</h2>" not in page
    assert "## By language" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert ("too few to compare" in page) == (systems == 2 and count == 1)


def test_a_language_that_only_one_system_has(tmp_path: Path) -> None:
    results = random_results(9)
    files = [write(tmp_path / "results-a.jsonl", results), write(tmp_path / "results-b.jsonl", results[:2])]
    page = run(*files, "--output", tmp_path / "report.html")
    assert "l02: 3, no utterances" in page
    assert "Only a has 7 utterances" in page


def test_one_system_without_references(tmp_path: Path) -> None:
    bare = [replace(result, ref=[]) for result in random_results(4)]
    files = [write(tmp_path / "results-a.jsonl", random_results(4)), write(tmp_path / "results-b.jsonl", bare)]
    assert "none of the 4 utterances has a reference" in run(*files, "--output", tmp_path / "report.html")


def test_long_tables_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reportsections, "_MOST_ROWS", 3)
    file = write(tmp_path / "results-a.jsonl", random_results(14))
    page = run(file, "--output", tmp_path / "report.html")
    assert '<th scope="row">4 more with fewer errors</th><td>8</td>' in page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere"], "no such file or folder"),
        (["results-a.jsonl", "results-b.jsonl"], "no scored utterance in common"),
        (["results-a.jsonl", "--names", "a,b"], "2 names for 1 systems"),
        (["results-cut.jsonl"], "results-cut.jsonl, line 2"),
        (["results-a.jsonl", "--data-config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_bad_input_ends_with_one_message(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results-a.jsonl", random_results(3))
    write(tmp_path / "results-b.jsonl", random_results(3, prefix="v"))
    (tmp_path / "results-cut.jsonl").write_text(json_lines(random_results(2))[:-9], encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        report.main(flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not Path("report.html").exists()
