"""The models and adapters of this folder's tests, made once."""

from __future__ import annotations

import pytest
import torch
from merge_models import ADAPTERS, gpt2, llama, save_adapter


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Bases and adapters by name, made once."""
    root = tmp_path_factory.mktemp("merge")
    llama().save_pretrained(root / "llama")
    llama().save_pretrained(root / "sharded", max_shard_size="120KB")
    llama().to(torch.bfloat16).save_pretrained(root / "bf16")
    llama(tie_word_embeddings=True).save_pretrained(root / "tied")
    llama(hidden_size=48, intermediate_size=80).save_pretrained(root / "awkward")
    gpt2().save_pretrained(root / "gpt2")
    for name, settings in ADAPTERS.items():
        save_adapter(root / "llama", root / f"adapter-{name}", **settings)
    save_adapter(root / "awkward", root / "adapter-awkward")
    for name, settings in {"default": {}, "dora": {"use_dora": True}}.items():
        save_adapter(root / "gpt2", root / f"adapter-gpt2-{name}", ["c_attn", "c_fc", "c_proj"], **settings)
    return root
