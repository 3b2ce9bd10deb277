"""Files that `prepare` has written so far, and a way to stop it."""

from pathlib import Path

from engine.corpus.options import Progress
from engine.corpus.recipe import WORK
from engine.data.shards.dataset import TokenDataset


def texts_in(folder: Path, tokenizer) -> list[str]:
    """The documents of some shards, by hand: raw tokens split after each end-of-text, decoded."""
    dataset = TokenDataset(folder)
    texts = []
    for number in range(dataset.num_shards):
        ids = dataset.shard(number).tokens.tolist()
        while ids:
            end = ids.index(tokenizer.eos_id)
            texts.append(tokenizer.model.decode(ids[:end]))
            ids = ids[end + 1 :]
    return texts


def files_of(output: Path) -> dict[str, bytes]:
    """All files but those of an unfinished attempt."""
    paths = [path.relative_to(output) for path in sorted(output.rglob("*")) if path.is_file()]
    return {str(path): (output / path).read_bytes() for path in paths if path.parts[0] != WORK}


def stop_after(count: int):
    """A progress that kills the preparation, as an error would, after so many parts."""
    told = []

    def show(now: Progress) -> None:
        told.append(now)
        if len(told) == count:
            raise KeyboardInterrupt

    return show


def parts_of(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (output / WORK).rglob("*.part")}
