"""Download the published IPAPack++ collections from the Hugging Face hub (needs the package huggingface_hub)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from local.command import positive_int, run

REPOSITORIES = tuple(f"anyspeech/ipapack_plus_train_{number}" for number in range(1, 5))
PATTERNS = ("*cuts.*.jsonl.gz", "*recording.*.tar", "*.md")


class Client(Protocol):
    """The part of huggingface_hub that is used here."""

    def snapshot_download(self, repo_id: str, **options: Any) -> str: ...


def hub_client() -> Client:
    """The module huggingface_hub; ValueError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            "downloading IPAPack++ needs the package huggingface_hub: pip install huggingface_hub, "
            "or give a folder that is downloaded already with --source"
        ) from error
    client: Client = huggingface_hub
    return client


def download(repositories: Sequence[str], folder: Path, client: Client, workers: int = 4) -> list[Path]:
    """Fetch each repository into folder/NAME; files that are complete are not fetched again.

    Raises ValueError if a repository cannot be fetched or holds no shards.
    """
    if not repositories:
        raise ValueError("no repository to download: give --repositories owner/name[,owner/name...]")
    targets = []
    for repository in repositories:
        owner, _, name = repository.partition("/")
        if not owner or not name or "/" in name or name in (".", ".."):
            raise ValueError(f"{repository!r} is no data set of the hub: owner/name is expected")
        target = folder / name
        logging.info("downloading %s to %s", repository, target)
        try:
            client.snapshot_download(
                repo_id=repository,
                repo_type="dataset",
                local_dir=str(target),
                allow_patterns=list(PATTERNS),
                max_workers=workers,
            )
        except Exception as error:  # the hub's errors derive from no common class, and ours must name the repository
            raise ValueError(
                f"could not download {repository} ({type(error).__name__}: {error}); run the stage again to go on from "
                "here, or download it by hand and give the folder with --source"
            ) from error
        if not any(target.rglob("cuts.*.jsonl.gz")):
            raise ValueError(
                f"{repository}: no cuts.NNNNNN.jsonl.gz among its files in {target}: is it a shar data set?"
            )
        targets.append(target)
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the downloaded repositories")
    parser.add_argument("--repositories", default=",".join(REPOSITORIES), help="data sets on the hub, comma-separated")
    parser.add_argument("--jobs", type=positive_int, default=4, help="files fetched at the same time")
    args = parser.parse_args()
    repositories = [name.strip() for name in args.repositories.split(",") if name.strip()]
    download(repositories, args.output, hub_client(), args.jobs)


if __name__ == "__main__":
    run(main)
