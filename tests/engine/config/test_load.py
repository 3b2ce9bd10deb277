"""Reading configurations: precedence, includes, overrides, and every message about what cannot be read."""

from pathlib import Path
from typing import Any

import pytest

from engine.config.load import load_run, read_tree
from engine.errors import CheckpointError, ConfigError

MINIMAL = """
folder: runs/x
tokenizer: data/tokenizer
model: {vocab_size: 500, num_layers: 4, hidden_size: 64, num_heads: 4}
stages:
  - data: {train: data/train}
    sequence_length: 64
    global_batch_size: 8
    duration: {steps: 10}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, list(overrides))
    return str(caught.value)


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "optimizer: {learning_rate: 0.1, beta1: 0.5}")
    config = load_run(path, ["optimizer.learning_rate=0.2"])
    assert (config.optimizer.learning_rate, config.optimizer.beta1, config.optimizer.beta2) == (0.2, 0.5, 0.95)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_floats_with_exponents_are_numbers(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, MINIMAL + f"optimizer: {{learning_rate: {text}}}")
    assert load_run(path).optimizer.learning_rate == 1e-4
    assert load_run(path, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 1e-4


def test_yaml_1_2_words_are_text(tmp_path: Path) -> None:
    assert load_run(write(tmp_path, MINIMAL + "name: no")).name == "no"


def test_overrides_reach_lists_and_make_sections(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_run(path, ["stages.0.duration.steps=3", "parallel.pipe=2", "optimizer.no_decay=['*.bias']"])
    assert config.stages[0].num_steps == 3
    assert config.parallel.pipe == 2
    assert config.optimizer.no_decay == ("*.bias",)


def test_includes_lie_below_the_file_and_later_ones_win(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path, "model: {vocab_size: 1, num_layers: 1}\nname: first", "parts/one.yaml")
    write(tmp_path, "include: three.yaml\nmodel: {num_layers: 2}", "parts/two.yaml")
    write(tmp_path, "model: {num_layers: 9, num_heads: 3}", "parts/three.yaml")
    path = write(tmp_path, "include: [parts/one.yaml, parts/two.yaml]\nmodel: {hidden_size: 5}")
    assert read_tree(path) == {
        "model": {"vocab_size": 1, "num_layers": 2, "num_heads": 3, "hidden_size": 5},
        "name": "first",
    }


def test_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, "stages: [1, 2]", "below.yaml")
    assert read_tree(write(tmp_path, "include: below.yaml\nstages: [3]")) == {"stages": [3]}


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL), "optimizer.learning_rat=1e-4")
    assert "unknown key optimizer.learning_rat" in text
    assert "to do: did you mean learning_rate?" in text
    assert "beta1, beta2, clip_norm" in text


def test_unknown_key_of_a_model_names_the_keys_of_its_family_and_the_nearest(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL), "model.family=bert", "model.token_typs=2")
    assert "unknown key model.token_typs of family bert\n" in text
    assert "to do: did you mean token_types?" in text
    assert "pair_head" in text
    assert "relative_buckets" not in text


def test_key_of_another_family_is_unknown_and_names_that_family(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL), "model.token_types=2")
    assert "unknown key model.token_types of family gpt\n" in text
    assert "to do: leave it out: model.family = bert has it" in text
    assert "model.family = gpt or bert has it" in message(
        write(tmp_path, MINIMAL), "model.family=t5", "model.position=rope"
    )


def test_unknown_family_names_the_nearest(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL), "model.family=brt")
    assert "model.family = 'brt' is not allowed\n  allowed: 'gpt', 'bert', 't5'\n  to do: did you mean bert?" in text


def test_default_made_of_a_wrong_value_is_not_reported(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL), "model.hidden_size=wide")
    assert "model.hidden_size = 'wide' is not allowed" in text
    assert "head_size" not in text


def test_key_of_several_types_is_named_without_them(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL), "stages.0.data.validation.web=3")
    assert "stages.0.data.validation.web = 3 is not allowed" in text
    assert "dict[" not in text


def test_unknown_key_inside_a_list(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL), "stages.0.data.tarin=x")
    assert "unknown key stages.0.data.tarin" in text
    assert "did you mean train?" in text


def test_unknown_section_that_is_near_nothing(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL + "zzz: 1"))
    assert "unknown key zzz" in text
    assert "to do: remove it" in text


def test_repeated_key(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL + "name: a\nname: b\n"))
    assert "is not valid YAML" in text
    assert 'duplicate key "name"' in text
    assert "line" in text
    assert "suppress" not in text


def test_missing_keys(tmp_path: Path) -> None:
    text = message(write(tmp_path, MINIMAL.replace("folder: runs/x", "").replace("vocab_size: 500, ", "")))
    assert "2 problems" in text
    assert "folder is missing" in text
    assert "to do: write model.vocab_size in the file or on the command line" in text


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = message(
        write(tmp_path, MINIMAL), "parallel.zero_stage=4", "precision.dtype=fp16", "model.num_layers=0", "zero=1"
    )
    assert "4 problems" in text
    assert "parallel.zero_stage = 4 is not allowed" in text
    assert "input should be 'fp32' or 'bf16'" in text
    assert "model.num_layers = 0 is not allowed" in text
    assert "unknown key zero" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layers='4'", "model.num_layers = '4' is not allowed"),
        ("model.num_layers=4.5", "model.num_layers = 4.5 is not allowed"),
        ("model.bias=1", "model.bias = 1 is not allowed"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1 is not allowed"),
        ("optimizer.beta1=1.0", "optimizer.beta1 = 1.0 is not allowed"),
        ("optimizer.epsilon=1e-50", "optimizer.epsilon = 1e-50 is not allowed"),  # 0 in fp32
        ("model.norm_epsilon=1e-50", "model.norm_epsilon = 1e-50 is not allowed"),
        ("stages=[]", "stages = [] is not allowed"),
        ("model=3", "model = 3 is not allowed"),
    ],
)
def test_values_of_the_wrong_kind(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message(write(tmp_path, MINIMAL), override)


def test_a_choice_that_is_nearly_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    near = message(path, "stages.0.data.packing=bestfit")
    assert near.endswith("input should be 'concatenate' or 'best_fit'\n  to do: did you mean best_fit?")
    far = message(path, "stages.0.data.packing=xyz")
    assert far.endswith("to do: change stages.0.data.packing in the file or on the command line")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.beta1", "override 'optimizer.beta1' has no value"),
        ("=3", "override '=3' has no value"),
        ("name=[1", "override 'name=[1' is not valid YAML"),
        ("stages.1.name=x", "override 'stages.1.name=x': no entry 1\n  allowed: 0 to 0"),
        ("stages.².name=x", "override 'stages.².name=x': no entry ²"),
        ("stages.first.name=x", "override 'stages.first.name=x': no entry first"),
        ("folder.x=1", "override 'folder.x=1': folder is the value 'runs/x', not a section"),
    ],
)
def test_overrides_that_cannot_be_applied(tmp_path: Path, override: str, expected: str) -> None:
    assert message(write(tmp_path, MINIMAL), override).startswith(expected)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no.yaml cannot be read: No such file or directory" in message(tmp_path / "no.yaml")
    assert "cannot be read: Is a directory" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message(tmp_path / "binary.yaml")
    assert "holds list\n  allowed: sections of keys and values" in message(write(tmp_path, "- 1"))
    assert "holds NoneType" in message(write(tmp_path, ""))


def test_includes_that_cannot_be_read(tmp_path: Path) -> None:
    assert "missing.yaml cannot be read" in message(write(tmp_path, "include: missing.yaml"))
    assert "include is 3" in message(write(tmp_path, "include: 3"))
    write(tmp_path, "include: run.yaml", "other.yaml")
    assert "run.yaml includes itself" in message(write(tmp_path, "include: other.yaml"))


def test_a_date_is_no_value(tmp_path: Path) -> None:
    assert "put text in quotes" in message(write(tmp_path, MINIMAL + "name: 2024-01-01"))


def test_a_merge_leaves_the_included_section_alone(tmp_path: Path) -> None:
    """Two runs that include one file do not see each other's keys."""
    write(tmp_path, "model: {num_layers: 1}", "below.yaml")
    first = write(tmp_path, "include: below.yaml\nmodel: {num_heads: 2}", "first.yaml")
    second = write(tmp_path, "include: below.yaml", "second.yaml")
    read_tree(first)
    assert read_tree(second) == {"model": {"num_layers": 1}}


def test_a_wrong_entry_does_not_make_its_list_too_short(tmp_path: Path) -> None:
    told = message(write(tmp_path, MINIMAL), "stages.0.global_batch_sice=8")
    assert "unknown key stages.0.global_batch_sice" in told
    assert "did you mean global_batch_size?" in told
    assert "problems" not in told
    assert "stages = [] is not allowed" in message(write(tmp_path, MINIMAL), "stages=[]")


def test_numbers_are_finite_and_trees_end(tmp_path: Path) -> None:
    assert "optimizer.learning_rate" in message(write(tmp_path, MINIMAL), "optimizer.learning_rate=1e400")
    assert "ircular" in message(write(tmp_path, MINIMAL + "name: &a [*a]"))


def bomb(depth: int) -> str:
    """Text whose value has 9 ** depth entries."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: " + "[" * 1000 + "]" * 1000, "is nested more than 64 deep"),
        ("a: " + "[" * 100 + "]" * 100, "is nested more than 64 deep"),
        ("a: &a [*a]", "is circular"),
        (bomb(12), "has more than 100,000 values with what its aliases"),
        ("# " + "x" * (1 << 20), "has more than 1,048,576 bytes"),
        ("a: 2001-99-99", "has a value that is none (month must be in 1..12)"),
        ("a: !!int x", "has a value that is none"),
        ("a: " + "1" * 5000, "has a value that is none"),
    ],
)
def test_files_beyond_any_configuration_are_refused_by_size(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_overrides_beyond_any_configuration_are_refused_by_size(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1")
    with pytest.raises(ConfigError, match="is nested more than 64 deep"):
        load_run(path, ["stages=" + "[" * 500 + "]" * 500])


@pytest.mark.parametrize(
    "secret",
    [
        "root:x:hunter2",
        "hunter2: [",
        "- hunter2\n- b",
        "password: hunter2",
        "a: hunter2\na: hunter2",
        "a: !hunter2 x",
        "{hunter2: 3",
    ],
)
def test_an_included_file_that_is_no_configuration_is_not_echoed(tmp_path: Path, secret: str) -> None:
    (tmp_path / "other").write_text(secret)
    path = tmp_path / "run.yaml"
    path.write_text("include: other\nseed: 1")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(tmp_path / "other") in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_model_whose_source_does_not_answer_is_that_of_the_run_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that has begun needs its source no more; it is said, for a name may be misspelt. A folder whose file is
    damaged does not hide what is wrong with the source."""
    text = MINIMAL.replace("folder: runs/x", f"folder: {tmp_path / 'run'}\ninit_from: runs/strat")
    path = write(tmp_path, "\n".join(line for line in text.splitlines() if not line.startswith("model:")))

    def model_of(source: str) -> dict[str, Any]:
        raise CheckpointError(f"{source} is not there")

    with pytest.raises(CheckpointError, match="runs/strat is not there"):
        load_run(path, model_of=model_of)
    noted = tmp_path / "run" / "config.yaml"
    noted.parent.mkdir()
    for damaged in ("model: {a: 1", "- a list", "model: text"):
        noted.write_text(damaged)
        with pytest.raises(CheckpointError, match="runs/strat is not there"):
            load_run(path, model_of=model_of)
    assert not caplog.text
    noted.write_text(MINIMAL)
    assert load_run(path, model_of=model_of).model.hidden_size == 64
    assert f"the model is that of {noted}" in caplog.text
    assert "runs/strat is not there" in caplog.text
