"""Takes over a tokenizer of the Hugging Face ecosystem, by name or from a folder, as a folder of ours.

Invariant: text is split as before; what an objective needs besides gets ids behind all that were there.
"""

from __future__ import annotations

from pathlib import Path

from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.data.tokenizer.training import CLASSIFY, MASK, PURPOSE_TOKENS, SEPARATE, Purpose
from engine.errors import DataError
from engine.foreign import custom_code, refuse_custom_code

_ROLES = {"cls_token": CLASSIFY, "sep_token": SEPARATE, "mask_token": MASK}


def import_tokenizer(source: str, folder: Path, purpose: Purpose = "causal") -> tuple[TextTokenizer, list[str]]:
    """Saves the tokenizer into a folder; returns it as loaded from there, and the tokens that were added.

    Raises:
        DataError: there is no such tokenizer, it has no fast form, ends no text, or the folder cannot be written.
        ConfigError: it comes with code of its own.
    """
    from transformers import AutoTokenizer

    if Path(source).is_dir():
        refuse_custom_code(Path(source))
    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
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
    before = set(found.get_vocab())
    _add(found, purpose)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found.save_pretrained(folder)
    except OSError as error:
        raise DataError(
            f"cannot write the tokenizer to {folder}: {error.strerror or error}",
            "a writable folder",
            "name another one",
        ) from error
    return load_tokenizer(folder), sorted(set(found.get_vocab()) - before)


def _add(tokenizer, purpose: Purpose) -> None:
    """Gives the tokenizer what the objective needs and it lacks."""
    if purpose == "masked":
        missing = {role: token for role, token in _ROLES.items() if getattr(tokenizer, role) is None}
        if missing:
            tokenizer.add_special_tokens(missing)
        return
    lacking = [token for token in PURPOSE_TOKENS[purpose] if token not in tokenizer.get_vocab()]
    if lacking:
        tokenizer.add_tokens(lacking, special_tokens=True)
