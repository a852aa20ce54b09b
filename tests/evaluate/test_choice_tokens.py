"""Contexts and choices are split into the tokens that lm-evaluation-harness splits them into."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from qlora_cli.errors import UserError
from qlora_cli.evaluate.choice_rows import ChoiceRow
from qlora_cli.evaluate.choice_tokens import encode_rows
from tests.kernels.tiny_models import tiny
from tests.tiny import tiny_tokenizer

HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
TEXTS = st.text(st.sampled_from("ab <s>|\n\tÜ"), max_size=8)


def merging(kind: str) -> Any:
    """A tokenizer that joins pairs of bytes across the end of a context; `bos`: with one in front of every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "b"), ("Ġ", "Ġ"), ("ab", "b")]
    pieces = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "bos":
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"bytes": tiny_tokenizer(), "merging": merging("plain"), "bos": merging("bos")}


@pytest.fixture(scope="module", params=TOKENIZERS)
def harness(request: pytest.FixtureRequest) -> Any:
    return HFLM(pretrained=tiny("llama", vocab_size=400), tokenizer=TOKENIZERS[request.param], batch_size=1)


@settings(max_examples=150, deadline=None)
@given(context=TEXTS, choice=TEXTS)
def test_every_pair_is_split_as_the_harness_splits_it(harness: Any, context: str, choice: str) -> None:
    from lm_eval.api.instance import Instance

    assume((context + choice).strip() != "<s>")  # the start token and nothing behind it: ours is an error
    seen: list[Any] = []
    harness._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    try:
        harness.loglikelihood([Instance("loglikelihood", {}, (context, choice), 0)], disable_tqdm=True)
        _, wanted, targets = seen[0]
    except IndexError:  # an empty choice behind an empty context
        wanted, targets = [], []
    if not targets:  # the harness stops here
        targets = harness.tokenizer(context[len(context.rstrip()) :] + choice, add_special_tokens=False)["input_ids"]
    if (
        not wanted or not context.strip()
    ):  # white space alone as the context: it belongs to the choice, and is read once
        wanted = [harness.prefix_token_id]
    row = ChoiceRow("rows.jsonl:1", context, (choice,), None)
    if not targets:
        with pytest.raises(UserError, match=r"rows.jsonl:1: the choice '' has no tokens behind its context"):
            list(encode_rows(harness.tokenizer, [row], None))
        return
    ((found,),) = encode_rows(harness.tokenizer, [row], None)
    assert found.ids.tolist() == [*wanted, *targets]
    assert found.num_tokens == len(targets)


def test_a_choice_that_a_token_of_the_context_swallows_is_encoded_for_itself() -> None:
    row = ChoiceRow("rows.jsonl:1", "a", ("b", "bb", "ba"), 0)
    tokenizer = merging("plain")
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    (found,) = encode_rows(tokenizer, [row], None)
    assert [each.ids.tolist() for each in found] == [[a, b], [a, b, b], [a, a]]


@pytest.mark.parametrize("longest", [3, 9, 10, 30])
def test_what_is_too_long_is_cut_in_front(longest: int) -> None:
    row = ChoiceRow("rows.jsonl:1", "abcdefg", ("xyz", "x"), 0)
    ((long, short),) = encode_rows(tiny_tokenizer(), [row], longest)
    whole = tiny_tokenizer()("abcdefgxyz")["input_ids"]
    assert long.ids.tolist() == whole[-(longest + 1) :]
    assert long.num_cut == max(0, 10 - (longest + 1))
    assert short.num_cut == max(0, 8 - (longest + 1))
    assert (long.num_tokens, short.num_tokens) == (3, 1)


def test_many_rows_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_cli.evaluate.choice_tokens.ROWS_AT_ONCE", 3)
    rows = [ChoiceRow(f"rows.jsonl:{n}", "c" * (n % 4), ("x" * (n + 1), "y"), 0) for n in range(10)]
    found = list(encode_rows(tiny_tokenizer(), rows, None))
    assert [each[0].num_tokens for each in found] == list(range(1, 11))
    assert [len(each[1].ids) for each in found] == [max(1, n % 4) + 1 for n in range(10)]
