"""`palimpsest finetune` on prompts and answers: a small GPT learns to reverse words, and its folder answers alike."""

import itertools
import json
import random

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from tests.distributed.runs import write_sentences
from tests.engine.tasks.answer_starts import answer_tree, write_dialogues, write_folder
from tests.tools.finetuning import finetune, write_task

pytestmark = pytest.mark.usefixtures("bare_node")


def write_reversals(folder, letters="abcdef", length=4, held_out=40):
    words = list(itertools.product(letters, repeat=length))
    random.Random(0).shuffle(words)
    for part, some in (("train", words[held_out:]), ("validation", words[:held_out])):
        rows = [{"prompt": f"{' '.join(word)} =>", "answer": f" {' '.join(reversed(word))}"} for word in some]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def predictions_of(folder):
    return [json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text().splitlines()]


def test_a_gpt_learns_a_mapping_exactly(tmp_path):
    write_sentences(tmp_path, "bpe", 300, "causal")
    write_folder(tmp_path / "start", "gpt2", tmp_path / "tokenizer", hidden_size=64, num_layers=2)
    write_reversals(tmp_path)
    tree = answer_tree(tmp_path, tmp_path / "start", duration={"steps": 200}, global_batch_size=64) | {
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
        "parallel": {"micro_batch_size": 64},
    }
    done = finetune(write_task(tmp_path, tree))
    assert done.returncode == 0, done.stderr
    measures = json.loads((tmp_path / "run" / "measures.json").read_text())
    predictions = predictions_of(tmp_path)
    # 40 words that were held out; a random answer is right once in 1,296
    assert measures["exact_match"] == measures["rouge1"] == 1.0, predictions
    assert measures["bleu"] == pytest.approx(100)
    answer = pipeline("text-generation", str(tmp_path / "run" / "huggingface"), return_full_text=False)
    for row in predictions[:12]:
        assert row["predicted"] == row["expected"]
        assert answer(row["prompt"])[0]["generated_text"] == row["predicted"]


def test_dialogues_are_answered_through_the_exported_template(tmp_path):
    write_sentences(tmp_path, "bpe", 300, "causal")
    write_folder(tmp_path / "start", "llama", tmp_path / "tokenizer", max_positions=96)
    write_dialogues(tmp_path)
    task = write_task(
        tmp_path, answer_tree(tmp_path, tmp_path / "start", {"messages": "messages"}, duration={"steps": 2})
    )
    done = finetune(task)
    assert done.returncode == 0, done.stderr
    answer = pipeline("text-generation", str(tmp_path / "run" / "huggingface"), return_full_text=False)
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    dialogues = [json.loads(line)["messages"] for line in lines]
    asked = [dialogue[:number] for dialogue in dialogues for number in range(1, len(dialogue), 2)]
    predictions = predictions_of(tmp_path)
    assert len(predictions) == len(asked)
    assert answer.tokenizer is not None
    longest = max(len(answer.tokenizer(row["expected"])["input_ids"]) for row in predictions) + 1
    for row, messages in zip(predictions, asked, strict=True):
        assert row["expected"].strip() == f"{messages[-1]['content'].removeprefix('say ')}"
        assert answer(messages, max_new_tokens=longest)[0]["generated_text"] == row["predicted"]


def test_a_t5_answers_as_its_folder_does(tmp_path):
    write_sentences(tmp_path, "bpe", 400, "span_corruption")
    write_folder(tmp_path / "start", "t5", tmp_path / "tokenizer")
    write_reversals(tmp_path, held_out=6)
    done = finetune(
        write_task(tmp_path, answer_tree(tmp_path, tmp_path / "start", duration={"steps": 2}, global_batch_size=8))
    )
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "huggingface")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "huggingface")
    predictions = predictions_of(tmp_path)
    longest = max(len(tokenizer(row["expected"])["input_ids"]) for row in predictions)
    for row in predictions:
        made = model.generate(**tokenizer(row["prompt"], return_tensors="pt"), max_new_tokens=longest)
        assert tokenizer.decode(made[0], skip_special_tokens=True) == row["predicted"]
