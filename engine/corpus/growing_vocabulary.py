"""A `tokenizer.json` to which tokens are added behind all others, whatever the kind of its model.

Invariant: no id moves, and old merges and scores stay. BPE gets its merges behind the old ones, so that they apply
where these have ended; a Unigram piece gets a score above that of its parts together; WordPiece takes the longest piece
by itself.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from engine.corpus.pair_merging import Join, Pair, replaced
from engine.data.tokenizer.files import TokenizerFiles
from engine.data.tokenizer.plain_text import Tree, model_pieces, model_type
from engine.errors import DataError

_HIDDEN_SCORE = -1e5
"""Log probability of a special token in a Unigram model: text that quotes it is likelier spelt in letters."""
_LEAST_GAIN = 0.1
"""Log probability by which a Unigram piece is likelier than its parts, so that it is taken."""


class GrowingVocabulary:
    """The tree of a tokenizer in the making, and the id of each token as the model spells it."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Copy a tokenizer's tree. Raises `DataError` where its model cannot grow.

        Added tokens are entered in the model, too: `tokenizers` numbers those that the model lacks by the model's size,
        so that they would move when it grows.
        """
        self.tree: Tree = json.loads(json.dumps(files.tree))
        self.kind, self._model = model_type(self.tree), self.tree["model"]
        added = {token["content"]: int(token["id"]) for token in self.tree.get("added_tokens") or []}
        self.ids: dict[str, int] = model_pieces(self.tree) | added
        self._ranks: dict[Pair, int] = {}
        """Merges that were added, in their order."""
        self._last_id = max(self.ids.values())
        self._scores: dict[str, float] = {}
        if self.kind != "Unigram":
            self._model["vocab"] = dict(self.ids)
            return
        names = {number: name for name, number in self.ids.items()}
        if sorted(names) != list(range(len(names))):
            raise not_extensible(files, "its ids have gaps, which a Unigram model cannot have")
        held = dict(self._model["vocab"])
        self._scores = {names[number]: held.get(names[number], _HIDDEN_SCORE) for number in range(len(names))}
        self._model["vocab"] = [[name, score] for name, score in self._scores.items()]

    @property
    def prefix(self) -> str:
        """Beginning of a piece inside of a word."""
        return self._model.get("continuing_subword_prefix") or ""

    @property
    def suffix(self) -> str:
        """End of a piece at the end of a word."""
        return self._model.get("end_of_word_suffix") or ""

    @property
    def needs_merges(self) -> bool:
        """True if a token comes about by merges alone."""
        return self.kind == "BPE" and not self._model.get("ignore_merges")

    def joined(self, left: str, right: str) -> str:
        """Return the spelling of two neighbours as one token."""
        return left + right.removeprefix(self.prefix)

    def add(self, token: str, score: float = 0.0) -> None:
        """Add a token; `score` is for Unigram."""
        self._last_id += 1
        self.ids[token] = self._last_id
        if self.kind == "Unigram":
            self._scores[token] = score
            self._model["vocab"].append([token, score])
        else:
            self._model["vocab"][token] = self.ids[token]

    def add_join(self, join: Join, score: float) -> None:
        """Add the token of a join where it is not there yet, and the merge that makes it."""
        if join.joined not in self.ids:
            self.add(join.joined, score)
        if self.kind == "BPE":
            self._merge(join.left, join.right)

    def add_spelt(self, token: str, model: Any) -> None:
        """Add a token that no text was counted for; `model` is the old model of `tokenizers`."""
        if self.needs_merges:
            self._add_merged(token, model)
        elif self.kind == "Unigram":
            known = [self._scores.get(part.value, _HIDDEN_SCORE) for part in model.tokenize(token)]
            known = [score for score in known if score > _HIDDEN_SCORE]
            least = min(score for score in self._scores.values() if score > _HIDDEN_SCORE)
            # as likely as its rarest part: no token can be likelier, and one that is less likely would hardly be taken
            self.add(token, min(known, default=least))
        else:
            self.add(token)

    def score(self, join: Join, total: int, made: dict[str, float]) -> float:
        """Return the score of a joined token that a text of `total` tokens has; `made` are scores of joins before."""
        left, right = (made.get(part, self._scores.get(part, 0.0)) for part in (join.left, join.right))
        return max(left + right + _LEAST_GAIN, min(left, right, math.log(join.count / total)))

    def _merge(self, left: str, right: str) -> None:
        """Add a merge behind all others, in the spelling that the file has."""
        merges, self._ranks[left, right] = self._model["merges"], len(self._ranks)
        merges.append(f"{left} {right}" if merges and isinstance(merges[0], str) else [left, right])

    def _add_merged(self, token: str, model: Any) -> None:
        """Add a token to BPE with the tokens and merges that lead to it from its old parts."""
        text, parts = token.removesuffix(self.suffix), []
        # Characters that only bytes spell, or nothing, never merge: each gets a token. What stands between them is
        # split as before.
        for known, run in itertools.groupby(text, self.ids.__contains__):
            parts += [part.value for part in model.tokenize("".join(run))] if known else list(run)
        for part in parts:
            if part not in self.ids:
                self.add(part)
        while len(parts) > 1:
            # As BPE does: the earliest merge first, at each of its occurrences. Where none applies, a new one joins the
            # first two parts: r a r a -> ra ra -> rara.
            pair = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, math.inf))
            if pair not in self._ranks:
                pair = parts[0], parts[1]
                self._merge(*pair)
                if self.joined(*pair) not in self.ids:
                    self.add(self.joined(*pair))
            parts = replaced(parts, pair, self.joined(*pair))


def not_extensible(files: TokenizerFiles, why: str) -> DataError:
    """Return the error for a tokenizer that no token can be added to."""
    return DataError(
        f"the tokenizer in {files.folder} cannot be extended: {why}",
        "BPE, WordPiece or Unigram in tokenizer.json; for WordLevel a list of tokens (--tokens)",
        "train one for the new domain with `palimpsest tokenizer SOURCE...`",
    )
