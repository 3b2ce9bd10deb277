"""Parts of a row against the whole of it: put together again they are what the whole was."""

from __future__ import annotations

import torch

from engine.parallel.groups import Group
from engine.train.sequence_slices import SHARED, own_part
from tests.distributed.batches import DECODER_LENGTH, LENGTH, global_batch


def parts(model: str, size: int) -> list[dict[str, torch.Tensor]]:
    batch = global_batch(0, "document", model)
    ranks = tuple(range(size))
    return [own_part(batch, LENGTH, size, Group(ranks, position)) for position in ranks]


def test_stretches_of_tokens_and_targets_are_the_row_and_document_numbers_stay_whole() -> None:
    batch, made = global_batch(0, "document", "llama"), parts("llama", 4)
    for name in ("tokens_BT", "targets_BT", "weights_BT"):
        assert torch.equal(torch.cat([part[name] for part in made], dim=1), batch[name])
    assert all(torch.equal(part["segments_BT"], batch["segments_BT"]) for part in made)


def test_every_masked_token_is_in_one_stretch_with_its_target_and_weight() -> None:
    batch, made = global_batch(0, "document", "bert"), parts("bert", 3)

    def masked(part: dict[str, torch.Tensor], first: int = 0) -> set[tuple[int, int, int, float]]:
        found = zip(*(part[name].tolist() for name in ("masked_BM", "targets_BM", "weights_BM")), strict=True)
        return {
            (row, first + place, target, weight)
            for row, columns in enumerate(found)
            for place, target, weight in zip(*columns, strict=True)
            if weight
        }

    stretches = [masked(part, first=4 * number) for number, part in enumerate(made)]
    assert set.union(*stretches) == masked(batch)
    assert sum(map(len, stretches)) == len(masked(batch)) > 8
    for part in made:
        assert part["masked_BM"].shape == part["weights_BM"].shape == part["targets_BM"].shape
        assert int(part["masked_BM"].max()) < 4
        assert part["masked_BM"].size(1) == max(int((part["weights_BM"] > 0).sum(1).max()), 1), "no column too many"


def test_a_stretch_without_masked_tokens_has_one_of_weight_0() -> None:
    given = {"masked_BM": torch.tensor([[7, 0]]), "targets_BM": torch.tensor([[5, 6]])}
    part = own_part(given | {"weights_BM": torch.tensor([[1.0, 0.0]])}, 8, 2, Group((0, 1), 0))
    assert part["masked_BM"].tolist() == [[0]]
    assert part["weights_BM"].tolist() == [[0.0]]


def test_pairs_count_on_the_rank_that_has_their_first_token() -> None:
    batch, made = global_batch(0, "document", "bert"), parts("bert", 2)
    assert torch.equal(made[0]["pair_weights_B"], batch["pair_weights_B"])
    assert made[1]["pair_weights_B"].tolist() == [0.0] * 8
    assert all(torch.equal(part["pair_targets_B"], batch["pair_targets_B"]) for part in made)


def test_a_decoder_s_rows_are_filled_with_what_weighs_nothing() -> None:
    """9 tokens for 2 ranks: 10, of the last document; one tensor group as a whole fills them, too."""
    batch, made = global_batch(0, "document", "t5"), parts("t5", 2)
    for name in ("decoder_tokens_BT", "targets_BT", "weights_BT"):
        whole = torch.cat([part[name] for part in made], dim=1)
        assert torch.equal(whole[:, :DECODER_LENGTH], batch[name])
        assert whole[:, DECODER_LENGTH:].tolist() == [[0]] * 8
    segments_BT = made[0]["decoder_segments_BT"]
    assert torch.equal(segments_BT[:, DECODER_LENGTH:], batch["decoder_segments_BT"][:, -1:])
    assert torch.equal(torch.cat([part["tokens_BS"] for part in made], dim=1), batch["tokens_BS"])
    (alone,) = (own_part(batch, LENGTH, 2, Group((0,), 0)),)
    assert alone["decoder_tokens_BT"].shape == alone["weights_BT"].shape == (8, 10)


def test_what_nobody_shares_stays_as_it_is() -> None:
    for model in ("llama", "bert", "t5"):
        batch = global_batch(0, "row", model)
        given = own_part(batch, LENGTH, 1, Group((0,), 0))
        assert all(given[name] is tensor for name, tensor in batch.items())
        assert set(batch) & set(SHARED)


def test_labels_of_rows_count_on_the_first_rank() -> None:
    labels = {"labels_B": torch.tensor([3, 1]), "label_weights_B": torch.tensor([1.0, 2.0])}
    made = [own_part(labels | {"last_B": torch.tensor([6, 3])}, 8, 2, Group((0, 1), position)) for position in range(2)]
    assert [part["label_weights_B"].tolist() for part in made] == [[1.0, 2.0], [0.0, 0.0]]
    assert all(part["last_B"].tolist() == [6, 3] for part in made)


def test_labels_of_tokens_are_cut_and_spans_stay_whole() -> None:
    given = {"labels_BT": torch.arange(8)[None], "label_weights_BT": torch.ones(1, 8)}
    made = [own_part(given, 8, 2, Group((0, 1), position)) for position in range(2)]
    assert [part["labels_BT"].tolist() for part in made] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    spans = {"label_spans_B2": torch.tensor([[5, 6]]), "label_weights_B": torch.ones(1), "last_B": torch.tensor([7])}
    made = [own_part(spans, 8, 2, Group((0, 1), position)) for position in range(2)]
    assert all(part["label_spans_B2"].tolist() == [[5, 6]] and part["last_B"].tolist() == [7] for part in made)
    assert [part["label_weights_B"].tolist() for part in made] == [[1.0], [0.0]]
