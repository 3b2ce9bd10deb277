"""Pairs of layouts, one that saves and one that goes on: exactly 24 in which any two values stand together that can.

Model, precision and optimizer are the run's; each side has a ZeRO stage and the sizes of the axes, for itself: so every
stage is left for every other, every axis is given up for every other, and each with every model. What is possible is
asked of `engine.config`. Greedy, in the manner of AETG (Cohen et al. 1997): the next pair is the one of some random
completions of two values that are missing which brings the most; the seed is the first that needs no more than 24.

The search takes 20 seconds, so its result lies in pairs.json, and test_resharding.py holds that to what is possible. A
further factor is a line in `FACTORS` or `SIDE`; then `python -m tests.distributed.pairs` searches anew.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from engine.config.resolve import examine
from tests.distributed.cases import MODELS
from tests.distributed.runs import run_config, run_tree, write_corpus, write_sentences

NUM_PAIRS = 24
NUM_STEPS, SAVED_AT = 22, 2
FEW_STEPS = 8
"""Of the cases of `make test`."""
LARGEST_WORLD = 8
SIDES = ("first", "second")
SIDE: dict[str, tuple[Any, ...]] = {
    "zero_stage": (0, 1, 2, 3),
    "pipe": (1, 2),
    "tensor": (1, 2),
    "data": (1, 2),
    "sequence": (1, 2),
    "chunks_per_stage": (1, 2),
    "offload": ("none", "optimizer"),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("gpt2", "llama", "bert", "t5", "t5-v1.1"),  # heads: tied, untied, tied with pairs, tied, untied
    "dtype": ("fp32", "bf16"),
    "optimizer": ("adamw", "muon"),
    **{f"{side} {name}": values for side in SIDES for name, values in SIDE.items()},
}
RULED = (
    ("model", "pipe", "tensor", "sequence", "data", "chunks_per_stage"),
    ("dtype", "optimizer", "zero_stage", "offload"),
)
"""Factors that rules of `engine.config` read together: it is asked about these parts, of which there are few. A test
holds the pairs to the whole."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "gpt": {"name": "causal"},
    "bert": {"name": "masked", "pairs": "next_sentence"},
    "t5": {"name": "span_corruption"},
}
TRIES, CHOICES, SEEDS = 200, 30, range(16, 216)
"""Random completions after which two values count as ones that cannot be; possible ones among which the best is taken;
seeds that are tried: those before 16 needed more pairs."""
TABLE = Path(__file__).with_name("pairs.json")

Pair = dict[str, Any]
"""A value for every factor."""


def write_families(folder: Path) -> None:
    """Write the corpora of the pairs' families, each in a folder of its name."""
    (folder / "gpt").mkdir()
    write_corpus(folder / "gpt")
    write_sentences(folder / "bert", "wordpiece", VOCAB["bert"], "masked")
    write_sentences(folder / "t5", "bpe", VOCAB["t5"], "span_corruption")


def name_of(pair: Pair) -> str:
    """For people: what differs from one rank under ZeRO-n."""
    run = "-".join(str(pair[name]) for name in ("model", "dtype", "optimizer"))
    return f"{run}: {side_name(pair, 'first')} -> {side_name(pair, 'second')}"


def side_name(pair: Pair, side: str) -> str:
    """A layout in short: ZeRO stage, then each axis that is more than 1."""
    sizes = {name: pair[f"{side} {name}"] for name in SIDE if name != "zero_stage"}
    more = [f"{name} {size}" for name, size in sizes.items() if size != SIDE[name][0]]
    return " ".join([f"ZeRO-{pair[f'{side} zero_stage']}", *more])


def family_of(pair: Pair) -> str:
    return MODELS[pair["model"]].get("family", "gpt")


def world_size(pair: Pair, side: str) -> int:
    sizes = [pair[f"{side} {axis}"] for axis in ("pipe", "tensor", "data", "sequence")]
    return sizes[0] * sizes[1] * sizes[2] * sizes[3]


def tree_of(pair: Pair, side: str, corpus: Path, folder: Path, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Return the run in the layout of one side, saved after every second step; `corpus` has a folder per family."""
    family = family_of(pair)
    shape = {name: value for name, value in MODELS[pair["model"]].items() if name != "max_positions"}
    shape["num_layers"] = max(shape["num_layers"], 4)  # two stages of two chunks
    base = run_tree(corpus / family, folder)["stages"][0]
    return run_tree(
        corpus / family,
        folder,
        model=shape | {"vocab_size": VOCAB[family]},
        stages=[base | {"objective": OBJECTIVES[family], "duration": {"steps": num_steps}}],
        optimizer={"name": pair["optimizer"], "learning_rate": 2e-3},
        precision={"dtype": pair["dtype"]},
        parallel={name: pair[f"{side} {name}"] for name in SIDE},
        evaluation={"every_steps": None},
        checkpoint={"every_steps": SAVED_AT, "keep_last": num_steps},
        checks=False,
    )


VOCAB = {"gpt": 300, "bert": 260, "t5": 400}
"""By family, and of the tokenizers that `test_resharding` trains."""


@cache
def covering() -> tuple[Pair, ...]:
    """Return the 24 pairs of pairs.json."""
    return tuple(json.loads(TABLE.read_text(encoding="utf-8")))


def search() -> tuple[Pair, ...]:
    """Return 24 pairs that cover every two values that can stand together."""
    for seed in SEEDS:
        pairs = _cover(random.Random(seed))
        if len(pairs) <= NUM_PAIRS:
            return tuple(pairs + list(itertools.islice(_completions({}, random.Random(seed)), NUM_PAIRS - len(pairs))))
    raise AssertionError(f"no covering of {NUM_PAIRS} pairs under the seeds of {SEEDS}: raise NUM_PAIRS")


def selection(number: int, largest_world: int) -> list[Pair]:
    """So many of the 24, each of another model, in worlds of at most so many ranks, that bring most together."""
    small = [pair for pair in covering() if max(world_size(pair, side) for side in SIDES) <= largest_world]
    chosen: list[Pair] = []
    while len(chosen) < number:
        seen = set().union(*map(values_together, chosen))
        models = {pair["model"] for pair in chosen}
        new = [pair for pair in small if pair["model"] not in models]
        chosen.append(max(new, key=lambda pair: len(values_together(pair) - seen)))
    return chosen


def values_together(pair: Pair) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(pair.items(), 2))


def everything() -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Any two values of different factors, possible or not."""
    return {
        (left, right)
        for one, other in itertools.combinations(FACTORS, 2)
        for left in ((one, value) for value in FACTORS[one])
        for right in ((other, value) for value in FACTORS[other])
    }


def possible(pair: Pair) -> bool:
    """Whether the sides differ, both worlds are small enough, and `engine.config` accepts both runs, part by part."""
    if all(pair[f"first {name}"] == pair[f"second {name}"] for name in SIDE):
        return False
    return all(world_size(pair, side) <= LARGEST_WORLD for side in SIDES) and all(
        _part_accepted(names, tuple(pair[name if name in FACTORS else f"{side} {name}"] for name in names))
        for side in SIDES
        for names in RULED
    )


@cache
def _part_accepted(names: tuple[str, ...], values: tuple[Any, ...]) -> bool:
    """Whether a run is accepted that has these values and the first one of everything else."""
    given = dict(zip(names, values, strict=True))
    run = {name: given.get(name, options[0]) for name, options in FACTORS.items() if name not in SIDE}
    side = {f"first {name}": given.get(name, options[0]) for name, options in SIDE.items()}
    return accepted(run | side, "first")


def accepted(pair: Pair, side: str) -> bool:
    """Whether `engine.config` accepts the run of one side as a whole."""
    config = run_config(tree_of(pair, side, Path("corpus"), Path("run")))
    return not examine(config, world_size(pair, side))[1]


def _cover(rng: random.Random) -> list[Pair]:
    missing, pairs = everything(), []
    for two in sorted(missing, key=repr):
        if two not in missing:
            continue
        found = list(itertools.islice(_completions(dict(two), rng), CHOICES))
        if found:
            best = max(found, key=lambda pair: len(values_together(pair) & missing))
            missing -= values_together(best)
            pairs.append(best)
    return pairs


def _completions(given: Pair, rng: random.Random) -> Iterator[Pair]:
    for _ in range(TRIES):
        pair = {name: given.get(name, rng.choice(values)) for name, values in FACTORS.items()}
        if possible(pair):
            yield pair


if __name__ == "__main__":
    rows = ",\n".join(json.dumps(pair) for pair in search())
    TABLE.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
