"""Norms and gated MLPs get the fused functions where they are proven to compute them, one by one, and nowhere else."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from qlora_cli.errors import UserError
from qlora_cli.kernels import liger
from qlora_cli.model import layer_kernels
from qlora_cli.model.layer_kernels import (
    LIGER,
    OURS,
    FusedNorm,
    activation_of,
    check_kernels,
    choose,
    in_words,
    order_of,
    use_layer_kernels,
)
from qlora_cli.recipe.schema import Training
from tests.model.fused_modules import SMALL, fused, model_of, models_own

KNOWN = {
    "llama": ({"llama", "silu"}, "5 norms and 2 MLPs"),
    "qwen3": ({"llama", "silu"}, "9 norms and 2 MLPs"),
    "gemma2": ({"gemma", "gelu_tanh"}, "9 norms and 2 MLPs"),
    "gemma3_text": ({"gemma", "gelu_tanh"}, "13 norms and 2 MLPs"),
    "olmo2": ({"olmo", "silu"}, "9 norms and 2 MLPs"),
    "phi3": ({"llama"}, "5 norms"),  # its gate and up are one product
    "cohere2": ({"silu"}, "2 MLPs"),  # its norms subtract the mean
}
"""Kinds of model, which orders and activations are found in them, and in how many modules."""


def forward_backward(model: Any) -> tuple[Tensor, Tensor]:
    """The logits of a few tokens, and the embeddings' gradient."""
    tokens = torch.arange(24, device=model.device).view(2, 12)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.double().pow(2).sum(), embeddings)
    return logits.detach(), gradient.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KNOWN)
def test_a_models_logits_keep_their_bits_and_its_gradients_their_accuracy(kind, dtype):
    model = model_of(kind).to(dtype)
    use_layer_kernels(model, OURS)
    found, told = KNOWN[kind]
    assert {getattr(module, "order", "") or module.activation for module in fused(model)} == found
    assert in_words(model) == f"{told} fused (torch functions)"
    logits, ours = forward_backward(model)
    with models_own(model):
        own_logits, theirs = forward_backward(model)
    assert torch.equal(logits, own_logits)
    if dtype == torch.float32:
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    else:
        _, truth = forward_backward(model.float())
        assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm()


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and liger.is_there()), reason="needs a CUDA device and liger-kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KNOWN)
def test_on_a_gpu_liger_is_as_near_to_the_truth_as_the_models_own_code(kind, dtype):
    plain = model_of(kind).to("cuda", dtype)
    model, wide = copy.deepcopy(plain), copy.deepcopy(plain).float()
    use_layer_kernels(model, LIGER)
    found, wanted, truth = (torch.cat([one.flatten() for one in forward_backward(m)]) for m in (model, plain, wide))
    if dtype == torch.float32:
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    else:
        assert (found - truth).norm() <= 1.25 * (wanted - truth).norm()


def test_what_is_known_of_a_module_from_outside_stays():
    model, plain = model_of("llama"), model_of("llama")
    use_layer_kernels(model, OURS)
    assert [*model.state_dict()] == [*plain.state_dict()]
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(ours, type(theirs))
        assert (type(ours).__name__, type(ours).__module__) == (type(theirs).__name__, type(theirs).__module__)
    assert "forward" not in {name for module in model.modules() for name in vars(module)}
    assert not fused(model_of("llama")), "no class was patched"
    use_layer_kernels(model, OURS)
    assert all(type(module).__mro__[2].__module__.startswith("transformers.") for module in fused(model))
    assert len(fused(copy.deepcopy(model))) == 7


def test_on_meta_the_same_modules_are_found():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3", **SMALL))
    use_layer_kernels(model, OURS)
    assert in_words(model).startswith("9 norms and 2 MLPs")


def test_a_proof_draws_nothing_from_the_run():
    before = torch.get_rng_state()
    use_layer_kernels(model_of("llama"), OURS)
    assert torch.equal(torch.get_rng_state(), before)


class Scaled(LlamaRMSNorm):
    scale = 2.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * self.scale


class Meaned(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class Roots(LlamaRMSNorm):
    """Rounds elsewhere, by a division."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        root = torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide / root).to(hidden_states.dtype)


class NoEpsilon(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        self, kept = copy.copy(self), self.variance_epsilon
        self.variance_epsilon = 2 * kept
        return LlamaRMSNorm.forward(self, hidden_states)


def watched(norm: nn.Module) -> nn.Module:
    norm.forward = norm.forward  # as accelerate's hooks replace it
    return norm


@pytest.mark.parametrize(
    ("norm", "order"),
    [
        (LlamaRMSNorm(8), "llama"),
        (Olmo2RMSNorm(8), "olmo"),
        (GemmaRMSNorm(8), "gemma"),
        (T5LayerNorm(8), None),  # its casts follow the weight's type
        *((kind(8), None) for kind in (Scaled, Meaned, Roots, NoEpsilon, nn.LayerNorm)),
        (nn.RMSNorm(8, eps=1e-6), None),
        (nn.LayerNorm(8, bias=False), None),
        (nn.BatchNorm1d(8), None),
        (nn.Linear(8, 8), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_norm_is_known_by_what_it_computes(norm, order):
    assert order_of(norm) == order


class Dropped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.1, self.training))


class Multiplied(LlamaMLP):
    multiplier = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x) * self.multiplier) * self.up_proj(x))


class Turned(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Wide(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x).float())
        return self.down_proj((gate * self.up_proj(x).float()).to(x.dtype))


class Lazy(LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Dropout(0.1)


def config_of(act: str) -> Any:
    return SimpleNamespace(hidden_size=8, intermediate_size=12, mlp_bias=False, hidden_act=act)


@pytest.mark.parametrize(
    ("kind", "act", "activation"),
    [
        (LlamaMLP, "silu", "silu"),
        (LlamaMLP, "gelu_pytorch_tanh", "gelu_tanh"),
        (LlamaMLP, "gelu", "gelu"),
        (LlamaMLP, "relu2", None),
        (LlamaMLP, "gelu_new", None),
        *((kind, "silu", None) for kind in (Dropped, Multiplied, Turned, Wide, Lazy)),
    ],
)
def test_an_mlp_is_known_by_what_it_computes(kind, act, activation):
    assert activation_of(kind(config_of(act)).eval()) == activation


def test_an_mlp_whose_multiplier_is_1_is_a_plain_one():
    mlp = Multiplied(config_of("silu"))
    mlp.multiplier = 1.0
    assert activation_of(mlp) == "silu"


def test_a_module_whose_forward_was_replaced_keeps_it():
    model = nn.ModuleList([watched(LlamaRMSNorm(8)), LlamaRMSNorm(8)])
    use_layer_kernels(model, OURS)
    assert [isinstance(norm, FusedNorm) for norm in model] == [False, True]


def test_a_watched_activation_is_called():
    model = nn.ModuleList([LlamaMLP(config_of("silu"))])
    use_layer_kernels(model, OURS)
    seen: list[Any] = []
    model[0].act_fn.register_forward_hook(lambda *args: seen.append(args))
    model[0](torch.randn(2, 8))
    assert len(seen) == 1


def test_a_norm_that_is_trained_keeps_its_models_forward():
    model = nn.ModuleList([LlamaRMSNorm(8)])
    use_layer_kernels(model, OURS)
    (norm,) = model
    norm(torch.randn(2, 8)).sum().backward()
    assert norm.weight.grad is not None
    norm.requires_grad_(False)
    assert not norm(torch.randn(2, 8)).requires_grad


def test_the_recipe_chooses_and_liger_is_refused_where_it_cannot_run(monkeypatch):
    cpu, cuda, meta = (torch.device(kind) for kind in ("cpu", "cuda", "meta"))
    auto, wanted = Training(), Training(layer_kernels="liger")
    assert choose(Training(layer_kernels="torch"), cuda) is None
    assert choose(auto, cpu) is choose(auto, meta) is choose(wanted, meta) is choose(wanted, cpu) is OURS
    check_kernels(auto, cpu)
    monkeypatch.setattr(layer_kernels, "HAS_TRITON", True)
    for there, found in ((True, LIGER), (False, OURS)):
        monkeypatch.setattr(liger, "is_there", lambda there=there: there)
        assert choose(auto, cuda) is found
        assert choose(Training(torch_compile=True), cuda) is OURS
        if there:
            check_kernels(wanted, cuda)
    with pytest.raises(UserError, match="liger-kernel or what Triton needs is missing") as error:
        check_kernels(wanted, cuda)
    assert error.value.where == "training.layer_kernels"
    assert "install qlora[gpu]" in error.value.todo
    with pytest.raises(UserError, match="liger-kernel runs on a GPU alone, and this is a cpu"):
        check_kernels(wanted, cpu)
