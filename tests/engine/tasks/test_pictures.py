"""Pictures of a fine-tuning run: drawn for labels in any script, and what they show is what was recorded."""

import json
import warnings

import pytest
from PIL import Image

from engine.tasks.pictures import CONFUSION, LEARNING, draw_confusion, draw_learning


def write(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


STEPS = [{"step": step, "loss": 2.0 - 0.1 * step, "learning_rate": 1e-3} for step in range(1, 9)]
EVALUATED = [{"step": 4, "validation_loss": 1.9, "validation_accuracy": 0.5}]


@pytest.mark.parametrize(
    "records", [STEPS, STEPS + EVALUATED, EVALUATED, []], ids=["steps", "both", "measures", "none"]
)
def test_a_learning_curve_is_drawn_from_what_was_recorded(tmp_path, records):
    write(tmp_path, *sorted(records, key=lambda record: record["step"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that no font has, and of empty legends
        draw_learning(tmp_path, "情感 $x$", "validation_accuracy", 4 if records else None)
    with Image.open(tmp_path / LEARNING) as image:
        assert image.width == (1320 if EVALUATED[0] in records else 780)
        assert image.info["Title"] == "情感 $x$"
    assert sorted(path.name for path in tmp_path.iterdir()) == [LEARNING, "metrics.jsonl"]


@pytest.mark.parametrize("labels", [("负面", "正面", "$neutral$"), tuple(f"label {n}" for n in range(40))])
def test_a_confusion_matrix_is_shaded_by_the_share_of_each_label(tmp_path, labels):
    size = len(labels)
    confusion = [[3 if i == j else 0 for j in range(size)] for i in range(size)]
    confusion[0] = [0] * size  # a label without an example
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(tmp_path, "run", labels, confusion)
    with Image.open(tmp_path / CONFUSION) as image:
        # dark blue is a share of 1: cells of the diagonal but the first
        dark = sum(count for count, color in image.convert("RGB").getcolors(1 << 24) or () if color == (8, 48, 107))
    assert dark > 200
