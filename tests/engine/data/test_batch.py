"""What a GPU copies from."""

import torch

from engine.data.loader import Loader
from tests.engine.data.corpus import made_up_documents, write_shards


def test_inputs_for_a_gpu_are_page_locked_copies_of_one_piece(tmp_path, monkeypatch):
    """A stand-in for page-locked memory, which only a driver gives; targets are a view of the tokens' rows before."""
    dataset = write_shards(tmp_path, made_up_documents(60), shard_tokens=2000)
    [batch] = Loader(dataset, 16, 4, 0, 4, "document").step(0, 1, 4)
    assert not batch.inputs["targets_BT"].is_contiguous()
    locked, plain_empty = [], torch.empty

    def empty(*arguments, pin_memory=False, **options):
        made = plain_empty(*arguments, **options)
        locked.extend([made.data_ptr()] if pin_memory else [])
        return made

    monkeypatch.setattr(torch, "empty", empty)
    pinned = batch.pinned()
    assert [tensor.data_ptr() for tensor in pinned.inputs.values()] == locked
    for name, tensor in batch.inputs.items():
        assert pinned.inputs[name].is_contiguous()
        assert pinned.inputs[name].equal(tensor)
    assert pinned.documents is batch.documents
