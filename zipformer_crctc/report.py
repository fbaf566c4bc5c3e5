"""Turn decoding results into a page to look at: `python zipformer_crctc/report.py exp/espeak/ctc-greedy-search`.

Reads the JSON lines of decode.py, and audio where --data-config names its shards. Writes one self-contained HTML file
and its tables as Markdown. With a second set of results the two systems stand side by side. `--help` lists the flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zipformer_crctc.reportcontent import add_audio, make_report
from zipformer_crctc.reportdata import System, read_system
from zipformer_crctc.reportsections import html_text, markdown_text
from zipformer_crctc.results import write_atomically


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; results that cannot be read or compared end it with status 2 and one message."""
    args = _parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results-*.jsonl of decode.py, or the folder that holds them")
    parser.add_argument("other", type=Path, nargs="?", help="the same of a second system")
    parser.add_argument("--suffix", default="", help="which decode of a folder with several, such as iter-5000-avg-1")
    parser.add_argument("--other-suffix", default="", help="the same for the second system")
    parser.add_argument("--names", default="", help="names of the systems, separated by a comma")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write; default: report.html")
    parser.add_argument("--markdown", type=Path, help="tables to write; default: --output with .md")
    parser.add_argument("--data-config", type=Path, help="data config of the test sets, for audio and spectrograms")
    parser.add_argument("--worst", type=int, default=20, help="utterances in each list; default: 20")
    parser.add_argument("--clips", type=int, default=20, help="utterances with audio, at most; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling; default: 0")
    return parser


def run(args: argparse.Namespace) -> None:
    """Read, score, and write the two files."""
    systems = [read_system(args.results, args.suffix)]
    if args.other is not None:
        systems.append(read_system(args.other, args.other_suffix))
    report = make_report(systems, _names(systems, args.names), args.worst, args.seed)
    if args.data_config is not None:
        report = add_audio(report, args.data_config, args.clips)
    markdown = args.markdown or args.output.with_suffix(".md")
    write_atomically(args.output, html_text(report))
    write_atomically(markdown, markdown_text(report))
    for note in report.notes:
        print(note, file=sys.stderr)
    print(f"{args.output}, {markdown}")


def _names(systems: Sequence[System], wanted: str) -> list[str]:
    names = [name.strip() for name in wanted.split(",")] if wanted else [system.name for system in systems]
    if len(names) != len(systems) or not all(names):
        raise ValueError(f"--names {wanted}: gives {len(names)} names for {len(systems)} systems; give one for each")
    if len({*names}) < len(names):
        names = [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=True)]
    return names


if __name__ == "__main__":
    main()
