"""Tokenizers of every kind that leaves with a model: ours, and those of others as `--import` takes them over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from engine.corpus.tokenizer_import import import_tokenizer
from engine.corpus.tokenizer_training import train_tokenizer
from engine.serve.export import TEXT

OURS = (
    "bpe-causal",
    "sentencepiece-unigram-causal",
    "sentencepiece-bpe-causal",
    "bpe-masked",
    "wordpiece-masked",
    "sentencepiece-unigram-masked",
    "bpe-span_corruption",
    "sentencepiece-unigram-span_corruption",
    "sentencepiece-bpe-span_corruption",
)
IMPORTED = (
    "imported-gpt2-causal",
    "imported-llama-causal",
    "imported-gpt2-span_corruption",
    "imported-t5-span_corruption",
    "imported-bert-masked",
    "imported-roberta-masked",
    "imported-plain-masked",
)
KINDS = (*OURS, *(kind for kind in IMPORTED if "roberta" not in kind))


def make_tokenizer(kind: str, folder: Path) -> None:
    """Writes a tokenizer of a kind of `OURS` or `IMPORTED`, which ends with its purpose."""
    trained, _, purpose = kind.rpartition("-")
    if kind in OURS:
        size = 450 if purpose == "span_corruption" and trained == "bpe" else 480
        train_tokenizer([TEXT * 3], folder, trained, size, purpose=purpose)  # pyright: ignore[reportArgumentType]
        return
    theirs = folder.with_name("theirs")
    _THEIRS[trained.removeprefix("imported-")](theirs)
    import_tokenizer(str(theirs), folder, purpose)  # pyright: ignore[reportArgumentType]
    shutil.rmtree(theirs)


def _learnt(model: Any, trainer: Any, pre_tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    return tokenizer


def _byte_level(special: list[str], size: int) -> Any:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _learnt(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2(folder: Path) -> None:
    """GPT-2's class, which has no padding token."""
    from transformers import GPT2Tokenizer

    made = _byte_level(["<|endoftext|>"], 380)
    vocabulary, merges = _parts(made)
    GPT2Tokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


def _roberta(folder: Path) -> None:
    """RoBERTa's class: <s> A </s></s> B </s>."""
    from transformers import RobertaTokenizer

    made = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], 400)
    vocabulary, merges = _parts(made)
    RobertaTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


def _parts(tokenizer: Any) -> Any:
    """Vocabulary and merges of a BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _llama(folder: Path) -> None:
    """A BPE with bytes as Llama 3 has it: the template begins every text with a token that our rows do not have."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    made = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"], 390)
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", 0)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def _t5(folder: Path) -> None:
    """T5's own class with sentinels of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator([TEXT * 3], trainer)
    vocabulary = [tuple(entry) for entry in json.loads(learner.to_str())["model"]["vocab"]]
    T5Tokenizer(vocab=vocabulary, extra_ids=100).save_pretrained(folder)


def _bert(folder: Path) -> None:
    """BERT's own class, cased."""
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    made = _learnt(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer())
    BertTokenizer(vocab=made.get_vocab(), do_lower_case=False).save_pretrained(folder)


def _plain(folder: Path) -> None:
    """A byte-level BPE without any frame, to which the import adds [CLS], [SEP] and [MASK]."""
    from transformers import PreTrainedTokenizerFast

    made = _byte_level(["<|endoftext|>", "<|pad|>"], 390)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|pad|>").save_pretrained(
        folder
    )


_THEIRS = {"gpt2": _gpt2, "roberta": _roberta, "llama": _llama, "t5": _t5, "bert": _bert, "plain": _plain}
