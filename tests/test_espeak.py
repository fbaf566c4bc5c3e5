"""The embedded corpus: same bytes from same options, splits that share nothing, phones at their places in the audio."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="espeakng-loader, which ships espeak-ng, is not installed")
pytest.importorskip("wordfreq", reason="wordfreq, whose word lists the corpus draws from, is not installed")

from local.espeak_library import EspeakError, PhonemeEvent, _locate
from local.espeak_text import SPLITS, WordSource, choose_languages, is_word, read_languages
from local.espeak_voices import VARIANTS, UnclearName, phones_of
from local.prepare_espeak import OPTIONS_FILE, package_versions, plan, prepare
from zipformer_crctc.tokenizer import PhoneTokenizer

LANGUAGES = ("en", "ru", "hi")
SAMPLE = 1 / 16_000


def make(output: Path, jobs: int = 2, seed: int = 1, hours: float = 0.02) -> Path:
    prepare(output, hours, dev_minutes=0.5, test_minutes=0.5, languages=LANGUAGES, jobs=jobs, seed=seed)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("espeak"))


def utterances(folder: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """(cut, samples) of each cut of a split."""
    for path in sorted(folder.glob("cuts.*.jsonl.gz")):
        recording = path.with_name(path.name.replace("cuts", "recording").replace("jsonl.gz", "tar"))
        with gzip.open(path, "rt", encoding="utf-8") as cuts, tarfile.open(recording) as tar:
            for line in cuts:
                cut = json.loads(line)
                member = tar.extractfile(f"{cut['id']}.flac")
                assert member is not None
                samples, rate = soundfile.read(io.BytesIO(member.read()))
                assert rate == 16_000
                yield cut, samples


def all_utterances(corpus: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    for split in SPLITS:
        yield from utterances(corpus / split)


def test_same_bytes_for_any_number_of_processes(corpus: Path, tmp_path: Path) -> None:
    assert contents(make(tmp_path / "alone", jobs=1)) == contents(corpus)
    other = contents(make(tmp_path / "other", seed=2))
    assert other["train/recording.000000.tar"] != contents(corpus)["train/recording.000000.tar"]


def test_a_finished_shard_is_kept_and_a_missing_one_made_again(corpus: Path, tmp_path: Path) -> None:
    make(tmp_path)
    kept, missing = tmp_path / "train" / "cuts.000000.jsonl.gz", tmp_path / "dev" / "cuts.000000.jsonl.gz"
    time = kept.stat().st_mtime_ns
    missing.unlink()
    make(tmp_path)
    assert kept.stat().st_mtime_ns == time
    assert contents(tmp_path) == contents(corpus)


def test_shards_of_other_options_are_refused(corpus: Path) -> None:
    before = contents(corpus)
    with pytest.raises(ValueError, match=r"other options \(hours: 0.02, now 0.03; seed: 1, now 3\).*another --output"):
        make(corpus, seed=3, hours=0.03)
    assert contents(corpus) == before
    options = json.loads((corpus / OPTIONS_FILE).read_text(encoding="utf-8"))
    assert options["espeakng-loader"] == importlib.metadata.version("espeakng-loader")


def test_splits_share_no_word_and_no_voice(corpus: Path) -> None:
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(VARIANTS[one]) & set(VARIANTS[other])
    for language in choose_languages(LANGUAGES):
        words = {split: set(WordSource(language, split).words) for split in SPLITS}
        for one, other in itertools.combinations(SPLITS, 2):
            assert not words[one] & words[other]
        assert len(words["train"]) > 7 * len(words["dev"]) > 1000
        for split in SPLITS:
            for cut, _ in utterances(corpus / split):
                supervision = cut["supervisions"][0]
                assert supervision["speaker"].removeprefix("espeak-") in VARIANTS[split]
                if supervision["language"] == language.code:
                    spoken = {word.rstrip(",.?!") for word in supervision["custom"]["orthography"].split()}
                    assert spoken <= words[split]


def test_each_language_is_spoken_in_each_split(corpus: Path) -> None:
    for split in SPLITS:
        cuts = [cut for cut, _ in utterances(corpus / split)]
        assert {cut["supervisions"][0]["language"] for cut in cuts} == set(LANGUAGES)
        assert len({cut["id"] for cut in cuts}) == len(cuts)


def test_utterances_last_2_to_10_seconds_and_do_not_clip(corpus: Path) -> None:
    for cut, samples in all_utterances(corpus):
        assert 2.0 <= cut["duration"] <= 10.0
        assert len(samples) == cut["recording"]["num_samples"] == round(cut["duration"] / SAMPLE)
        assert 0.05 < np.abs(samples).max() < 0.96


def test_texts_have_only_known_phones(corpus: Path) -> None:
    tokenizer = PhoneTokenizer.from_table()
    for cut, _ in all_utterances(corpus):
        text = cut["supervisions"][0]["text"]
        assert len(text) >= 5
        assert tokenizer.unk_id not in tokenizer.encode(text), text
        assert " " not in text


def test_alignments_are_monotone_and_inside_the_audio(corpus: Path) -> None:
    for cut, samples in all_utterances(corpus):
        supervision = cut["supervisions"][0]
        phones = supervision["alignment"]["phone"]
        assert "".join(symbol for symbol, *_ in phones) == supervision["text"]
        end = 0.0
        for _, start, duration, _ in phones:
            assert start >= end - SAMPLE and duration > 0
            end = start + duration
        assert end <= len(samples) * SAMPLE
        assert 0.04 < phones[0][1] < 0.31
        assert 0.04 < len(samples) * SAMPLE - end < 0.31


def test_alignments_are_where_the_sound_is(corpus: Path) -> None:
    vowels, stops = [], []
    for cut, samples in all_utterances(corpus):
        phones = cut["supervisions"][0]["alignment"]["phone"]
        level = np.sqrt(np.mean(samples**2))
        before = samples[: int((phones[0][1] - 0.01) / SAMPLE)]
        assert np.abs(before).max() < 0.05 * np.abs(samples).max()
        for symbol, start, duration, _ in phones:
            if duration > 0.04:
                part = samples[int(start / SAMPLE) : int((start + duration) / SAMPLE)]
                loudness = np.sqrt(np.mean(part**2)) / level
                if symbol[0] in "aeiouɑɛɔʌ":
                    vowels.append(loudness)
                elif symbol in "ptk":
                    stops.append(loudness)
    assert np.median(vowels) > 0.9
    assert np.median(stops) < 0.4


def test_twenty_languages_by_default_with_words_in_each() -> None:
    chosen = choose_languages([])
    assert len(chosen) >= 20
    assert len({language.script for language in chosen}) >= 5
    for language in chosen:
        assert len(WordSource(language, "test").words) > 800, language


def test_unknown_language_names_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown 'xx'; there are: en \(English\)"):
        prepare(tmp_path, 1, 1, 1, ["en", "xx"], 1, 1)
    with pytest.raises(ValueError, match="named twice"):
        choose_languages(["en", "en"])
    assert not list(tmp_path.iterdir())


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(EspeakError, match="pip install espeakng-loader"):
        _locate()

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(EspeakError, match="pip install espeakng-loader"):
        package_versions()


def test_plan_covers_hundreds_of_hours_in_many_shards() -> None:
    languages = choose_languages([])
    one, many = (plan("train", hours, languages, 1, Path()) for hours in (1.0, 300.0))
    assert len(one) == 8
    assert sum(job.count for job in many) == 300 * 600
    assert all(job.count <= 1000 for job in many)
    assert [job.first for job in many] == list(itertools.accumulate([0, *(job.count for job in many[:-1])]))


@pytest.mark.parametrize(
    ("name", "phones"),
    [
        ("ˈaɪ", "aɪ"),
        ("ɚ", "ə˞"),
        ("ᵻ", "ɪ"),
        ("ɡ", "g"),
        ("t͡s", "ts"),
        ("ɫ", "l\u0334"),
        ("r̝̊", "r\u0325"),
        ("r.", "ɽ"),
        ("n#", "n\u0325"),
        ('ˈu"', "ʉ"),
        ("ˈe-", "e"),
        ("ˈ?ɑ", "ɑ"),
        ("?", ""),
        ("ʔ", "ʔ"),
        ("ç", "ç"),
        ("(en)", ""),
        ("", ""),
    ],
)
def test_phoneme_names(name: str, phones: str) -> None:
    assert phones_of(PhonemeEvent(name, 0, full=False), PhoneTokenizer.from_table()) == phones


def test_a_name_that_fills_its_field_is_completed_or_refused() -> None:
    tokenizer = PhoneTokenizer.from_table()
    assert phones_of(PhonemeEvent("ˈɐ̃ʊ", 0, full=True), tokenizer) == "ɐ̃ʊ̃"
    with pytest.raises(UnclearName, match="cut off: aaaaaaaa"):
        phones_of(PhonemeEvent("aaaaaaaa", 0, full=True), tokenizer)
    with pytest.raises(UnclearName, match="unknown symbol in Q"):
        phones_of(PhonemeEvent("Q", 0, full=False), tokenizer)


@pytest.mark.parametrize(
    ("word", "script", "expected"),
    [
        ("house", "LATIN", True),
        ("don't", "LATIN", True),
        ("café", "LATIN", True),
        ("किताब", "DEVANAGARI", True),
        ("می\u200cخواهم", "ARABIC", True),
        ("дом", "LATIN", False),
        ("x", "LATIN", False),
        ("00", "LATIN", False),
        ("mp3", "LATIN", False),
        ("www.x.com", "LATIN", False),
        ("'tis", "LATIN", False),
        ("", "LATIN", False),
    ],
)
def test_is_word(word: str, script: str, expected: bool) -> None:
    assert is_word(word, script) is expected


def test_table_of_languages_is_sound() -> None:
    for code, language in read_languages().items():
        assert language.code == code
        assert language.name and language.script.isupper() and all(language.voices)
