"""Small folders of tokenizers as others write them: transformers' classes, and models of `tokenizers` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>/[]_|"
WORDS = [("▁", -3.0), ("▁the", -3.5), ("▁a", -4.0), ("▁rank", -6.0), ("NOTUSED", -8.0)]
PIECES = WORDS + [(letter, -7.0 - number / 100) for number, letter in enumerate(LETTERS)]


def _unigram(*control: str, mask: str | None = None) -> list[tuple[str, float]]:
    """SentencePiece gives control pieces the score 0, better than any piece of text."""
    behind = [] if mask is None else [(mask, 0.0)]
    return [(piece, 0.0) for piece in control] + PIECES + behind


def _t5() -> Any:
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(5))]
    vocab = _unigram("<pad>", "</s>", "<unk>") + [(piece, 0.0) for piece in sentinels]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=5)


def _mbart() -> Any:
    vocab = [*_unigram("<s>", "<pad>", "</s>", "<unk>"), ("en_XX", 0.0), ("zh_CN", 0.0), ("<mask>", 0.0)]
    return transformers.MBartTokenizer(vocab=vocab)


def _camembert() -> Any:
    control = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>")
    return transformers.CamembertTokenizer(vocab=_unigram(*control, mask="<mask>"))


UNIGRAM_CLASSES = {
    "T5": _t5,
    "XLM-R": lambda: transformers.XLMRobertaTokenizer(vocab=_unigram("<s>", "<pad>", "</s>", "<unk>", mask="<mask>")),
    "mBART": _mbart,
    "DeBERTa-v2": lambda: transformers.DebertaV2Tokenizer(
        vocab=_unigram("[PAD]", "[CLS]", "[SEP]", "[UNK]", mask="[MASK]")
    ),
    "CamemBERT": _camembert,
    "XLNet": lambda: transformers.XLNetTokenizer(
        vocab=_unigram("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
    ),
}


def class_folder(name: str, folder: Path) -> Path:
    """Save one of `UNIGRAM_CLASSES` as its class does."""
    UNIGRAM_CLASSES[name]().save_pretrained(folder)
    return folder


def save(model: Tokenizer, folder: Path, **settings: Any) -> Path:
    """Write a folder as transformers does, the special tokens named in `settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def word_level(folder: Path) -> Path:
    words = ["[UNK]", "</s>", "[MASK]", "the", "a", "rank"]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return save(model, folder, eos_token="</s>", unk_token="[UNK]", mask_token="[MASK]")


def word_piece(folder: Path) -> Path:
    """WordPiece whose splitter leaves brackets at the word, unlike BERT's."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "rank", *LETTERS, *(f"##{c}" for c in LETTERS)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    model = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.WordPiece(cleanup=False)
    model.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return save(model, folder, unk_token="[UNK]", **names)


def byte_level(**options: Any) -> Tokenizer:
    """Byte-level BPE with a few merges, one of which spells `</s>`, as converted vocabularies have."""
    pieces = ["</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "</", "s>", "20"]
    merges = [("t", "h"), ("th", "e"), ("<", "/"), ("s", ">"), ("</", "s>"), ("2", "0")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = Tokenizer(models.BPE(vocabulary, merges, **options))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.decoder = decoders.ByteLevel()
    return model


def merged(folder: Path) -> Path:
    model = byte_level()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.add_special_tokens([AddedToken("</s>"), AddedToken("<pad>")])
    return save(model, folder, eos_token="</s>", pad_token="<pad>")


def whole_words(folder: Path) -> Path:
    """A model that looks up whole words before it merges, as Llama 3's does."""
    model = byte_level(ignore_merges=True)
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.add_special_tokens([AddedToken("</s>"), AddedToken("<pad>")])
    return save(model, folder, eos_token="</s>", pad_token="<pad>")


def not_marked(folder: Path) -> Path:
    """Special tokens that `tokenizer.json` does not call special, as Qwen 2.5's marks of fill-in-the-middle."""
    model = byte_level()
    fill = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    model.add_tokens([AddedToken(token, normalized=False) for token in ["<|end|>", "<|mask|>", *fill]])
    return save(model, folder, eos_token="<|end|>", mask_token={"content": "<|mask|>", "__type": "AddedToken"})


def byte_pieces(folder: Path) -> Path:
    """Unigram with byte pieces of score 0, as SentencePiece writes them."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256)), *PIECES]
    model = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence(steps)
    model.add_special_tokens(["<unk>", "</s>"])
    return save(model, folder, eos_token="</s>", unk_token="<unk>")


FOLDERS = {
    "WordLevel": word_level,
    "WordPiece": word_piece,
    "merges": merged,
    "whole words": whole_words,
    "not marked": not_marked,
    "byte pieces": byte_pieces,
}


def other_splitting(folder: Path, tokenizer_class: str) -> Path:
    """Byte-level BPE whose file splits every digit off, in a class that transformers rebuilds with its own regex."""
    model = byte_level()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[^\d]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.add_special_tokens(["</s>", "<pad>"])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    return save(model, folder, tokenizer_class=tokenizer_class, pad_token="<pad>", **names)


REBUILT_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer", "RobertaTokenizer")


def cased_bert(folder: Path, **names: str) -> Path:
    """BERT that keeps case, in a folder whose settings do not repeat what `tokenizer.json` says."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    model = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=False)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    model.add_special_tokens(pieces[:5])
    return save(model, folder, tokenizer_class="BertTokenizer", **names)


def letters(folder: Path, **options: Any) -> TextTokenizer:
    """Return a BPE tokenizer of single letters and one merge."""
    model = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2, "ab": 3, " ": 4}, [("a", "b")], **options))
    return load_tokenizer(save(model, folder, eos_token="</s>"))
