"""Domains that the reservoir names have to be there, and a fixed quota needs shares."""

from typing import Any

import pytest

from engine.config.load import parse_run
from engine.config.resolve import check
from engine.config.schema.run import RunConfig


def config(**reservoir: Any) -> RunConfig:
    """A run of a mixture, then of one data set."""
    sources = [{"name": name, "path": name} for name in ("web", "code")]
    stage = {"sequence_length": 8, "global_batch_size": 8, "duration": {"steps": 4}}
    tree = {
        "folder": "runs/x",
        "tokenizer": "t",
        "model": {"vocab_size": 300, "num_layers": 2, "hidden_size": 16, "num_heads": 4, "max_positions": 8},
        "stages": [
            stage | {"name": "first", "data": {"sources": sources}},
            stage | {"name": "second", "data": {"train": "new"}},
        ],
        "reservoir": {"rows": 10} | reservoir,
    }
    return parse_run(tree, "test run")


def test_domains_are_sources_or_run_stages_without_sources():
    names = ["web", "code", "second"]
    shares = dict.fromkeys(names, 1.0)
    assert not check(config(quota="fixed", shares=shares, pin={"max_bytes": 100, "domains": names}))
    assert not check(config(pin={"max_bytes": 100}))
    assert not check(config())


@pytest.mark.parametrize(
    ("reservoir", "says"),
    [
        ({"pin": {"max_bytes": 1, "domains": ["wbe"]}}, "reservoir.pin.domains: no domain has the name 'wbe'"),
        ({"pin": {"max_bytes": 1, "domains": ["first"]}}, "reservoir.pin.domains: no domain has the name 'first'"),
        ({"quota": "fixed", "shares": {"webb": 1}}, "reservoir.shares: no domain has the name 'webb'"),
        ({"quota": "fixed"}, "reservoir.quota = fixed without reservoir.shares"),
        ({"shares": {"web": 1}}, "reservoir.quota = proportional with reservoir.shares"),
    ],
)
def test_what_is_wrong_is_one_error(reservoir, says):
    [problem] = check(config(**reservoir))
    assert says in str(problem)
    assert problem.allowed
    assert problem.remedy
