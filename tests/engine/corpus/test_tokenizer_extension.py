"""A tokenizer with further tokens: no id moves, nothing special comes out of text, and other readers read it alike."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from engine.config.load import parse_run
from engine.config.resolve import resolve
from engine.corpus.tokenizer_extension import extend_tokenizer
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError, DataError
from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import whole_model
from engine.serve.export import TEXT
from engine.train.starting_weights import StartingWeights
from tests.engine.data.tokenizer import foreign
from tests.engine.models.tiny import random_weights, tiny, twin
from tests.readers.kinds import make_tokenizer

DOMAIN = (
    "The cardiomyopathy of the patient was a cardiomyopathy; echocardiography shows cardiomyopathy and angiography.\n"
    "Die Herzkrankheit überraschte: Herzinsuffizienz, Überdruck, Ödeme. quotes: </s> [MASK] <|endoftext|> <unk>\n"
)
KINDS = (
    "bpe-causal",
    "sentencepiece-unigram-causal",
    "sentencepiece-bpe-causal",
    "wordpiece-masked",
    "imported-gpt2-causal",
    "imported-llama-causal",  # special tokens that the model itself lacks
    "imported-t5-span_corruption",  # sentinels behind the pieces
    "imported-bert-masked",
    "imported-roberta-masked",
)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_learnt_and_nothing_else_changes(kind, tmp_path):
    make_tokenizer(kind, tmp_path / "old")
    before = load_tokenizer(tmp_path / "old")
    found = extend_tokenizer(tmp_path / "old", tmp_path / "new", texts=lambda: [DOMAIN * 9], num_learnt=6)
    after = load_tokenizer(tmp_path / "new")
    assert found.num_learnt == after.vocab_size - before.vocab_size == 6
    old, new = before.model.get_vocab(), after.model.get_vocab()
    assert old.items() <= new.items()
    assert sorted(number for name, number in new.items() if name not in old) == [*range(before.vocab_size, len(new))]
    assert (after.eos_id, after.unknown_id, after.special_ids) == (
        before.eos_id,
        before.unknown_id,
        before.special_ids,
    )
    assert after.vocabulary.padding == before.vocabulary.padding
    assert after.vocabulary.sentinels == before.vocabulary.sentinels

    assert found.usage is not None
    was, now = found.usage
    texts = [DOMAIN * 9, TEXT]
    ids = after.encode(texts)
    assert (was.num_tokens, now.num_tokens) == (before.encode(texts)[0].size, ids[0].size)
    assert now.num_tokens < was.num_tokens
    assert now.unspelt_bytes <= was.unspelt_bytes
    assert was.num_bytes == now.num_bytes == len((DOMAIN * 9).encode())
    assert set(ids[0].tolist()) & set(range(before.vocab_size, after.vocab_size)), "new tokens are used"
    for spelt in ids:
        assert not set(spelt.tolist()) & (after.special_ids - {after.unknown_id}), "a quotation is text"
    assert after.decode(ids[1]) == before.decode(before.encode(texts)[1])

    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    plain = DOMAIN.partition("quotes")[0]
    assert theirs(plain, add_special_tokens=False)["input_ids"] == after.encode([plain])[0].tolist()
    assert len(theirs) == after.vocab_size
    assert theirs.all_special_ids == AutoTokenizer.from_pretrained(tmp_path / "old").all_special_ids
    first = AutoTokenizer.from_pretrained(tmp_path / "old")("the")["input_ids"]
    assert theirs("the")["input_ids"] == first, "the frame around a text stays"


@pytest.mark.parametrize("kind", KINDS)
def test_a_listed_token_is_one_token(kind, tmp_path):
    make_tokenizer(kind, tmp_path / "old")
    first = load_tokenizer(tmp_path / "old").vocab_size
    listed = ["Ödeme", "angiography", "the", "", "Ödeme"]
    found = extend_tokenizer(tmp_path / "old", tmp_path / "new", listed)
    after = found.tokenizer
    assert found.num_given <= 3
    assert [ids.size for ids in after.encode(["Ödeme", "angiography"])] == [1, 1]
    assert after.vocab_size == first + found.num_given + found.num_parts
    assert after.decode(after.encode(["Ödeme"])[0]) == "Ödeme"
    assert found.usage is None


def test_listed_tokens_do_not_keep_each_other_from_text(tmp_path):
    train_tokenizer([TEXT], tmp_path / "old", "bpe", 400)
    listed = [" Herzherz", " Herzinsuffizienz", "rzherzrz", " Herz", "zherz", "inherz", " Herzinherz"]
    made = extend_tokenizer(tmp_path / "old", tmp_path / "new", listed).tokenizer
    assert [ids.size for ids in made.encode(listed)] == [1] * len(listed)


def test_other_text_is_split_as_before_where_no_new_token_occurs(tmp_path):
    train_tokenizer([TEXT], tmp_path / "old", "bpe", 400)
    extend_tokenizer(tmp_path / "old", tmp_path / "new", [" Herzinsuffizienz"])
    old, new = load_tokenizer(tmp_path / "old"), load_tokenizer(tmp_path / "new")
    assert new.encode([TEXT])[0].tolist() == old.encode([TEXT])[0].tolist()


@pytest.mark.parametrize("name", foreign.FOLDERS)
def test_other_folders_are_extended_by_a_list_or_refused_by_name(name, tmp_path):
    foreign.FOLDERS[name](tmp_path / "old")
    extended = extend_tokenizer(tmp_path / "old", tmp_path / "new", ["rankrank"]).tokenizer
    assert extended.encode(["rankrank"])[0].size == 1
    if name == "WordLevel":
        with pytest.raises(DataError, match=r"cannot be extended: a WordLevel model(.|\n)*--tokens"):
            extend_tokenizer(tmp_path / "old", tmp_path / "other", texts=lambda: ["the rank"], num_learnt=3)
        assert not (tmp_path / "other").exists()


def test_tokens_that_no_text_becomes_are_refused_by_name(tmp_path):
    train_tokenizer([TEXT], tmp_path / "old", "bpe", 400)
    with pytest.raises(ConfigError, match=r"the token 'heart attack': .*into 'heart' \+ 'Ġattack'"):
        extend_tokenizer(tmp_path / "old", tmp_path / "new", ["heart attack"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "spiece.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no tokenizer.json(.|\n)*--import"):
        extend_tokenizer(tmp_path / "none", tmp_path / "new", ["x"])


def test_a_unigram_model_whose_ids_have_gaps_is_refused(tmp_path):
    foreign.byte_pieces(tmp_path / "old")
    path = tmp_path / "old" / "tokenizer.json"
    tree = json.loads(path.read_text())
    gap = len(tree["model"]["vocab"]) + 7
    tree["added_tokens"].append(dict(tree["added_tokens"][0], content="<far>", id=gap))
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="cannot be extended"):
        extend_tokenizer(tmp_path / "old", tmp_path / "new", ["rankrank"])


@pytest.mark.parametrize("rows", ["random", "mean"])
@pytest.mark.parametrize("form", ["llama", "bert"])
def test_a_run_starts_from_the_old_model_with_the_extended_tokenizer(form, rows, tmp_path):
    """Extended, opened by `init_from`, computed: old rows are bitwise the source's, and the loss of new text finite."""
    kind, purpose = ("bpe", "causal") if form == "llama" else ("wordpiece", "masked")
    train_tokenizer([TEXT], tmp_path / "old", kind, 400, purpose=purpose)  # pyright: ignore[reportArgumentType]
    made = extend_tokenizer(tmp_path / "old", tmp_path / "new", texts=lambda: [DOMAIN * 9], num_learnt=8).tokenizer
    small = tiny(form, vocab_size=load_tokenizer(tmp_path / "old").vocab_size, vocab_multiple=16)
    weights = random_weights(small, seed=2)
    twin(small, weights).save_pretrained(tmp_path / "theirs")
    large = small.model_copy(update={"vocab_size": made.vocab_size})
    stage = {"data": {"train": "t"}, "sequence_length": 32, "global_batch_size": 1, "duration": {"steps": 9}}
    if form == "bert":
        stage["objective"] = {"name": "masked", "pairs": "next_sentence"}
    source = {"path": str(tmp_path / "theirs"), "missing": "initialise", "new_rows": rows}
    tree = {"folder": str(tmp_path / "run"), "tokenizer": str(tmp_path / "new"), "stages": [stage], "init_from": source}
    config = parse_run(tree | {"model": large.model_dump(mode="json")}, "test")
    start, found = StartingWeights(config), {}
    for spec in family(large).specs(large):
        values = start.rows(spec, 0, spec.shape[0])
        old = weights[spec.name]
        real = spec.stored_shape[0]
        assert torch.equal(values[: len(old)], old), spec.name
        assert not values[real:].any(), "padding rows are 0"
        if real > len(old):
            mean = old.double().mean(0).float().expand(real - len(old), *old.shape[1:])
            initial = initial_value(spec, large, config.seed)[len(old) : real]
            assert torch.equal(values[len(old) : real], mean if rows == "mean" else initial), spec.name
            # any rows are those of the whole
            assert torch.equal(start.rows(spec, len(old) - 1, real), values[len(old) - 1 : real])
        found[spec.name] = values[:real]
    [ids] = made.encode([DOMAIN])
    assert ids.max() >= small.vocab_size, "the text has new tokens"
    tokens_BT = torch.from_numpy(ids[:64])[None]
    logits_BTV = whole_model(large, found)(tokens_BT=tokens_BT)["logits_BTV"]
    loss = torch.nn.functional.cross_entropy(logits_BTV[0, :-1], tokens_BT[0, 1:])
    assert torch.isfinite(loss)


def test_the_mean_needs_rows_that_may_be_new(tmp_path):
    stage = {"data": {"train": "t"}, "sequence_length": 32, "global_batch_size": 1, "duration": {"steps": 9}}
    tree = {"folder": "f", "tokenizer": "t", "stages": [stage], "model": tiny("llama").model_dump(mode="json")}
    config = parse_run(tree | {"init_from": {"path": "p", "new_rows": "mean"}}, "test")
    with pytest.raises(ConfigError, match=r"init_from.new_rows = mean with init_from.missing = error"):
        resolve(config, 1)
