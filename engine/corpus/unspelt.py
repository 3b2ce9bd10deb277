"""Text that the tokenizer cannot spell, and a model would never see: its share by domain, and the refusal of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from engine.corpus.assemble import EncodedFile
from engine.corpus.statistics import Statistics
from engine.data.tokenizer.folder import TextTokenizer
from engine.errors import DataError


@dataclass
class Unspelt:
    """Bytes of a domain's text, and those of them that no token spells."""

    total: int = 0
    lost: int = 0


def unspelt_in(parts: list[EncodedFile]) -> dict[str, Unspelt]:
    """Count the text of each domain, including duplicates and validation documents."""
    found: dict[str, Unspelt] = defaultdict(Unspelt)
    for part in parts:
        without_token = int(part.documents.empty_unspelt)
        found[part.domain].total += int(part.documents.text_bytes.sum()) + without_token
        found[part.domain].lost += int(part.documents.unspelt.sum()) + without_token
    return found


def unspelt_before(report: dict[str, Statistics]) -> dict[str, Unspelt]:
    """Return the counts of each domain from the report of an earlier preparation, by folder (`train/DOMAIN`)."""
    found: dict[str, Unspelt] = defaultdict(Unspelt)
    for name, part in report.items():
        domain = name.partition("/")[2]
        found[domain].total += part.text_bytes + part.left_out_bytes
        found[domain].lost += part.unspelt_bytes
    return found


def refuse_unspelt(domains: dict[str, Unspelt], limit: float, tokenizer: TextTokenizer) -> None:
    """Raise `DataError` where the tokenizer cannot spell more than the share `limit` of a domain's text."""
    for domain, found in domains.items():
        if found.lost > limit * found.total:
            raise DataError(
                f"the tokenizer in {tokenizer.folder} cannot spell {found.lost / found.total:.2%} of the text"
                f"{f' of {domain}' if domain else ''} ({found.lost:,} of {found.total:,} bytes): "
                f"{tokenizer.unknown_becomes}",
                f"at most {limit:.2%} (--max-unspelt)",
                "take a tokenizer that spells every byte (`palimpsest tokenizer --kind bpe`, or a sentencepiece one), "
                "or raise --max-unspelt: the same command goes on where this one stopped",
            )
