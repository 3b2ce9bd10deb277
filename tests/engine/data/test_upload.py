"""Tensors arrive as they were sent, whatever their types and shapes; waits are asserted by the played GPU."""

import torch

from engine.data.upload import NUM_BLOCKS, Uploader
from tests.engine.data.played_gpu import GPU, PlayedGpu, address


def made_up_step(generator: torch.Generator, rows: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 99, (rows, 9), generator=generator)
    return [
        {
            "tokens": tokens[:, :-1],  # not of one piece, as targets and stretches are
            "keys": torch.arange(rows),
            "weights": torch.rand(rows, 7, generator=generator),
            "segments": tokens.int(),
            "flags": torch.rand(rows, 3, generator=generator) < 0.5,
            "nothing": torch.zeros(rows, 0),
        }
        for _ in range(2)
    ]


def test_steps_of_any_shape_arrive_as_they_were_sent(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    steps = [made_up_step(generator, rows) for rows in (1, 4, 40, 2, 3, 64, 1)]
    gpu = PlayedGpu(monkeypatch)
    uploader = Uploader(GPU)
    arrived = []
    for step in steps:
        arrived.append(uploader.send(step).arrive())
        for inputs in arrived[-1]:
            gpu.use(inputs)
    for given, sent in zip(arrived, steps, strict=True):
        for inputs, batch in zip(given, sent, strict=True):
            assert {name: (each.dtype, each.shape) for name, each in inputs.items()} == {
                name: (each.dtype, each.shape) for name, each in batch.items()
            }
            assert all(inputs[name].equal(tensor) for name, tensor in batch.items())


def test_page_locked_memory_grows_and_is_not_made_anew(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    gpu = PlayedGpu(monkeypatch)
    uploader = Uploader(GPU)
    for rows in (8, 8, 3, 8, 1, 7, 8, 8):
        uploader.send(made_up_step(generator, rows)).arrive()
    assert len(gpu.copied_from) == NUM_BLOCKS
    for _ in range(2 * NUM_BLOCKS):
        uploader.send(made_up_step(generator, 9)).arrive()
    assert len(gpu.copied_from) == 2 * NUM_BLOCKS


def test_tensors_begin_where_the_gpu_s_own_would(monkeypatch):
    PlayedGpu(monkeypatch)
    inputs = Uploader(GPU).send(made_up_step(torch.Generator(), 3)).arrive()
    offsets = [tensor.data_ptr() - address(tensor) for batch in inputs for tensor in batch.values() if tensor.numel()]
    assert all(offset % 256 == 0 for offset in offsets)
    assert len(set(offsets)) == 10
