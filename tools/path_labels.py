"""Short names of folders, for tables that compare them."""

from __future__ import annotations

from pathlib import Path


def path_labels(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the paths, of one length, that tell all folders from each other."""
    parts = [folder.absolute().parts for folder in folders]
    # /a/gpt/run and /b/gpt/run are told apart by their last three names only: a/gpt/run and b/gpt/run.
    for length in range(1, max(map(len, parts))):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(map(str, folders))
