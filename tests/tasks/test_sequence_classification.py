"""Batches of texts: padding by the config, token types where the model has them, classes or numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlora_cli.errors import UserError
from qlora_cli.tasks.sequence_classification import collate, outputs
from tests.tasks.tiny_heads import END, MAKES, base_of, examples

TASK = "sequence_classification"


@pytest.mark.parametrize("make", MAKES)
def test_the_padding_is_the_configs_and_masked(make: str):
    base = base_of(make, TASK)
    batch = collate(examples(TASK, [9, 4]), base)
    assert batch.input_ids[1, 4:].unique().tolist() == [base.model.config.pad_token_id]
    assert batch.attention_mask.tolist() == [[1] * 9, [1] * 4 + [0] * 5]


@pytest.mark.parametrize("make", MAKES)
def test_token_types_are_where_the_model_and_the_tokenizer_have_them(make: str):
    single = replace(examples(TASK, [6])[0], segment=0)
    batch = collate([*examples(TASK, [9, 4]), single], base_of(make, TASK))
    if make not in ("bert", "deberta"):
        assert batch.token_type_ids is None
    else:
        types = [[0] * 4 + [1] * 5, [0, 0, 1, 1] + [0] * 5, [0] * 9]
        assert batch.token_type_ids is not None
        assert batch.token_type_ids.tolist() == types


def test_targets_are_classes_or_numbers():
    rows = examples(TASK, [5, 5, 5])
    classes = collate(rows, base_of("bert", TASK)).targets
    assert (classes.dtype, classes.tolist()) == (torch.int64, [0, 1, 2])
    numbers = collate(examples(TASK, [5, 5], 1), base_of("bert", TASK, 1)).targets
    assert numbers.dtype == torch.float32
    torch.testing.assert_close(numbers, torch.tensor([0, 1 / 3]))


@pytest.mark.parametrize("make", MAKES)
def test_a_rows_logits_do_not_depend_on_its_neighbours(make: str):
    base = base_of(make, TASK)
    rows = examples(TASK, [9, 4, 14])
    together, _ = outputs(base.model, collate(rows, base))
    alone = torch.cat([outputs(base.model, collate([row], base))[0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", ["bart", "t5"])
def test_an_encoder_decoder_without_ends_or_with_uneven_ones_is_refused(make: str):
    base, rows = base_of(make, TASK), examples(TASK, [5, 6])
    more = replace(rows[1], input_ids=[*rows[1].input_ids, END], labels=[*rows[1].labels, -100])
    with pytest.raises(
        UserError, match=r"a:1: 2 end tokens in this row, where a:0 has 1\. Give all rows a second text"
    ):
        collate([rows[0], more], base)
    none = replace(rows[0], input_ids=[7] * 5)
    with pytest.raises(UserError, match="a:0: 0 end tokens in this row"):
        collate([none], base)
