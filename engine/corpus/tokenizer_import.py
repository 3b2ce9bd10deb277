"""Import of a tokenizer of the Hugging Face ecosystem, by name or from a folder, as a folder of ours.

Invariant: text is split as `tokenizer.json` says, where the source has one; what an objective needs besides gets ids
after all that were there. The class that the source names only tells which tokens are special, and converts sources
that have no `tokenizer.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.corpus.tokenizer_folder import written_whole
from engine.corpus.tokenizer_training import CLASSIFY, MASK, PURPOSE_TOKENS, SENTENCEPIECE_FILE, SEPARATE, Purpose
from engine.data.tokenizer.files import MODEL_FILE, NAMED_TOKENS, build
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.data.tokenizer.portable import make_portable
from engine.data.tokenizer.wrapping import KEPT_SETTINGS, wrap
from engine.errors import DataError
from engine.foreign import custom_code, refuse_custom_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ROLES = {"cls_token": CLASSIFY, "sep_token": SEPARATE, "mask_token": MASK}


def import_tokenizer(source: str, folder: Path, purpose: Purpose = "causal") -> tuple[TextTokenizer, list[str]]:
    """Save the tokenizer into a folder; return it as loaded from there, and the tokens that were added.

    Raises:
        DataError: there is no such tokenizer, it has no fast form, ends no text, or the folder cannot be written.
        ConfigError: it comes with code of its own.
    """
    from transformers import AutoTokenizer

    if Path(source).is_dir():
        refuse_custom_code(Path(source))
    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the library and its parsers raise whatever they like on files of another content
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in reason:  # transformers' own words, for a name on the hub
            raise custom_code(source, "transformers has no class for it") from error
        raise DataError(
            f"tokenizer {source} cannot be loaded: {reason}",
            "a tokenizer's name on the hub, or a folder that transformers can load",
            "check the name or the folder, and the network",
        ) from error
    if not getattr(found, "is_fast", False):
        raise DataError(
            f"tokenizer {source} ({type(found).__name__}) has no fast form",
            "one that `tokenizers` can run",
            "train one with `palimpsest tokenizer SOURCE...`",
        )
    if named := found.init_kwargs.get("auto_map"):
        raise custom_code(source, f"tokenizer_config.json names it in auto_map: {named}")
    taken = _as_in_file(source, found)
    before = set(taken.get_vocab())
    _add(taken, purpose)
    with written_whole(folder, replaced=(SENTENCEPIECE_FILE,)) as inner:
        taken.save_pretrained(inner)
        make_portable(inner)
    return load_tokenizer(folder), sorted(set(taken.get_vocab()) - before)


def _as_in_file(source: str, found: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the splitting of the source's own file, where it has one, and with `found`'s names."""
    from tokenizers import Tokenizer
    from transformers.utils.hub import cached_file

    # None where the source has none; the class that transformers chose may have rebuilt it by rules of its own
    path = cached_file(source, MODEL_FILE, _raise_exceptions_for_missing_entries=False)
    if path is None:
        model = Tokenizer.from_str(found.backend_tokenizer.to_str())
    else:
        model = build(json.loads(Path(path).read_text(encoding="utf-8")), Path(path))
    names = {role: str(token) for role in NAMED_TOKENS if (token := getattr(found, role, None)) is not None}
    if "eos_token" in names and not {names["eos_token"], names.get("sep_token")} & model.get_vocab().keys():
        model.add_special_tokens([names["eos_token"]])  # documents need an end
    settings = {key: getattr(found, key, None) for key in KEPT_SETTINGS}
    return wrap(model, names, set(map(str, found.all_special_tokens)) - set(names.values()), settings)


def _add(tokenizer, purpose: Purpose) -> None:
    """Give the tokenizer what the objective needs and it lacks."""
    if purpose == "masked":
        missing = {role: token for role, token in _ROLES.items() if getattr(tokenizer, role) is None}
        if missing:
            tokenizer.add_special_tokens(missing)
        return
    lacking = [token for token in PURPOSE_TOKENS[purpose] if token not in tokenizer.get_vocab()]
    if lacking:
        tokenizer.add_tokens(lacking, special_tokens=True)
