"""The model card of a folder for transformers, from the model and the tables of its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from zipformer_crctc.recogniser import Recogniser

_USE = """```python
import soundfile
from transformers import AutoModelForCTC, AutoProcessor

folder = "."  # or the name of this model on the hub
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCTC.from_pretrained(folder, trust_remote_code=True)

samples, rate = soundfile.read("speech.wav", dtype="float32")  # 16 kHz, one channel
inputs = processor([samples], sampling_rate=rate)
ids = model(**inputs).logits.argmax(dim=-1)
print(processor.batch_decode(ids))  # ["s p iː tʃ"]
```"""


def model_card(
    recogniser: Recogniser, name: str, license: str, languages: Sequence[str], summaries: Mapping[str, str]
) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads.

    Args:
        recogniser: the model.
        name: of the model.
        license: of its weights, by its name on the hub.
        languages: codes; none means those of the tables.
        summaries: Markdown tables of decode.py, by the name of the test set.
    """
    languages = languages or sorted({code for table in summaries.values() for code in _rows(table) if code != "total"})
    parameters = sum(parameter.numel() for parameter in recogniser.model.parameters())
    rates = {test: cells[2] for test, table in summaries.items() if (cells := _rows(table).get("total"))}
    results = "\n\n".join(f"### {test}\n\n{table}" for test, table in summaries.items())
    milliseconds = 20 * recogniser.factor
    return "\n".join(
        [
            "---",
            f"license: {license}",
            "library_name: transformers",
            "pipeline_tag: automatic-speech-recognition",
            "tags: [phonetics, ipa, phone-recognition, zipformer, cr-ctc]",
            *([f"language: {json.dumps(list(languages))}"] if languages else []),
            *_model_index(name, rates),
            "---",
            "",
            f"# {name}",
            "",
            f"Speech to IPA phones: a Zipformer encoder with CTC, {parameters / 1e6:.1f} M parameters,",
            f"{recogniser.tokenizer.vocab_size} symbols, one output frame for each {milliseconds} ms.",
            "Trained with zipformer_crctc (CR-CTC, the recipe of ZIPA, ACL 2025).",
            "",
            "## Use",
            "",
            "It needs the package zipformer_crctc: `pip install '.[hf]'` in a clone of its repository.",
            "",
            _USE,
            "",
            "## Results",
            "",
            results or "Not known: no test set was decoded with this choice of checkpoints.",
            "",
            "Greedy decoding. PER counts every symbol, without word boundaries; PFER is panphon's feature distance.",
            "",
            "## Limits",
            "",
            "Speech of other languages, channels or styles than those of training can be recognised much worse.",
            "",
        ]
    )


def _rows(table: str) -> dict[str, list[str]]:
    """Cells of a Markdown table by the first one, header left out."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in lines[2:]}


def _model_index(name: str, rates: Mapping[str, str]) -> list[str]:
    """The PER of each test set, as the hub reads it."""
    if not rates:
        return []
    lines = ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for test, rate in rates.items():
        lines += [
            "  - task: {type: automatic-speech-recognition}",
            f"    dataset: {{name: {json.dumps(test)}, type: {json.dumps(test)}}}",
            f"    metrics: [{{type: per, name: phone error rate in percent, value: {rate}}}]",
        ]
    return lines
