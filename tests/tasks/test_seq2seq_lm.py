"""Batches of sources and targets: what the decoder reads is transformers' own shift of the labels."""

from __future__ import annotations

import pytest
import torch
from transformers.models.bart.modeling_bart import shift_tokens_right

from qlora_cli.data.encode import IGNORE_INDEX
from qlora_cli.tasks.seq2seq_lm import collate, outputs
from tests.tasks.tiny_heads import base_of, examples


@pytest.mark.parametrize("make", ["bart", "t5"])
def test_the_decoder_reads_the_targets_one_place_to_the_right(make: str):
    base = base_of(make, "seq2seq_lm")
    rows = examples("seq2seq_lm", [9, 4, 14])
    batch = collate(rows, base)
    config = base.model.config
    shifted = shift_tokens_right(batch.labels, config.pad_token_id, config.decoder_start_token_id)
    trained = batch.labels != IGNORE_INDEX  # behind these transformers leaves the end, and ours is padding
    assert batch.decoder_input_ids[trained].equal(shifted[trained])
    assert batch.decoder_input_ids[~trained].unique().tolist() == [config.pad_token_id]
    for at, row in enumerate(rows):
        length = row.num_prompt
        assert batch.input_ids[at].tolist() == row.input_ids[:length] + [config.pad_token_id] * (14 - length)
        assert batch.attention_mask[at].tolist() == [1] * length + [0] * (14 - length)
        target = row.input_ids[length:]
        assert batch.labels[at].tolist() == target + [IGNORE_INDEX] * (batch.labels.shape[1] - len(target))


def test_the_logits_are_of_the_target_tokens_alone_in_their_order():
    base = base_of("bart", "seq2seq_lm")
    rows = examples("seq2seq_lm", [9, 4])
    logits, targets = outputs(base.model, collate(rows, base))
    assert targets.tolist() == [token for row in rows for token in row.input_ids[row.num_prompt :]]
    assert logits.shape == (len(targets), base.model.config.vocab_size)
    alone, _ = outputs(base.model, collate(rows[1:], base))
    torch.testing.assert_close(logits[rows[0].num_trained :], alone, rtol=1e-5, atol=1e-5)
