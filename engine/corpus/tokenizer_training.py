"""Training of tokenizers: byte-level BPE, SentencePiece unigram or BPE, and WordPiece, each saved for `transformers`.

Invariant: the same texts and options give the same files. All kinds but WordPiece spell every byte, keep text as it
is (no normalisation, runs of spaces and line ends included), and share the first ids: 0 ends a text, 1 pads, 2 is
unknown (and never used). WordPiece is BERT's (Devlin et al. 2019): blanks are lost, rare characters are unknown, and
ids 0 to 4 are BERT's special tokens. The tokens that an objective needs besides have the last ids. A SentencePiece
model is kept as `tokenizer.model` beside its conversion to `tokenizers`, which splits text equally (unigram: or into
pieces of the same likelihood). SentencePiece's own sign for a space, U+2581, is the one character that comes back as
another one: as a space.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal

from engine.corpus.tokenizer_folder import written_whole
from engine.data.tokenizer.folder import END_OF_TEXT, TextTokenizer, load_tokenizer
from engine.data.tokenizer.portable import make_portable
from engine.data.tokenizer.vocabulary import FILL_TOKENS
from engine.errors import ConfigError, DataError

TokenizerKind = Literal["bpe", "sentencepiece-unigram", "sentencepiece-bpe", "wordpiece"]
Purpose = Literal["causal", "fill_in_the_middle", "masked", "span_corruption"]
"""The objective that a tokenizer is for."""

PADDING = "<|padding|>"
UNKNOWN = "<|unknown|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING, UNKNOWN)
CLASSIFY, SEPARATE, MASK = "[CLS]", "[SEP]", "[MASK]"
WORDPIECE_TOKENS = ("[PAD]", "[UNK]", CLASSIFY, SEPARATE, MASK)
NUM_SENTINELS = 100
PURPOSE_TOKENS: dict[Purpose, tuple[str, ...]] = {
    "causal": (),
    "fill_in_the_middle": FILL_TOKENS,
    "masked": (CLASSIFY, SEPARATE, MASK),
    "span_corruption": tuple(f"<extra_id_{number}>" for number in reversed(range(NUM_SENTINELS))),
}
"""Further tokens that an objective needs, in the order of the ids; T5's sentinels descend."""
_REQUIRED_CHARACTERS = "".join(map(chr, range(33, 127)))
"""Characters that a SentencePiece vocabulary always spells: printable ASCII, so that the names of special and byte
pieces can be spelt too, and quoting one is never the same as using it."""
_BASE = 256 + len(SPECIAL_TOKENS)
SMALLEST_VOCABULARY: dict[str, int] = {
    "bpe": _BASE + 1,
    "sentencepiece-unigram": _BASE + len(_REQUIRED_CHARACTERS) + 3,
    "sentencepiece-bpe": _BASE + len(_REQUIRED_CHARACTERS) + 3,
    "wordpiece": len(WORDPIECE_TOKENS) + 2 * len(_REQUIRED_CHARACTERS) + 1,
}
"""All bytes, the special tokens, the required characters, space and line end, and one token worth the trouble; for
WordPiece room for ASCII at the beginning and inside of words. What the purpose needs comes on top."""

SENTENCEPIECE_FILE = "tokenizer.model"
_SPACE = "▁"
_LONGEST_LINE_CHARACTERS = 1 << 14
_LINE_END = "\n"
_NEVER = -1e5
"""Log probability of a control or byte piece: a text that spells `<0x41>` must not be read as that byte. Spelling
it in characters is always possible and always likelier."""


def train_tokenizer(
    texts: Iterable[str],
    folder: Path,
    kind: TokenizerKind,
    vocab_size: int,
    purpose: Purpose = "causal",
    lowercase: bool = False,
) -> TextTokenizer:
    """Train a tokenizer on some texts, save it as a folder and return it as loaded from there.

    `purpose` adds the tokens that the objective needs; WordPiece always has BERT's. `lowercase` (WordPiece alone)
    drops case and accents. A small corpus may carry fewer tokens than asked for: see the result's `vocab_size`.

    Raises:
        ConfigError: the vocabulary is smaller than the bytes and special tokens, or an option of another kind.
        DataError: there is no text, the corpus is too small for this kind, or the folder cannot be written.
    """
    from transformers import PreTrainedTokenizerFast

    special = WORDPIECE_TOKENS if kind == "wordpiece" else SPECIAL_TOKENS
    extra = [token for token in PURPOSE_TOKENS[purpose] if token not in special]
    if vocab_size < (smallest := SMALLEST_VOCABULARY[kind] + len(extra)):
        raise ConfigError(
            f"a {kind} vocabulary of {vocab_size} tokens", f"{smallest} or more", "name a larger --vocab-size"
        )
    if lowercase and kind != "wordpiece":
        raise ConfigError(f"lowercase with a {kind} tokenizer", "wordpiece", "leave it out: this kind keeps the text")
    texts = _not_empty(texts)
    with written_whole(folder, replaced=(SENTENCEPIECE_FILE,)) as inner:
        model = _train(texts, inner, kind, vocab_size - len(extra), lowercase)
        model.add_special_tokens(extra)
        _frame(model, purpose, kind)
        PreTrainedTokenizerFast(
            tokenizer_object=model, clean_up_tokenization_spaces=False, **_names(kind, purpose)
        ).save_pretrained(inner)
        make_portable(inner)
    return load_tokenizer(folder)


def _train(texts: Iterable[str], folder: Path, kind: TokenizerKind, vocab_size: int, lowercase: bool):
    if kind == "bpe":
        return _byte_level_bpe(texts, vocab_size)
    if kind == "wordpiece":
        return _wordpiece(texts, vocab_size, lowercase)
    content = _sentencepiece(texts, kind, vocab_size)
    (folder / SENTENCEPIECE_FILE).write_bytes(content)
    return from_sentencepiece(content, kind)


def _names(kind: TokenizerKind, purpose: Purpose) -> dict[str, Any]:
    """Return the token of each role, by the role's name in transformers."""
    marks: dict[str, Any] = {"cls_token": CLASSIFY, "sep_token": SEPARATE, "mask_token": MASK}
    marks["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if kind == "wordpiece":
        return marks | {"pad_token": WORDPIECE_TOKENS[0], "unk_token": WORDPIECE_TOKENS[1], "eos_token": SEPARATE}
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PADDING, "unk_token": UNKNOWN}
    return names | (marks if purpose == "masked" else {})


def _frame(model, purpose: Purpose, kind: TokenizerKind) -> None:
    """Set what transformers puts around a text for a user who fine-tunes; `prepare` adds nothing."""
    from tokenizers import processors

    if kind == "wordpiece" or purpose == "masked":
        model.post_processor = processors.TemplateProcessing(
            single=f"{CLASSIFY} $A {SEPARATE}",
            pair=f"{CLASSIFY} $A {SEPARATE} $B:1 {SEPARATE}:1",
            special_tokens=[(token, model.token_to_id(token)) for token in (CLASSIFY, SEPARATE)],
        )
    elif purpose == "span_corruption":
        end = [(END_OF_TEXT, model.token_to_id(END_OF_TEXT))]
        model.post_processor = processors.TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=end)


def _wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool):
    """Return a trained WordPiece tokenizer.

    The library numbers the pieces inside words in the order of its hash tables, which differs from run to run; so they
    are numbered here, before training.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def untrained(vocabulary: dict[str, int] | None = None) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=WORDPIECE_TOKENS[1]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    with TemporaryFile("w+", encoding="utf-8") as spool:
        alphabet = _alphabet(texts, untrained(), limit=vocab_size // 3, spool=spool)
        inside = [f"##{character}" for character in alphabet if _joins(untrained(), character)]
        room = vocab_size - len(WORDPIECE_TOKENS) - len(alphabet) - 1
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            # special tokens are numbered in the order given
            special_tokens=[*WORDPIECE_TOKENS, *inside[:room]],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        spool.seek(0)
        learner = untrained()
        learner.train_from_iterator((json.loads(line) for line in spool), trainer)
    # the vocabulary alone: the pieces inside words are ordinary tokens again
    tokenizer = untrained(learner.get_vocab(with_added_tokens=False))
    tokenizer.add_special_tokens(list(WORDPIECE_TOKENS))
    return tokenizer


def _alphabet(texts: Iterable[str], tokenizer, limit: int, spool: IO[str]) -> list[str]:
    """Return the required characters and the commonest others, about `limit` together; write the texts to `spool`."""
    counts: Counter[str] = Counter()
    for text in texts:
        spool.write(json.dumps(text) + _LINE_END)
        counts.update(tokenizer.normalizer.normalize_str(text))
    found = sorted((character for character in counts if not character.isspace()), key=lambda c: (-counts[c], c))
    others = [character for character in found if character not in _REQUIRED_CHARACTERS]
    return sorted(_REQUIRED_CHARACTERS) + sorted(others[: max(0, limit - len(_REQUIRED_CHARACTERS))])


def _joins(tokenizer, character: str) -> bool:
    """Return True if a character stays in the word before it."""
    text = tokenizer.normalizer.normalize_str(f"a{character}")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


def _byte_level_bpe(texts: Iterable[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # all 256 bytes, also those that the corpus does not hold
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _sentencepiece(texts: Iterable[str], kind: TokenizerKind, vocab_size: int) -> bytes:
    """Return a trained SentencePiece model, serialised."""
    import sentencepiece

    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=content,
            model_type=kind.removeprefix("sentencepiece-"),
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus may carry fewer pieces
            character_coverage=0.9999,
            required_chars=_REQUIRED_CHARACTERS,
            byte_fallback=True,
            normalization_rule_name="identity",  # this and the next three: the text comes back as it was
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            user_defined_symbols=[_LINE_END],  # a piece from the start: the trainer is given lines without their ends
            max_sentence_length=4 * _LONGEST_LINE_CHARACTERS,  # in bytes, of which a character takes at most four
            eos_id=0,
            eos_piece=END_OF_TEXT,
            pad_id=1,
            pad_piece=PADDING,
            unk_id=2,
            unk_piece=UNKNOWN,
            bos_id=-1,  # none: nothing is put before a text
            num_threads=1,  # sums of floats in one order, hence the same pieces everywhere
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot train {vocab_size} tokens of kind {kind} on this text: {error}",
            "a vocabulary with room for the bytes, ASCII and the common characters of the text",
            "name a larger --vocab-size",
        ) from error
    return content.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the texts without their ends, long ones in parts: SentencePiece drops overlong sentences."""
    for text in texts:
        for line in text.split(_LINE_END):
            for start in range(0, len(line), _LONGEST_LINE_CHARACTERS):
                # a zero byte is what SentencePiece marks its own boundaries with
                yield line[start : start + _LONGEST_LINE_CHARACTERS].replace("\0", "")


def from_sentencepiece(content: bytes, kind: TokenizerKind):
    """Return a `tokenizers.Tokenizer` that splits as the SentencePiece model does (one trained by this file).

    Pieces keep their ids. For BPE, SentencePiece stores scores where `tokenizers` wants merges: the better of two
    merges is the one whose result has the lower id, so a piece's merges are its splits into two known pieces, in
    the order of the piece's id (and of the ids of its parts among themselves).
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    normal = [i for i in range(len(pieces)) if _is_normal(processor, i, pieces[i])]
    if kind == "sentencepiece-bpe":
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        model = models.BPE(vocabulary, _merges(pieces, normal), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    else:
        scores = dict.fromkeys(pieces, _NEVER) | {pieces[i]: processor.get_score(i) for i in normal}
        model = models.Unigram(list(scores.items()), processor.unk_id(), byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(_LINE_END, normalized=False)])
    return tokenizer


def _is_normal(processor, number: int, piece: str) -> bool:
    special = processor.is_control(number) or processor.is_unknown(number) or processor.is_byte(number)
    return not special and piece != _LINE_END


def _merges(pieces: list[str], normal: list[int]) -> list[tuple[str, str]]:
    known = {pieces[i]: i for i in normal}
    merges = []
    for i in normal:
        piece = pieces[i]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        # pieces a, b, c, ab, abc: ab comes from (a, b); abc from (ab, c) alone, since bc is no piece
        inner = [(known[left], known[right]) for left, right in splits if left in known and right in known]
        merges += [(pieces[left], pieces[right]) for left, right in sorted(inner)]
    return merges


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    """Return the texts from the first that is not blank on. Raises `DataError` where there is none."""
    iterator = iter(texts)
    # blank texts are passed over: a trainer that sees no word fails in words of its own
    first = next((text for text in iterator if text.strip()), None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on", "at least one document", "name other sources")

    return itertools.chain([first], iterator)
