"""Writes exported folders and what readers must find in them: `python -m tests.readers.write FOLDER`.

One folder per case: `model/` is what `palimpsest convert` writes, `expected.safetensors` and `expected.json` hold
tokens, logits, loss and greedy text. Expected values come from our own forward pass, from `tokenizers` alone, and from
loops written here, so they do not depend on any version of transformers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from engine.config.schema.model import BERTConfig, ModelConfig
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.models.materialize import whole_model
from engine.serve.export import export
from engine.serve.source import Trained, open_trained
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS
from tests.engine.serve.runs import run_config, save
from tests.readers.kinds import KINDS, make_tokenizer

TEXTS = (
    "Archimedes, in ink",
    "The 2,000,000 monks' parchment isn't  scraped\n\n  away: naïve œuvre ἀπὸ τοῦ πάλιν",
    "def overwrite(page):\n\treturn [old for old in page if old > 0]",
)
PROMPT = "Archimedes, in"
NUM_NEW_TOKENS = 8
NUM_TOKENS = 48


@dataclass(frozen=True)
class Case:
    """A form of model with a kind of tokenizer."""

    form: str
    kind: str


def cases() -> dict[str, Case]:
    """Every form with a tokenizer of ours, and every kind of tokenizer with a form that it can serve."""
    of_family = {"gpt": "bpe-causal", "bert": "wordpiece-masked", "t5": "bpe-span_corruption"}
    found = {form: Case(form, of_family[config.family]) for form, config in (FORMS | BERT_FORMS | T5_FORMS).items()}
    # AutoTokenizer of transformers 5 splits text by Qwen2's own rules where a model is of this type
    found = {form: case for form, case in found.items() if not form.startswith("qwen2")}
    forms = {"causal": "llama", "masked": "bert", "span_corruption": "t5-v1.1"}
    found |= {f"tokenizer-{kind}": Case(forms[kind.rpartition("-")[2]], kind) for kind in KINDS}
    return found | {"tokenizer-roberta": Case("roberta", "imported-roberta-masked")}


def main() -> None:
    from engine.serve.quiet import quiet

    quiet()
    output = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in cases().items():
            write_case(case, output / name, Path(scratch) / name)
            print(f"wrote {name}", flush=True)


def write_case(case: Case, output: Path, scratch: Path) -> None:
    """Trains nothing: random weights are saved as a checkpoint, exported, and computed with."""
    output.mkdir(parents=True)
    make_tokenizer(case.kind, scratch / "tokenizer")
    config = run_config(scratch / "run", case.form, scratch / "tokenizer")
    save(config, step=3, seed=3)
    trained = open_trained(config.folder)
    export(trained, output / "model")
    save_file(computed(trained), output / "expected.safetensors")
    assert trained.tokenizer is not None
    told = described(trained, load_tokenizer(trained.tokenizer))
    (output / "expected.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


def computed(trained: Trained) -> dict[str, torch.Tensor]:
    """Inputs, labels, logits and mean loss of our own forward pass."""
    generator = torch.Generator().manual_seed(1)
    assert trained.tokenizer is not None
    vocabulary = load_tokenizer(trained.tokenizer).vocab_size
    tokens_BT = torch.randint(5, vocabulary, (2, NUM_TOKENS), generator=generator)
    model = whole_model(trained.config, trained.weights)
    if trained.config.family == "t5":
        inputs = {"input_ids": tokens_BT, "decoder_input_ids": tokens_BT.flip(1)[:, : NUM_TOKENS // 2].contiguous()}
        ours = {"tokens_BS": inputs["input_ids"], "decoder_tokens_BT": inputs["decoder_input_ids"]}
    else:
        inputs, ours = {"input_ids": tokens_BT}, {"tokens_BT": tokens_BT}
    with torch.no_grad():
        made = model(**ours)
    logits_BTV = made["logits_BTV"].contiguous()
    labels_BT = logits_BTV.argmax(-1).roll(1, dims=1).contiguous()
    shifted = trained.config.family == "gpt"  # their decoders shift labels themselves
    left, right = (logits_BTV[:, :-1], labels_BT[:, 1:]) if shifted else (logits_BTV, labels_BT)
    found = {**inputs, "labels": labels_BT, "logits": logits_BTV}
    found["loss"] = F.cross_entropy(left.flatten(0, 1), right.flatten())
    if "pair_logits_BC" in made:
        found["pair_logits"] = made["pair_logits_BC"].contiguous()
    return found


def described(trained: Trained, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What a tokenizer and a greedy decoder must say."""
    config = trained.config
    ids = [[int(number) for number in found] for found in tokenizer.encode(list(TEXTS))]
    told: dict[str, Any] = {
        "texts": list(TEXTS),
        "ids": ids,
        "framed": [framed(config, tokenizer, [found]) for found in ids],
        "pair": framed(config, tokenizer, ids[:2]),
        "token_types": isinstance(config, BERTConfig) and config.token_types > 1,
        "max_length": config.longest_row,
        "end": None if config.family == "bert" else tokenizer.eos_id,
        "dtype": "float32",
        "kind": {"gpt": "CausalLM", "t5": "Seq2SeqLM"}.get(config.family, "MaskedLM"),
    }
    if config.family != "bert":
        told |= {"prompt": PROMPT, "num_new_tokens": NUM_NEW_TOKENS, "greedy": greedy(trained, tokenizer)}
    return told


def framed(config: ModelConfig, tokenizer: TextTokenizer, parts: list[list[int]]) -> list[int] | None:
    """Ids with the special tokens that training put around them; None where that depends on the kind of tokenizer."""
    if config.family == "gpt":
        return [number for part in parts for number in part]
    if config.family == "t5":
        return [*parts[0], tokenizer.eos_id] if len(parts) == 1 else None
    assert isinstance(config, BERTConfig)
    known = tokenizer.vocabulary
    if len(parts) > 1 and config.token_types < 2:
        return None
    assert known.classify is not None
    assert known.separate is not None
    return [known.classify, *(number for part in parts for number in (*part, known.separate))]


def greedy(trained: Trained, tokenizer: TextTokenizer) -> list[int]:
    """The likeliest new tokens behind the prompt, from whole forward passes without a cache."""
    model, (prompt,) = whole_model(trained.config, trained.weights), tokenizer.encode([PROMPT])
    padding = tokenizer.vocabulary.padding
    is_t5 = trained.config.family == "t5"
    read = torch.tensor([framed(trained.config, tokenizer, [prompt.tolist()])])
    said = torch.tensor([[tokenizer.eos_id if padding is None else padding]]) if is_t5 else read
    first = said.shape[1]
    for _ in range(NUM_NEW_TOKENS):
        with torch.no_grad():
            inputs = {"tokens_BS": read, "decoder_tokens_BT": said} if is_t5 else {"tokens_BT": said}
            likeliest = model(**inputs)["logits_BTV"][:, -1:].argmax(-1)
        said = torch.cat((said, likeliest), dim=1)
        if int(likeliest) == tokenizer.eos_id:
            break
    return said[0, first:].tolist()


if __name__ == "__main__":
    main()
