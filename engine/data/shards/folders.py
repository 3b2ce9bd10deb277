"""Folders of token shards as `palimpsest prepare` lays them out: OUTPUT/train, OUTPUT/validation, or these by domain.

A data set is a folder with an index. Domains are data sets side by side: OUTPUT/train/DOMAIN, OUTPUT/validation/DOMAIN.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.data.shards.index import FILE

TRAIN, VALIDATION = "train", "validation"
PARTS = (TRAIN, VALIDATION)
"""Folders that `palimpsest prepare` writes."""


def data_sets(folder: Path) -> list[str]:
    """Return the names of the data sets right below a folder, sorted; none where it is one itself.

    A sub-folder with shards whose index is missing is named, too: opening it reports that.
    """
    if (folder / FILE).exists():
        return []
    return sorted({path.parent.name for name in (FILE, "shard-000000.tokens*") for path in folder.glob(f"*/{name}")})


def domains(names: Sequence[str]) -> list[str]:
    """Return the domains among data sets side by side: none where they are the parts of what `prepare` wrote, of which
    one is trained on and the other held out."""
    return [] if set(PARTS) & set(names) else list(names)
