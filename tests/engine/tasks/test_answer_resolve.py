"""Task files of answers become ordinary runs: lengths, steps, chat template; and the errors before training."""

import json
from pathlib import Path

import pytest

from engine.config.load import load_run, read_tree
from engine.config.resolve import resolve
from engine.config.save import save_tree
from engine.data.objectives.answer import rounds
from engine.data.shards.dataset import TokenDataset
from engine.data.tokenizer.folder import tokenizer_hash
from engine.errors import ConfigError, DataError, PalimpsestError
from engine.tasks.dialogues import PLAIN, TEMPLATE_FILE
from engine.tasks.resolve import resolve_task
from tests.distributed.runs import write_sentences
from tests.engine.tasks.answer_starts import answer_tree, write_dialogues, write_folder, write_pairs
from tests.engine.tasks.starts import write_start

REPOSITORY = Path(__file__).parents[3]
MESSAGES = {"messages": "messages"}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Folders `gpt2` and `t5`, and their tokenizer."""
    folder = tmp_path_factory.mktemp("starts")
    write_sentences(folder, "bpe", 400, "span_corruption")
    for form in ("gpt2", "t5"):
        write_folder(folder / form, form, folder / "tokenizer", max_positions=96)
    return folder


def test_a_gpt_has_prompt_and_answer_in_a_row(tmp_path, starts):
    write_pairs(tmp_path)
    run = resolve_task(answer_tree(tmp_path, starts / "gpt2"), "task")
    (stage,) = run.stages
    assert run.model.task_head is None
    assert run.init_from is not None
    assert run.init_from.missing == "error", "there is no head to initialise"
    assert (stage.objective.name, stage.objective.answer_length, stage.num_steps) == ("answer", 0, 3)
    assert stage.sequence_length % 8 == 0
    assert stage.data.train is not None
    dataset = TokenDataset(stage.data.train)
    shard = dataset.shard(0)
    assert shard.sentences is not None
    assert rounds(shard.sentences).prompts_R.tolist() == shard.documents[:-1].tolist()
    assert resolve(run, 1).world_size == 1
    save_tree(run.model_dump(mode="json", exclude_none=True), tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run == resolve_task(answer_tree(tmp_path, starts / "gpt2"), "task")


def test_t5_has_the_answer_in_a_row_of_its_own(tmp_path, starts):
    write_pairs(tmp_path)
    stage = resolve_task(answer_tree(tmp_path, starts / "t5"), "task").stages[0]
    longest_answer = max(
        int((rounds(shard.sentences).ends_R - rounds(shard.sentences).answers_R).max())
        for part in (stage.data.train, stage.data.validation)
        for shard in [TokenDataset(str(part)).shard(0)]
        if shard.sentences is not None
    )
    assert stage.objective.answer_length == -(-longest_answer // 8) * 8
    given = answer_tree(tmp_path, starts / "t5", sequence_length=24) | {}
    given["stages"][0]["objective"] = {"name": "answer", "answer_length": 16}
    stage = resolve_task(given, "task").stages[0]
    assert (stage.sequence_length, stage.objective.answer_length) == (24, 16)


def test_steps_count_rows_where_examples_are_packed(tmp_path, starts):
    write_pairs(tmp_path, train=60)
    one = resolve_task(answer_tree(tmp_path, starts / "gpt2", global_batch_size=5, sequence_length=96), "task")
    packed = resolve_task(
        answer_tree(tmp_path, starts / "gpt2", global_batch_size=5, sequence_length=96, data={"packing": "best_fit"}),
        "task",
    )
    assert one.stages[0].num_steps == 3 * 60 / 5
    assert 0 < packed.stages[0].num_steps < one.stages[0].num_steps / 2


def test_the_plain_template_is_kept_with_a_copy_of_the_tokenizer(tmp_path, starts):
    write_dialogues(tmp_path)
    tree = answer_tree(tmp_path, starts / "gpt2", MESSAGES) | {"tokenizer": str(starts / "tokenizer")}
    run = resolve_task(dict(tree), "task")
    assert run.tokenizer == tmp_path / "run" / "tokenizer"
    assert (run.tokenizer / TEMPLATE_FILE).read_text() == PLAIN
    assert not (starts / "tokenizer" / TEMPLATE_FILE).exists()
    assert tokenizer_hash(run.tokenizer) == tokenizer_hash(starts / "tokenizer")
    imported = resolve_task(answer_tree(tmp_path, starts / "gpt2", MESSAGES) | {"folder": str(tmp_path / "b")}, "task")
    assert (imported.tokenizer / TEMPLATE_FILE).read_text() == PLAIN
    write_pairs(tmp_path)
    plain = answer_tree(tmp_path, starts / "gpt2") | {
        "folder": str(tmp_path / "c"),
        "tokenizer": str(starts / "tokenizer"),
    }
    assert resolve_task(plain, "task").tokenizer == starts / "tokenizer"


def test_another_template_is_another_folder_of_examples(tmp_path, starts):
    write_dialogues(tmp_path)
    tree = answer_tree(tmp_path, starts / "gpt2", MESSAGES)
    first = resolve_task(dict(tree), "task").stages[0].data.train
    (tmp_path / "run" / "tokenizer" / TEMPLATE_FILE).write_text(
        PLAIN.replace("Assistant:", "Codex:").replace("capitalize", "upper")
    )
    with pytest.raises(DataError, match="asks with"):
        resolve_task(dict(tree), "task")
    (tmp_path / "run" / "tokenizer" / TEMPLATE_FILE).write_text(
        PLAIN.replace(": ", " - ").replace("Assistant:", "Assistant -")
    )
    assert resolve_task(dict(tree), "task").stages[0].data.train != first


@pytest.mark.parametrize(
    ("form", "stage", "said"),
    [
        ("gpt2", {"objective": {"name": "answer", "answer_length": 8}}, "answer_length = 8 with model.family = gpt"),
        ("gpt2", {"objective": {"name": "answer", "labels": ["a"]}}, "objective.labels = .*does not use it"),
        ("t5", {"data": {"packing": "best_fit"}}, "packing = best_fit with objective answer"),
        (
            "t5",
            {"objective": {"name": "answer", "answer_length": 200}},
            "answer_length = 200 with model.max_positions = 96",
        ),
        ("gpt2", {"data": {"columns": {"answer": "target"}}}, "has no column 'target'"),
        ("gpt2", {"data": {"columns": MESSAGES}}, "has no column 'messages'"),
        ("gpt2", {"data": {"columns": {"reply": "r"}}}, "reply"),
    ],
)
def test_a_wrong_task_file_is_refused(tmp_path, starts, form, stage, said):
    write_pairs(tmp_path)
    tree = answer_tree(tmp_path, starts / form)
    tree["stages"][0] |= {
        key: value if key == "objective" else tree["stages"][0][key] | value for key, value in stage.items()
    }
    with pytest.raises(PalimpsestError, match=f"(?s){said}"):
        resolve(resolve_task(tree, "task"), 1)


def test_an_encoder_answers_nothing(tmp_path):
    write_start(tmp_path / "start")
    write_pairs(tmp_path)
    with pytest.raises(ConfigError, match="of family bert"):
        resolve_task(answer_tree(tmp_path, tmp_path / "start" / "hf"), "task")


def test_a_tokenizer_without_an_end_is_refused(tmp_path, starts):
    write_pairs(tmp_path)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((starts / "tokenizer" / "tokenizer.json").read_bytes())
    settings = json.loads((starts / "tokenizer" / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in settings.items() if key not in ("eos_token", "sep_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    with pytest.raises(DataError, match=r"names neither eos_token nor sep_token(?s:.*)write eos_token"):
        resolve_task(answer_tree(tmp_path, starts / "gpt2") | {"tokenizer": str(folder)}, "task")


@pytest.mark.parametrize(("file", "form"), [("answer", "gpt2"), ("answer-t5", "t5")])
def test_the_shipped_task_files_resolve(tmp_path, starts, file, form):
    write_pairs(tmp_path)
    tree = read_tree(REPOSITORY / f"configs/tasks/{file}.yaml")
    tree["stages"][0]["data"] |= {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "validation")}
    if form == "t5":
        tree["stages"][0]["sequence_length"] = 32
    run = resolve_task(tree | {"folder": str(tmp_path / "run"), "init_from": str(starts / form)}, "shipped")
    assert run.stages[0].num_steps >= 1
    assert resolve(run, 1)


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_an_adapter_that_cannot_generate_is_refused_before_training(tmp_path, starts, method):
    write_pairs(tmp_path)
    with pytest.raises(ConfigError, match=f"objective answer with adapter.method = {method}"):
        resolve_task(answer_tree(tmp_path, starts / "gpt2") | {"adapter": {"method": method}}, "task")
