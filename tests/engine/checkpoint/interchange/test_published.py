"""Published configurations map both ways, to the number and the shapes of parameters that transformers has, or are
refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from engine.checkpoint.interchange.forms import form_of, require_form
from engine.errors import ConfigError
from tests.engine.checkpoint.interchange.published import PUBLISHED, Published
from tests.engine.checkpoint.interchange.shapes import check_shapes

TAKEN = [name for name, one in PUBLISHED.items() if not one.refused]


def configuration(one: Published) -> Any:
    architecture = {"architectures": [one.architecture]} if one.architecture else {}
    return AutoConfig.for_model(one.model_type, **one.keys, **architecture)


@pytest.mark.parametrize("name", TAKEN)
def test_it_maps_both_ways(name: str):
    one = PUBLISHED[name]
    theirs = configuration(one)
    form = require_form(theirs)
    model = form.our_config(theirs, 128)
    assert form_of(model).name == one.form
    assert form.our_config(form.their_config(model, theirs.pad_token_id), 128) == model
    back = form.their_config(model, theirs.pad_token_id)
    moved = {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "n_ctx", "max_window_layers"}
    moved |= {"global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "bos_token_id", "eos_token_id"}
    for key in one.keys.keys() - moved:
        assert getattr(back, key) == getattr(theirs, key), key
    assert getattr(back, "rope_parameters", None) == getattr(theirs, "rope_parameters", None)
    assert check_shapes(form, theirs, model) == one.parameters


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in TAKEN])
def test_it_is_refused_by_name(name: str):
    theirs = configuration(PUBLISHED[name])
    with pytest.raises(ConfigError, match=PUBLISHED[name].refused):
        require_form(theirs).our_config(theirs, 128)
