"""Attention inside documents by other kernels is attention under the documents' mask; which one a device gets."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch.nn import functional as F

from engine.config.schema.model import GPTConfig, make_model
from engine.models.attention import document_mask, local_mask, view
from engine.models.gpt import build
from engine.parallel import packed
from engine.parallel.functions import Band, attention
from engine.parallel.packed import Documents, flex, kernel, packed_attention, varlen

SEGMENTS_BT = torch.tensor([[0] * 5 + [1] * 9 + [2] * 2, [0] * 16, list(range(16)), [0] * 15 + [1]], dtype=torch.int32)
TOLERANCE = 1e-5
"""fp32: sums of 16 products of about 1 in another order, 2**-24 each, through a softmax."""


def drawn(num_heads: int, num_kv: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_BTHK, k_BTGK, v_BTGK."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 16, heads, 16, generator=generator) for heads in (num_heads, num_kv, num_kv))
    return q, k, v


def one_by_one(
    q_NHK,
    k_NGK,
    v_NGK,
    bounds,
    same_bounds,
    longest,
    same_longest,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """What torch documents of `varlen_attn`, document by document: a CPU has no kernel for it."""
    assert bounds is same_bounds
    assert longest == same_longest >= int(bounds.diff().max())
    parts = []
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_NHK, k_NGK, v_NGK))
        before, behind = (length if side < 0 else side for side in window_size for length in (end - start,))
        distances_TT = torch.arange(end - start)[:, None] - torch.arange(end - start)  # of a query behind a key
        mask = (distances_TT <= before) & (distances_TT >= -behind)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_flex_is_attention_under_the_mask(bidirectional, num_heads, num_kv, scale):
    qkv, documents = drawn(num_heads, num_kv), Documents(SEGMENTS_BT, bidirectional)
    expected = attention(*qkv, document_mask(SEGMENTS_BT, bidirectional), scale)
    torch.testing.assert_close(flex(*qkv, documents, scale), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("reach", [1, 3, 40])
def test_both_kernels_take_a_window(bidirectional, reach, monkeypatch):
    monkeypatch.setattr(packed, "_varlen_attn", lambda: one_by_one)
    qkv, documents = drawn(4, 2), Documents(SEGMENTS_BT, bidirectional, reach)
    expected = attention(*qkv, local_mask(SEGMENTS_BT, reach, bidirectional, in_blocks=False))
    for kernel_of in (flex, varlen):
        torch.testing.assert_close(kernel_of(*qkv, documents, None), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv"), [(2, 2), (4, 2)])
def test_varlen_is_handed_the_documents_one_behind_the_other(bidirectional, num_heads, num_kv, monkeypatch):
    monkeypatch.setattr(packed, "_varlen_attn", lambda: one_by_one)
    qkv = drawn(num_heads, num_kv)
    for x in qkv:
        x.requires_grad_()
    expected = attention(*qkv, document_mask(SEGMENTS_BT, bidirectional), 0.3)
    found = varlen(*qkv, Documents(SEGMENTS_BT, bidirectional), 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    for one, other in zip(*(torch.autograd.grad((x * weights).sum(), qkv) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4 * TOLERANCE)  # sums of some such


def test_bounds_are_where_documents_begin_in_all_rows():
    bounds = Documents(SEGMENTS_BT, False).bounds
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 5, 14, 16, *range(32, 48), 48, 63, 64]


class Gpu:
    """A CPU that says it is a GPU of this capability."""

    def __init__(self, monkeypatch, capability=(9, 0), varlen_is_there=True) -> None:
        kernel.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(packed, "_varlen_attn", lambda: one_by_one if varlen_is_there else None)


@pytest.mark.parametrize(
    ("dtype", "head_size", "capability", "varlen_is_there", "expected"),
    [
        (torch.bfloat16, 64, (9, 0), True, "varlen"),
        (torch.float16, 80, (8, 0), True, "varlen"),
        (torch.bfloat16, 64, (9, 0), False, "flex"),
        (torch.bfloat16, 80, (9, 0), False, "mask"),
        (torch.bfloat16, 512, (9, 0), True, "flex"),
        (torch.bfloat16, 100, (9, 0), True, "mask"),
        (torch.bfloat16, 64, (7, 5), True, "mask"),
        (torch.float32, 64, (9, 0), True, "mask"),
    ],
)
def test_the_kernel_of_a_gpu(dtype, head_size, capability, varlen_is_there, expected, monkeypatch, caplog):
    Gpu(monkeypatch, capability, varlen_is_there)
    monkeypatch.setattr(logging.getLogger("palimpsest"), "propagate", True)
    with caplog.at_level(logging.INFO, "palimpsest"):
        for _ in range(3):
            assert kernel(torch.device("cuda", 0), dtype, head_size) == expected
    assert [record.getMessage().split(": ")[1].split(" ")[0] for record in caplog.records] == [expected]
    assert kernel(torch.device("cpu"), dtype, head_size) == "mask"
    kernel.cache_clear()


def test_a_model_of_packed_rows_asks_for_no_mask_where_a_kernel_is_there(monkeypatch):
    """The whole way from segments to losses and gradients; the kernel is the stand-in."""
    config = GPTConfig(vocab_size=50, num_layers=2, hidden_size=32, num_heads=2, max_positions=16)
    model = build(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    inputs = {
        "tokens_BT": torch.randint(0, 50, (4, 16), generator=generator),
        "targets_BT": torch.randint(0, 50, (4, 16), generator=generator),
        "weights_BT": torch.ones(4, 16),
        "segments_BT": SEGMENTS_BT,
    }

    def run() -> list[torch.Tensor]:
        losses_L = model(**inputs)["losses_L"]
        return [losses_L.detach(), *torch.autograd.grad(losses_L.sum(), list(model.parameters()))]

    expected = run()
    monkeypatch.setattr("engine.models.attention.kernel", lambda *arguments: "varlen")
    monkeypatch.setattr(packed, "kernel", lambda *arguments: "varlen")
    called = []
    monkeypatch.setattr(packed, "_varlen_attn", lambda: lambda *a, **k: (called.append(1), one_by_one(*a, **k))[1])
    assert isinstance(view(config, torch.empty(4, 16, 32), SEGMENTS_BT).mask_B1TT, Documents)
    for found, other in zip(run(), expected, strict=True):
        # a loss of 64 tokens near 4, gradients below 10: 2**-24 of their sums over some hundred terms
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-4)
    assert len(called) == 2


@pytest.mark.parametrize("segments_BT", [SEGMENTS_BT, None], ids=["documents", "rows"])
def test_a_sliding_window_is_the_kernels_where_one_is_there(segments_BT, monkeypatch):
    shape = {"vocab_size": 50, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 16}
    config = make_model(**shape, sliding_window=5, first_window_layer=1)
    x_BTD = torch.empty(4, 16, 32)
    on_cpu = view(config, x_BTD, segments_BT, reach=4).mask_B1TT
    assert isinstance(on_cpu, Band)
    monkeypatch.setattr("engine.models.attention.kernel", lambda *arguments: "varlen")
    monkeypatch.setattr(packed, "kernel", lambda *arguments: "varlen")
    monkeypatch.setattr(packed, "_varlen_attn", lambda: one_by_one)
    on_gpu = view(config, x_BTD, segments_BT, reach=4).mask_B1TT
    assert isinstance(on_gpu, Documents)
    assert on_gpu.window == (4, 0)
    qkv = drawn(2, 2)
    torch.testing.assert_close(attention(*qkv, on_gpu), attention(*qkv, on_cpu), rtol=0, atol=TOLERANCE)
    # a window that is as wide as the row is none
    assert view(config, x_BTD, None, reach=15).mask_B1TT is None


def test_where_dropout_works_on_probabilities_there_is_a_mask(monkeypatch):
    monkeypatch.setattr("engine.models.attention.kernel", lambda *arguments: "varlen")
    shape = {"vocab_size": 50, "num_layers": 1, "hidden_size": 32, "num_heads": 2, "max_positions": 16}
    config = make_model(**(shape | {"attention_dropout": 0.1}))
    dropped = view(config, torch.empty(4, 16, 32), SEGMENTS_BT, dropout=object())  # type: ignore[arg-type]
    assert isinstance(dropped.mask_B1TT, torch.Tensor)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_packed_attention_goes_by_the_kernel(monkeypatch):
    qkv, documents = drawn(2, 2), Documents(SEGMENTS_BT, False)
    for name, told in (("varlen", one_by_one), ("flex", None)):
        monkeypatch.setattr(packed, "kernel", lambda *arguments, name=name: name)
        monkeypatch.setattr(packed, "_varlen_attn", lambda told=told: told)
        expected = attention(*qkv, document_mask(SEGMENTS_BT))
        torch.testing.assert_close(packed_attention(*qkv, documents), expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(attention(*qkv, documents), expected, rtol=0, atol=TOLERANCE)
