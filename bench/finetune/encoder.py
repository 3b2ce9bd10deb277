"""Encoder that the cells start from: a small BERT of English and Chinese, pretrained by the project's own commands.

    tokenizer -> prepare -> launch (two ranks) -> convert

`bench.finetune.texts` has what it reads. The encoder has ModernBERT's form (Warner et al. 2024, arXiv 2412.13663),
small batches, and masks more than BERT does (Wettig et al. 2023, arXiv 2202.08005). After 8 million tokens an encoder
of BERT's form (learned positions, norms behind the parts of a layer) with a batch four times as large had learned how
frequent the tokens are, and hardly more: its classifiers were no better than those from random weights. The folder is
resumable: a step whose result is there is not run again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.finetune.texts import DOMAINS, write_texts
from engine.config.save import save_tree
from engine.errors import PalimpsestError

VOCABULARY = 16_000
TOKENIZER_MEGABYTES = 24
STEP_TOKENS, LENGTH = 2048, 128
MASK_RATE = 0.3
PEAK_RATE = 2e-3


class CommandFailed(PalimpsestError):
    """A command of the project failed."""


@dataclass(frozen=True)
class Size:
    """Size of the encoder and of its pretraining."""

    steps: int = 11_000
    """Steps of 2,048 tokens: about half an hour on two cores."""
    layers: int = 3
    hidden: int = 192


class Encoder:
    """The encoder's files below a folder, made where they are missing."""

    def __init__(self, data: Path, folder: Path, size: Size) -> None:
        self.data, self.folder, self.size = data, folder, size

    @property
    def pretrained(self) -> Path:
        """Hugging Face folder of the pretrained encoder."""
        return self.folder / "pretrained"

    @property
    def random(self) -> Path:
        """Hugging Face folder of the same architecture with initial weights."""
        return self.folder / "random"

    def make(self) -> None:
        """Run what is missing. Raises `CommandFailed`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        texts, tokenizer, shards = (self.folder / name for name in ("texts", "tokenizer", "shards"))
        if not (self.folder / "prepare.done").exists():
            write_texts(self.data, texts)
        sources = {domain.name: texts / f"{domain.name}.jsonl" for domain in DOMAINS}
        self._run_once(
            tokenizer,
            "tokenizer",
            *map(str, sources.values()),
            "--lowercase",
            output=tokenizer,
            kind="wordpiece",
            vocab_size=VOCABULARY,
            purpose="masked",
            max_megabytes=TOKENIZER_MEGABYTES,
        )
        named = (f"{name}={file}" for name, file in sources.items())
        self._run_once(
            shards, "prepare", *named, tokenizer=tokenizer, output=shards, validation_fraction=0.01, workers=2
        )
        file = self.folder / "pretraining.yaml"
        save_tree(self.tree(), file)
        self._run_once(self._run, "launch", str(file), processes=2)
        self._run_once(self.pretrained, "convert", str(self._run), output=self.pretrained)
        if not self.random.exists():
            _write_random(self.pretrained, self.random)

    def tree(self) -> dict[str, Any]:
        """Return the run file of the pretraining."""
        shards, steps = self.folder / "shards", self.size.steps
        return {
            "name": "pretraining",
            "folder": str(self._run),
            "tokenizer": str(self.folder / "tokenizer"),
            "model": {
                "family": "bert",
                "vocab_size": VOCABULARY,
                "num_layers": self.size.layers,
                "hidden_size": self.size.hidden,
                "num_heads": self.size.hidden // 64,
                "feed_forward_size": 8 * self.size.hidden // 3,
                "max_positions": 512,
                "position": "rope",
                "norm_bias": False,
                "bias": False,
            },
            "stages": [
                {
                    "name": "pretraining",
                    "objective": {"name": "masked", "rate": MASK_RATE},
                    "data": {
                        "sources": [
                            {
                                "name": domain.name,
                                "path": str(shards / "train" / domain.name),
                                "weight": domain.weight,
                            }
                            for domain in DOMAINS
                        ],
                        "validation": {domain.name: str(shards / "validation" / domain.name) for domain in DOMAINS},
                    },
                    "sequence_length": LENGTH,
                    "global_batch_size": STEP_TOKENS // LENGTH,
                    "duration": {"steps": steps},
                    "schedule": {"shape": "linear", "warmup": steps // 20, "final_factor": 0.0},
                }
            ],
            "optimizer": {"learning_rate": PEAK_RATE, "beta2": 0.98, "weight_decay": 0.01},
            "precision": {"dtype": "bf16"},
            "parallel": {"micro_batch_size": STEP_TOKENS // LENGTH // 2},
            "evaluation": {"max_samples": 128},
            "checkpoint": {"every_steps": 1000, "keep_last": 1},
            "logging": {"every_steps": 100, "tensorboard": False, "wandb": "off", "plot": False},
        }

    @property
    def _run(self) -> Path:
        return self.folder / "run"

    def _run_once(self, result: Path, name: str, *arguments: str, **options: Any) -> None:
        """Run a command unless its result is there; a launch or a preparation that was killed goes on."""
        done = self.folder / f"{name}.done"
        if done.exists():
            return
        started = time.monotonic()
        given = [text for option, value in options.items() for text in (f"--{option.replace('_', '-')}", str(value))]
        log = self.folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                [sys.executable, "-m", "engine.cli", name, *arguments, *given],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                check=False,
            ).returncode
        if code:
            raise CommandFailed(f"palimpsest {name} ended with exit code {code}", remedy=f"read {log}")
        print(f"{name}: {result}, {time.monotonic() - started:.0f} s", flush=True)
        done.touch()


def _write_random(pretrained: Path, output: Path) -> None:
    """Write the same architecture with transformers' own initial weights, and the same tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(pretrained))
    new = output.with_suffix(".new")
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(new)
    new.rename(output)
