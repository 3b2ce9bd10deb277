"""`python -m bench.prepare SOURCE... --tokenizer FOLDER`: preparing text beside the least that encodes it, in CPU time.

The cases take turns on the same text in one process, in one thread: `plain` reads JSON lines, encodes them with
`tokenizers` and writes ids, and knows nothing else; `split` only finds sentences; the others are `palimpsest prepare`
with options. Ratios are paired within a round; the first round warms up and does not count.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.command import run
from bench.machine import machine
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.sentences import sentence_starts
from engine.corpus.sources.chunks import read_texts

_BATCH = 256


def main(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Text, as `palimpsest prepare` takes it.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    language: Annotated[str, typer.Option(help="Of the sentences.")] = "en",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure preparing against a plain loop, and the sentence splitter alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    text_bytes = sum(len(text.encode()) for text in read_texts(sources, "text", False))
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds + 1):
            for name, case in _cases(sources, tokenizer, language, Path(scratch) / str(number)):
                begin = time.process_time()
                case()
                if number:
                    seconds.setdefault(name, []).append(time.process_time() - begin)
    result = _result(text_bytes, seconds)
    for name, case in result["cases"].items():
        print(
            f"{name:>10}: {case['mb_per_cpu_second']:7.2f} MB per CPU-second, {case['over_plain']:.2f} of plain's time"
        )
    if output is not None:
        output.write_text(json.dumps({"machine": machine(1), **result}, indent=1) + "\n")


def _cases(
    sources: list[str], tokenizer: Path, language: str, folder: Path
) -> Iterator[tuple[str, Callable[[], object]]]:
    folder.mkdir()
    yield "plain", lambda: plain(sources, tokenizer, folder / "plain.bin")
    yield "split", lambda: split(sources, language)
    options: dict[str, dict[str, Any]] = {
        "prepare": {},
        "near": {"deduplicate": "near"},
        "sentences": {"sentences": language},
        "zstd": {"compression": "zstd"},
    }
    for name, given in options.items():
        chosen = PrepareOptions(tuple(sources), tokenizer, folder / name, 0.0, **given)
        yield name, lambda chosen=chosen: prepare(chosen)


def plain(sources: list[str], tokenizer: Path, output: Path) -> int:
    """Encodes all texts and writes their ids, each text ended by 0; returns how many ids."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    dtype = np.uint32 if model.get_vocab_size() > 2**16 else np.uint16
    count, batch = 0, []
    with output.open("wb") as file:

        def flush() -> int:
            encoded = model.encode_batch_fast(batch, add_special_tokens=False)
            for item in encoded:
                file.write(np.array([*item.ids, 0], dtype).tobytes())
            batch.clear()
            return sum(len(item.ids) + 1 for item in encoded)

        for text in read_texts(sources, "text", False):
            batch.append(text)
            if len(batch) == _BATCH:
                count += flush()
        return count + flush()


def split(sources: list[str], language: str) -> int:
    """Finds the sentences of all texts; returns how many."""
    return sum(sentence_starts(text, language).size for text in read_texts(sources, "text", False))


def _result(text_bytes: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    def over_plain(taken: list[float]) -> float:
        return statistics.median(mine / least for mine, least in zip(taken, seconds["plain"], strict=True))

    cases = {
        name: {
            "cpu_seconds": [round(each, 3) for each in taken],
            "mb_per_cpu_second": text_bytes / 1e6 / statistics.median(taken),
            "over_plain": over_plain(taken),
        }
        for name, taken in seconds.items()
    }
    return {"text_bytes": text_bytes, "cases": cases}


if __name__ == "__main__":
    run(main)
