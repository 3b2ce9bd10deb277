"""The list of files of an unfinished conversion that are done, each with its hash, so that a killed one goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from engine.checkpoint.container import FileRecord, file_digest

JOURNAL = ".done.json"
"""File that notes which files of an unfinished conversion are done."""


class Journal:
    """Files that are done, in a folder that is being written. `identity` is that of source and plan."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Read the list of an earlier conversion of the same identity, where there is one and its files are whole."""
        self._folder, self._identity = folder, identity
        self.done = self._whole_files()
        """Files that need not be written again, by name."""

    @classmethod
    def taken_over(cls, kept: Path, folder: Path, identity: str) -> Journal:
        """Return the journal of `folder` with the whole files of an earlier one in `kept`, which is removed.

        An empty identity takes nothing over.
        """
        before = cls(kept, identity).done if identity else {}
        for name in before:
            (kept / name).rename(folder / name)
        shutil.rmtree(kept, ignore_errors=True)
        journal = cls(folder, identity)
        for record in before.values():
            journal.note(record)
        return journal

    def note(self, record: FileRecord) -> None:
        """Note a file that is on the disk."""
        self.done[record.name] = record
        files = {name: asdict(one) for name, one in self.done.items()}
        partial = self._folder / f"{JOURNAL}.new"
        partial.write_text(json.dumps({"identity": self._identity, "files": files}), encoding="utf-8")
        partial.replace(self._folder / JOURNAL)

    def note_file(self, name: str) -> None:
        """Note a file by its name; reads it."""
        path = self._folder / name
        self.note(FileRecord(name, path.stat().st_size, file_digest(path)))

    def _whole_files(self) -> dict[str, FileRecord]:
        """Return the files of the list whose bytes are still those that were written."""
        try:
            found = json.loads((self._folder / JOURNAL).read_text(encoding="utf-8"))
            files = found["files"] if found["identity"] == self._identity else {}
            records = [FileRecord(**one) for one in files.values()]
            # names from a file: none may lead out of the folder
            inside = [one for one in records if Path(one.name).name == one.name]
            return {one.name: one for one in inside if file_digest(self._folder / one.name) == one.xxh3}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
