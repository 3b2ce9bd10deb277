"""`palimpsest inspect-data`: verifies token shards, shows their counts and some samples as text; or a run's mixture."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from engine.config.paths import expand
from engine.config.schema.data import PackingName
from engine.config.schema.objective import MaskUnit, ObjectiveConfig, ObjectiveName, Pairs
from engine.corpus.recipe import RECIPE_FILE
from engine.corpus.statistics import Statistics
from engine.data.shards.cache import ShardCache
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.folders import PARTS
from engine.data.shards.index import FILE as INDEX_FILE
from engine.data.shards.remote import RemoteFolder, is_remote
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.data.visible import visible
from engine.errors import ConfigError, DataError
from engine.redact import redact
from tools.data_tables import counts_table, histogram

if TYPE_CHECKING:  # torch would make --help slow
    import torch

    from engine.data.batch import Batch

_SOURCES_SHOWN = 20
_TOKENS_SHOWN, _CHARACTERS_SHOWN = 60, 60
"""Beginning of a document that is listed."""
_CACHE_BYTES = 1 << 30
"""Size limit of the temporary folder that shards of a URL are fetched into."""
BOUNDARY = "──── next document ────"


def main(
    source: Annotated[
        str, typer.Argument(metavar="DIR_URL_OR_RUN.yaml", help="Shards, what prepare wrote, or a run.")
    ],  # a path would lose a slash of a URL
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys of the run to change.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer (default: the one that prepare noted).")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples to show of each part.")] = 2,
    sequence_length: Annotated[int, typer.Option(min=5, help="Tokens per sample.")] = 256,
    objective: Annotated[ObjectiveName, typer.Option(help="Show the rows of this objective.")] = "causal",
    pairs: Annotated[Pairs, typer.Option(help="Kind of the pairs (masked).")] = "none",
    mask_unit: Annotated[MaskUnit, typer.Option(help="Unit that is masked as a whole (masked).")] = "token",
    packing: Annotated[PackingName, typer.Option(help="How documents share rows.")] = "concatenate",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the samples.")] = 0,
    documents: Annotated[int, typer.Option(min=0, help="Documents of each part to list, with their ids.")] = 2,
) -> None:
    """Verify every hash, then show counts and the first samples that a run with this seed would see.

    For a run file, show what the run draws from each source: samples, shares and epochs. It takes keys to change, as
    `train` does, and no options.
    """
    # `source` stays text: a Path would make one slash of a URL's two.
    folder = Path(expand(source))
    if not is_remote(source) and folder.is_file():
        from tools.mixture import show_mixture

        show_mixture(folder, overrides or [])
        return
    if overrides:
        raise ConfigError(
            f"{source} is no run file, and {overrides[0]!r} a key to change",
            "a folder alone, or a run file and its keys",
            "leave the keys out, or check the path of the run file",
        )
    shown = ObjectiveConfig(name=objective, pairs=pairs, mask_unit=mask_unit)
    with tempfile.TemporaryDirectory(prefix="inspect-data-") as cache:
        if is_remote(source):
            loaded = None if tokenizer is None else load_tokenizer(tokenizer)
            parts = [(url, open_url(url, Path(cache), loaded)) for url in parts_of_url(source, Path(cache))]
        else:
            loaded = _tokenizer(folder, tokenizer)
            _print_recipe(folder)
            parts = [
                (
                    str(part.relative_to(folder)) if part != folder else part.name,
                    TokenDataset(part, loaded.hash if loaded else None),
                )
                for part in parts_of(folder)
            ]
        _show(parts, loaded, samples, documents, sequence_length, seed, packing, shown)


def _show(
    parts: list[tuple[str, TokenDataset]],
    loaded: TextTokenizer | None,
    samples: int,
    documents: int,
    sequence_length: int,
    seed: int,
    packing: PackingName,
    shown: ObjectiveConfig,
) -> None:
    """Verify data sets, each under the name that it is shown with; print counts, first documents and samples."""
    for name, dataset in parts:
        _verify(dataset)
        print_counts(dataset)
        for line in document_lines(dataset, documents, loaded):
            print(line)
        if samples:
            from engine.data.loader import first_samples

            batch = first_samples(dataset, sequence_length, seed, samples, packing, shown)
            for b, source in enumerate(batch.sources):
                _print_sample(f"{name} {source}", batch, b, loaded)


def document_lines(dataset: TokenDataset, most: int, tokenizer: TextTokenizer | None) -> Iterator[str]:
    """Yield a line for each of the first documents: id, length, and the beginning of its text."""
    left = most
    for number in range(dataset.num_shards if most else 0):
        shard, names = dataset.shard(number), dataset.ids(number)
        is_forgotten = shard.is_forgotten(shard.documents[:-1])
        for document, name in enumerate(names[:left]):
            first, end = shard.documents[document : document + 2].tolist()
            text = _shown(shard.tokens[first : min(end, first + _TOKENS_SHOWN)], tokenizer)
            begin = "forgotten" if is_forgotten[document] else visible(json.dumps(text[:_CHARACTERS_SHOWN]))
            yield f"document {visible(name)}: {end - first:,} tokens, {begin}"
        left -= len(names)
        dataset.release()
        if left <= 0:
            return


def parts_of_url(url: str, cache: Path) -> list[str]:
    """Return the data sets that a URL stands for: itself, or those below it and below the parts that prepare wrote."""
    whole = RemoteFolder(url, ShardCache(cache, _CACHE_BYTES))
    found = [f"{whole.url}/{name}" for name in whole.data_sets()]
    for part in PARTS:
        if f"{whole.url}/{part}" not in found:
            below = RemoteFolder(f"{whole.url}/{part}", ShardCache(cache, _CACHE_BYTES))
            found += [f"{below.url}/{name}" for name in below.data_sets()]
    return found or [url]


def open_url(url: str, folder: Path, tokenizer: TextTokenizer | None) -> TokenDataset:
    """Return a data set whose shards are fetched into a folder that has room for the largest of them."""
    cache = ShardCache(folder, _CACHE_BYTES)
    dataset = TokenDataset(url, tokenizer.hash if tokenizer else None, cache)
    # The size of the shards is known from the index only, which is fetched through the same cache.
    cache.limit_bytes = max(
        [_CACHE_BYTES, *(array.stored_bytes for shard in dataset.index.shards for array in shard.files)]
    )
    return dataset


def parts_of(folder: Path) -> list[Path]:
    """Return the folders of shards that a folder stands for: itself, or the parts that prepare wrote into it.

    Raises:
        DataError: a part that the recipe speaks of is not there.
    """
    for name in _noted_parts(folder):
        if not (folder / name / INDEX_FILE).exists():
            raise DataError(
                f"{folder / name} has no {INDEX_FILE}, but {folder / RECIPE_FILE} says that it was written",
                "every part that was prepared",
                "prepare again with --overwrite, or restore the folder",
            )
    parts = [path.parent for name in PARTS for path in sorted((folder / name).glob(f"**/{INDEX_FILE}"))]
    return [folder] if (folder / INDEX_FILE).exists() or not parts else parts


def _noted_parts(folder: Path) -> list[str]:
    """Return the parts that the folder's recipe reports on; none where there is no recipe that can be read."""
    try:
        report = json.loads((folder / RECIPE_FILE).read_bytes())["report"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in report if name.partition("/")[0] in PARTS]


def _tokenizer(folder: Path, named: Path | None) -> TextTokenizer | None:
    """Return the named tokenizer, else the one in the recipe if it is still there, else None."""
    if named is not None:
        return load_tokenizer(named)
    # The output of prepare, its train/ or validation/, or a domain's folder below that.
    for recipe in (folder / RECIPE_FILE, folder.parent / RECIPE_FILE, folder.parent.parent / RECIPE_FILE):
        try:
            noted = json.loads(recipe.read_bytes())["recipe"]
            loaded = load_tokenizer(noted["tokenizer"])
        # A recipe that is missing, damaged or of another version only means that ids are shown instead of text.
        except (OSError, ValueError, KeyError, TypeError, DataError):
            continue
        if loaded.hash == noted.get("tokenizer_hash"):
            return loaded
    return None


def _print_recipe(folder: Path) -> None:
    """Print the sources and lengths that prepare noted; nothing where it noted none."""
    try:
        tree = json.loads((folder / RECIPE_FILE).read_bytes())
        sources = [(item.get("domain", ""), item["name"], item["bytes"]) for item in tree["recipe"]["sources"]]
        parts = {name: Statistics.from_json(item) for name, item in tree["report"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    console = Console()
    for domain, name, size in sources[:_SOURCES_SHOWN]:
        console.print(Text(visible(f"source {domain + ' = ' if domain else ''}{redact(str(name))}, {size:,} bytes")))
    if len(sources) > _SOURCES_SHOWN:
        console.print(f"and {len(sources) - _SOURCES_SHOWN:,} more sources")
    console.print(counts_table(parts))
    for name, part in parts.items():
        console.print(Text(f"tokens per document, {name}:\n{histogram(part)}"))


def _verify(dataset: TokenDataset) -> None:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(
            escape(visible(f"verifying {redact(str(dataset.location))}")), total=dataset.index.num_bytes
        )
        dataset.verify(lambda num_bytes: progress.advance(task, num_bytes))


def print_counts(dataset: TokenDataset) -> None:
    """Print the counts of a data set whose shards have been verified."""
    index = dataset.index
    table = Table(title=Text(visible(redact(str(dataset.location)))), title_justify="left", show_header=False)
    table.add_row("documents", f"{index.num_documents:,}")
    if index.has_sentences:
        table.add_row("sentences", f"{index.num_sentences:,}")
    if index.synthetic is not None:
        table.add_row("synthetic", Text(visible(str(index.synthetic))))
    table.add_row("ids", "their own (--id-key)" if index.has_ids else "SHARD_HASH:ROW")
    if len(dataset.tombstones):
        table.add_row("forgotten", f"{len(dataset.tombstones):,} documents (tombstones {dataset.tombstones.hash})")
    table.add_row("tokens", f"{index.num_tokens:,} ({index.dtype}, vocabulary {index.vocab_size:,})")
    packed = f", {index.stored_bytes:,} on disk (zstd)" if index.stored_bytes != index.num_bytes else ""
    table.add_row("shards", f"{dataset.num_shards:,}, {index.num_bytes:,} bytes{packed}")
    if index.tokens_folder is not None:
        found = sorted({shard.tokens.file for shard in index.shards})
        table.add_row("tokens in", Text(visible(f"{', '.join(found)} in {redact(str(index.tokens_folder))}")))
    table.add_row("hashes", f"{sum(len(shard.files) for shard in index.shards):,} files verified (xxh3)")
    table.add_row("tokenizer", index.tokenizer_hash)
    table.add_row("fingerprint", index.fingerprint)
    Console().print(table)


def _print_sample(title: str, batch: Batch, b: int, tokenizer: TextTokenizer | None) -> None:
    Console().print(Panel(Text(visible(as_text(batch, b, tokenizer))), title=Text(visible(title)), title_align="left"))


def as_text(batch: Batch, b: int, tokenizer: TextTokenizer | None) -> str:
    """Return row b as text: its documents, and what is to be predicted where that is not simply the next token."""
    row = {name: tensor[b].numpy() for name, tensor in batch.inputs.items()}
    if "decoder_tokens_BT" in row:
        seen = _documents(row["tokens_BS"], batch.document_lengths[b], len(row["tokens_BS"]), tokenizer)
        return f"{seen}\n\nto spell out: {_shown(row['targets_BT'][row['weights_BT'] > 0], tokenizer)}"
    if "masked_BM" not in row:
        # Padding has no weight, so the row ends behind its last target's input.
        targets = np.flatnonzero(row["weights_BT"])
        end = int(targets[-1]) + 1 if targets.size else 0  # a row of forgotten documents has no target
        return _documents(row["tokens_BT"], batch.document_lengths[b], end, tokenizer)
    seen = _documents(row["tokens_BT"], batch.document_lengths[b], len(row["tokens_BT"]), tokenizer)
    # (M,) of one row: its masked positions, without the padding up to M.
    masked = row["weights_BM"] > 0
    lines = [
        f"{at}: {_shown(row['targets_BM'][masked][i : i + 1], tokenizer)}"
        for i, at in enumerate(row["masked_BM"][masked])
    ]
    if "pair_targets_B" in row:
        other = "random or swapped" if row["pair_targets_B"] else "in order"
        lines.append(f"second segment: {other if row['pair_weights_B'] else 'none to predict'}")
    return f"{seen}\n\nto predict: {', '.join(lines)}"


def _documents(ids: np.ndarray, lengths: torch.Tensor, end: int, tokenizer: TextTokenizer | None) -> str:
    """Return the documents of the first `end` tokens of a row, with a line between them."""
    # Lengths (3, 5) of a row that ends at 7: edges 0, 3, 7.
    edges = np.minimum(np.concatenate([[0], np.cumsum(lengths.numpy())]), end)
    parts = [_shown(ids[start:stop], tokenizer) for start, stop in itertools.pairwise(edges.tolist()) if stop > start]
    return f"\n{BOUNDARY}\n".join(parts)


def _shown(ids: np.ndarray, tokenizer: TextTokenizer | None) -> str:
    return tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids.tolist()))
