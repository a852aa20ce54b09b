"""Heads that a model calls in a way of its own: their logits are computed as the model does it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_cli.data.encode import Example
from qlora_cli.tasks.causal_lm import collate
from qlora_cli.tasks.table import mean_loss
from tests.kernels.test_output_layer import CPU, base_of, gradients
from tests.kernels.tiny_models import tiny


@pytest.mark.parametrize("call", ["reshaped", "by keyword", "last token alone"])
def test_a_model_that_calls_its_head_in_its_own_way_computes_its_logits(call):
    model = tiny("llama")

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            kwargs.pop("use_cache")
            hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
            if call == "by keyword":
                logits = self.lm_head(input=hidden)
            elif call == "reshaped":
                logits = self.lm_head(hidden).view(*input_ids.shape, -1)
            else:
                logits = torch.cat([hidden[:, :-1] @ self.lm_head.weight.T, self.lm_head(hidden[:, -1:])], dim=1)
            return SimpleNamespace(logits=logits)

    model.__class__ = Other
    base = base_of(model)
    assert base.tail is None
    batch = collate([Example(ids, ids, "a row") for ids in ([5, 6, 7, 8, 9], [9, 8, 7])], CPU)
    if call != "last token alone":  # which only logits of all tokens could serve
        found = gradients(mean_loss(base, model, batch, 11), model)
        plain = F.cross_entropy(
            model(batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.predicting], batch.targets
        )
        assert found[0].item() == pytest.approx(plain.item() * 6 / 11, rel=1e-5)


def test_a_head_that_is_watched_or_odd_has_no_tail():
    """Hooks would run twice; a head without out_features has logits of a width that nobody knows."""
    model = tiny("llama")
    handle = model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    assert base_of(model).tail is None
    handle.remove()
    assert base_of(model).tail is not None
    model.lm_head = nn.Sequential(model.lm_head)
    assert base_of(model).tail is None
    granite = tiny("llama")
    granite.config.logits_scaling = 0
    assert base_of(granite).tail is None
