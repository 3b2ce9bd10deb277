"""Tiny models of every form with the head of a task."""

from typing import Any

from engine.config.schema.model import ModelConfig, make_model
from tests.engine.models.tiny import BERT_FORMS, tiny

FORMS = {
    "gpt2": tiny("gpt2"),
    "llama": tiny("llama", tie_embeddings=False),
    "qwen3": tiny("qwen3"),
    "pythia": tiny("pythia"),
    "mistral": tiny("llama", sliding_window=4),
    "bert": tiny("bert"),
    "bert-without-pairs": tiny("bert", pair_head=False),
    "roberta": tiny("bert", pair_head=False, token_types=1),
    "megatron-bert": BERT_FORMS["megatron-bert"],
    "modernbert": tiny("modernbert"),
    "modernbert-biased": tiny("modernbert", bias=True, norm_bias=True, local_rope_theta=None),
}
NUM_LABELS = 5
MEAN = "-mean"


def with_head(form: str, task: str = "classification", num_labels: int = NUM_LABELS, **changes: Any) -> ModelConfig:
    """Return the configuration of a form with a head, and other values of some keys; `FORM-mean` reads the mean."""
    head = {"task": task, "num_labels": num_labels, "pooling": "mean" if form.endswith(MEAN) else "token"}
    tree = FORMS[form.removesuffix(MEAN)].model_dump() | {"task_head": head} | changes
    return make_model(**tree)
