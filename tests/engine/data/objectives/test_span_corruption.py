"""What encoder and decoder are given holds the text exactly, and no document is told of another."""

import numpy as np
import pytest

from engine.config.objectives import noise, span_lengths
from engine.data.objectives.span_corruption import corrupt

LENGTHS = span_lengths(40, 0.3, 3.0)
SENTINELS, EOS, PADDING = tuple(range(999, 899, -1)), 1, 0


def corrupted(totals, documents=None, seed=0):
    generator = np.random.default_rng(seed)
    rows = len(totals)
    tokens = np.where(np.arange(LENGTHS.read) < np.array(totals)[:, None], 0, PADDING)
    tokens = tokens + generator.integers(10, 800, tokens.shape)
    keys = generator.integers(0, 2**32, tokens.shape).astype(np.uint32)
    documents = np.zeros(tokens.shape, np.int32) if documents is None else documents
    made = corrupt(tokens, np.array(totals), documents, keys, 0.3, 3.0, LENGTHS, SENTINELS, EOS, PADDING)
    assert made.tokens_BS.shape == (rows, LENGTHS.encoder)
    assert made.targets_BT.shape == made.decoder_tokens_BT.shape == (rows, LENGTHS.decoder)
    return tokens, made


def merged(seen, targets):
    """The text that a reader puts together again: each sentinel replaced by what follows it among the targets."""
    spans, current = {}, None
    for token in targets:
        if token in SENTINELS:
            spans[current := token] = []
        elif current is not None:
            spans[current].append(token)
    return [token for item in seen for token in spans.get(item, [item])]


def test_full_rows_hold_the_text_and_fill_encoder_and_decoder():
    tokens, made = corrupted([LENGTHS.read] * 50)
    count, spans = noise(LENGTHS.read, 0.3, 3.0)
    for b in range(50):
        seen, targets = made.tokens_BS[b].tolist(), made.targets_BT[b].tolist()
        assert (seen[-1], targets[-1]) == (EOS, EOS)
        assert merged(seen[:-1], targets[:-1]) == tokens[b].tolist()
        assert [token for token in seen if token in SENTINELS] == list(SENTINELS[:spans])
        assert [token for token in targets if token in SENTINELS] == list(SENTINELS[:spans])
        assert sum(10 <= token < 800 for token in targets) == count
        assert made.decoder_tokens_BT[b].tolist() == [PADDING, *targets[:-1]]
    assert (made.weights_BT == 1).all()
    assert not made.segments_BS.any()
    assert not made.decoder_segments_BT.any()


@pytest.mark.parametrize("total", [2, 3, 17, LENGTHS.read - 1])
def test_short_rows_end_in_padding_that_is_no_target(total):
    tokens, made = corrupted([total, 0])
    count, spans = noise(total, 0.3, 3.0)
    kept, told = total - count + spans, count + spans
    assert merged(made.tokens_BS[0, :kept].tolist(), made.targets_BT[0, :told].tolist()) == tokens[0, :total].tolist()
    assert made.tokens_BS[0, kept] == made.targets_BT[0, told] == EOS
    assert (made.tokens_BS[0, kept + 1 :] == PADDING).all()
    assert made.weights_BT[0].tolist() == [1.0] * (told + 1) + [0.0] * (LENGTHS.decoder - told - 1)
    # padding of the encoder is seen by nobody; the decoder's sees something, or its softmax would be 0 / 0
    assert made.segments_BS[0].tolist() == [0] * (kept + 1) + [1] * (LENGTHS.encoder - kept - 1)
    assert not made.decoder_segments_BT[0].any()
    assert not made.weights_BT[1].any()
    assert (made.tokens_BS[1] == PADDING).all()


def test_documents_are_corrupted_as_if_alone():
    rows = 200
    cuts = np.sort(np.random.default_rng(1).integers(1, LENGTHS.read, (rows, 3)), axis=1)
    documents = (np.arange(LENGTHS.read) >= cuts[:, :, None]).sum(axis=1)
    documents -= documents[:, :1]
    documents = np.array([np.unique(row, return_inverse=True)[1] for row in documents], np.int32)
    tokens, made = corrupted([LENGTHS.read] * rows, documents)
    crossed = 0
    for b in range(rows):
        for document in range(documents[b].max() + 1):
            seen = made.tokens_BS[b, made.segments_BS[b] == document].tolist()
            mine = made.decoder_segments_BT[b] == document
            targets = made.targets_BT[b, mine].tolist()
            counted = made.targets_BT[b, mine & (made.weights_BT[b] > 0)].tolist()
            crossed += len(targets) - len(counted)
            if document == documents[b].max():
                assert seen.pop() == EOS
                assert (targets.pop(), counted.pop()) == (EOS, EOS)
            text = tokens[b, documents[b] == document].tolist()
            # what a span took away at the document's begin belongs to the document before
            assert merged(seen, counted) == text[len(text) - len(merged(seen, counted)) :]
            sentinels = [token for token in seen if token in SENTINELS]
            assert sentinels == list(SENTINELS[: len(sentinels)]) == [t for t in counted if t in SENTINELS]
            inputs = made.decoder_tokens_BT[b, mine].tolist()
            assert inputs == ([PADDING, *made.targets_BT[b, mine].tolist()[:-1]] if inputs else [])
    assert crossed > 0
