"""Variants of examples: what each operator does, that they follow from seed, epoch and example, and wrong files."""

import sys

import pytest

from engine.config.schema.data import AugmentConfig
from engine.errors import ConfigError, DataError
from engine.tasks.augment import augmented, read_synonyms, variant
from engine.tasks.examples import TextExamples

SYNONYMS = {"funny": ["droll", "comic"], "film": ["movie"], "电影": ["影片"], "好": ["佳"]}
TEXT = "A funny film, and a moving one."


def examples(*texts, pairs=None):
    return TextExamples("examples.jsonl", list(texts), pairs, [str(number % 2) for number in range(len(texts))])


def test_synonyms_replace_words_and_nothing_else():
    config = AugmentConfig(synonym_rate=1.0, deletion_rate=0.0)
    made = {variant(TEXT, SYNONYMS, config, (0, epoch, 0, 0)) for epoch in range(40)}
    assert made == {f"A {word} movie, and a moving one." for word in ("droll", "comic")}
    assert variant("这部电影很好。", SYNONYMS, config, (0, 0, 0, 0)) == "这部影片很佳。"
    assert variant(TEXT, SYNONYMS, AugmentConfig(synonym_rate=0.0, deletion_rate=0.0), (0, 1, 2, 0)) == TEXT


def test_deletions_leave_one_word_and_are_as_frequent_as_their_rate():
    assert variant("one two three", {}, AugmentConfig(deletion_rate=1.0), (0, 0, 0, 0)) == "three"
    words = " ".join(str(number) for number in range(2000))
    left = variant(words, {}, AugmentConfig(deletion_rate=0.2), (1, 2, 3, 0)).split()
    assert len(left) == pytest.approx(1600, abs=4 * (2000 * 0.2 * 0.8) ** 0.5)  # four deviations
    assert left == sorted(left, key=int)


def test_a_variant_follows_from_seed_epoch_and_example():
    config = AugmentConfig(copies=2, synonym_rate=0.5, deletion_rate=0.3)
    texts = [TEXT] * 6
    made = augmented(examples(*texts), config, seed=4)
    assert made == augmented(examples(*texts), config, seed=4)
    assert len(made) == 18
    assert made.texts[:6] == texts
    assert made.labels == ["0", "1"] * 9
    assert made.texts[6:12] != made.texts[12:]
    assert len({*made.texts[6:]}) > 3
    assert made != augmented(examples(*texts), config, seed=5)
    # a variant does not depend on how many there are, nor on the examples after it
    fewer = augmented(examples(*texts[:3]), config.model_copy(update={"copies": 1}), seed=4)
    assert fewer.texts[3:] == made.texts[6:9]


def test_both_texts_of_a_pair_vary():
    config = AugmentConfig(deletion_rate=0.5)
    made = augmented(examples(*[TEXT] * 4, pairs=[TEXT] * 4), config, seed=0)
    assert made.pairs is not None
    assert len(made.pairs) == 8
    assert made.pairs[4:] != made.texts[4:]


def test_a_command_makes_texts_of_texts():
    code = "import json,sys; [print(json.dumps(json.loads(x)[::-1] + sys.argv[1])) for x in sys.stdin]"
    config = AugmentConfig(copies=2, deletion_rate=0.0, command=f"{sys.executable} -c '{code}'")
    made = augmented(examples("abc", "de\nf"), config, seed=0)
    assert made.texts == ["abc", "de\nf", "cba1", "f\ned1", "cba2", "f\ned2"]


@pytest.mark.parametrize(
    ("code", "said"),
    [('import sys; sys.exit("no model")', "ended with code 1: no model"), ("print(1)", "wrote 1 lines for 2 texts")],
)
def test_a_command_that_fails_is_told(code, said):
    config = AugmentConfig(command=f"{sys.executable} -c '{code}'")
    with pytest.raises((ConfigError, DataError), match=said):
        augmented(examples("a", "b"), config, seed=0)


def test_a_command_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match="cannot be started"):
        augmented(examples("a"), AugmentConfig(command="no-such-program"), seed=0)


def test_a_file_of_synonyms(tmp_path):
    path = tmp_path / "synonyms.tsv"
    path.write_text("Funny\tdroll\tcomic\n\nfilm\tmovie\n")
    assert read_synonyms(path) == {"funny": ["droll", "comic"], "film": ["movie"]}
    path.write_text("funny\tdroll\nfilm\n")
    with pytest.raises(DataError, match="line 2 of"):
        read_synonyms(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_synonyms(tmp_path / "nowhere")
