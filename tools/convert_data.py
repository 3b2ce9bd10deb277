"""`palimpsest convert` between token shards and Megatron's token files."""

from __future__ import annotations

from engine.errors import ConfigError, DataError
from tools.conversions import Request
from tools.convert_progress import local, progress


def to_megatron(request: Request) -> None:
    """Write shards as .bin and .idx."""
    from engine.data.shards.dataset import TokenDataset
    from engine.data.shards.megatron import file_of, prefix_of, sweep_unfinished, write_indexed_dataset
    from engine.serve.new_folder import only_writer

    source, prefix = local(request.source), prefix_of(request.output)
    with only_writer(prefix):
        # What a killed conversion has left goes first, so that only whole files count as there.
        sweep_unfinished(prefix)
        if found := [path.name for suffix in ("bin", "idx") if (path := file_of(prefix, suffix)).exists()]:
            raise DataError(
                f"{prefix.parent} holds {' and '.join(found)} already", "a new PREFIX", "name another --output"
            )
        dataset = TokenDataset(source)
        sequences = write_indexed_dataset(dataset, prefix, progress("writing", dataset.index.num_tokens))
    kind = "sentences" if dataset.index.has_sentences else "documents"
    print(
        f"wrote {prefix}.bin and .idx: {dataset.index.num_tokens:,} tokens ({sequences.dtype}), "
        f"{sequences.lengths.size:,} sequences ({kind}), {dataset.index.num_documents:,} documents"
    )


def from_megatron(request: Request) -> None:
    """Write an index of .bin and .idx, which stay where they are."""
    from engine.corpus.megatron_import import import_megatron
    from engine.data.shards.megatron import prefix_of, read_sequences
    from engine.data.tokenizer.folder import load_tokenizer
    from engine.serve.new_folder import new_folder

    source, output, tokenizer = local(request.source), request.output, request.tokenizer
    if tokenizer is None:
        raise ConfigError("--to shards without a tokenizer", "the one that the set was made with", "name --tokenizer")
    with new_folder(output) as partial:
        prefix, loaded = prefix_of(source), load_tokenizer(tokenizer)
        total = int(read_sequences(prefix).lengths.sum(dtype="int64"))
        index = import_megatron(prefix, loaded, partial, progress=progress("hashing", total))
    print(
        f"{output} is an index of {prefix}.bin, which stays where it is: {index.num_tokens:,} tokens ({index.dtype}), "
        f"{index.num_documents:,} documents, {len(index.shards):,} shards, hashed"
    )
