"""The loss from hidden states is that from all logits, with every gradient, for every head, chunk and tail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_cli.kernels import linear_cross_entropy as module
from qlora_cli.kernels.linear_cross_entropy import (
    NO_TAIL,
    Tail,
    linear_cross_entropy,
    out_features,
    reference_linear_cross_entropy,
    token_losses,
)
from qlora_cli.model.fused import cast_once, fuse_adapter
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.quant.packed import Storage

N, WIDTH, VOCAB = 23, 32, 67
TAILS = {
    "plain": NO_TAIL,
    "scaled": Tail(scale=0.25),
    "capped": Tail(softcap=2.0),
    "shifted": Tail(bias=torch.linspace(-2, 2, VOCAB).unsqueeze(0)),
    "all": Tail(1.5, 3.0, torch.linspace(1, -1, VOCAB)),
}


class Holder(nn.Module):
    """A model that is a head and nothing else."""

    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(x)
        return y


def linear(bias: bool = False, trained: bool = False) -> nn.Module:
    head = nn.Linear(WIDTH, VOCAB, bias=bias)
    nn.init.normal_(head.weight, std=0.4)
    return head.requires_grad_(trained)


def packed() -> nn.Module:
    head = PackedLinear(WIDTH, VOCAB, True, Storage("int4", block_size=32))
    head.store(head.packed_from(torch.randn(VOCAB, WIDTH) * 0.4))
    nn.init.normal_(head.bias)
    return head


def adapted(head: nn.Module, fused: bool, **config: Any) -> nn.Module:
    """The head with a LoRA adapter whose B is not zero."""
    model: Any = peft.get_peft_model(Holder(head), peft.LoraConfig(target_modules=["lm_head"], r=4, **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    layer: nn.Module = (fuse_adapter(model) if fused else model).base_model.model.lm_head
    return layer


def copied() -> nn.Module:
    """A head that an adapter trains in full beside the frozen one."""
    config = peft.LoraConfig(target_modules=["other"], modules_to_save=["lm_head"])
    holder = Holder(linear(bias=True))
    holder.other = nn.Linear(2, 2)
    layer: nn.Module = peft.get_peft_model(holder, config).base_model.model.lm_head  # type: ignore[arg-type]
    return layer


HEADS: dict[str, Callable[[], nn.Module]] = {
    "frozen": linear,
    "frozen with a bias": lambda: linear(bias=True),
    "trained": lambda: linear(trained=True),
    "trained with a bias": lambda: linear(bias=True, trained=True),
    "trained in full by an adapter": copied,
    "packed": packed,
    "LoRA": lambda: adapted(linear(bias=True), False),
    "DoRA": lambda: adapted(linear(bias=True), False, use_dora=True),
    "fused LoRA": lambda: adapted(linear(bias=True), True),
    "fused LoRA on a packed one": lambda: adapted(packed(), True),
}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the rows of a chunk and of a block of fp32 logits."""

    def cut(rows: int, block_rows: int = 2, width: int = 4) -> None:
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", rows * VOCAB * width + 1)
        monkeypatch.setitem(module.BLOCK_BYTES, "cpu", block_rows * VOCAB * 4 + 1)

    return cut


def inputs(n: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, WIDTH, dtype=dtype, requires_grad=True), torch.randint(VOCAB, (n,))


def passed(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    """The loss and its gradients, by hidden states where they require one and by what the head trains."""
    wanted = [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    """Each to `tolerance` of its largest value."""
    for ours, plain in zip(found, wanted, strict=True):
        assert ours.dtype == plain.dtype
        assert ours.shape == plain.shape
        assert plain.numel() == 0 or (ours - plain).abs().max() <= tolerance * plain.abs().max()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor, of any type and in fp32, that an operation inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.wide = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
                self.wide = max(self.wide, leaf.numel() * (leaf.dtype == torch.float32))
        return result


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_gradients_are_those_of_finite_differences(tail, trained, chunks):
    chunks(2, 1, width=8)
    head = nn.Linear(3, VOCAB, dtype=torch.float64).requires_grad_(trained)
    hidden, targets = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randint(VOCAB, (5,))
    wide = TAILS[tail]

    def loss(*inputs: Tensor) -> Tensor:
        return linear_cross_entropy(inputs[0], targets, head, wide, 0.3)

    assert loss(hidden).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (hidden, *(head.parameters() if trained else ())))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("head", HEADS)
def test_in_fp32_it_is_the_reference(head, tail, chunks):
    chunks(4)  # of 23 rows in six chunks, the last is short
    made, (hidden, targets) = HEADS[head](), inputs()
    assert out_features(made) == VOCAB
    ours = passed(linear_cross_entropy(hidden, targets, made, TAILS[tail], 1 / 7), hidden, made)
    plain = passed(reference_linear_cross_entropy(hidden, targets, made, TAILS[tail]) / 7, hidden, made)
    assert len(ours) > 2 or not any(p.requires_grad for p in made.parameters())
    assert_same(ours, plain)


@pytest.mark.parametrize("head", HEADS)
def test_in_bf16_it_is_as_near_to_the_truth_as_the_reference(head, chunks):
    """Twice, and inside one autocast, as the micro-batches of a step."""
    chunks(4, width=2)
    made, (hidden, targets) = HEADS[head](), inputs()
    hidden.data = hidden.data.bfloat16().float()
    exact = passed(reference_linear_cross_entropy(hidden, targets, made, TAILS["all"]), hidden, made)
    with torch.autocast("cpu", dtype=torch.bfloat16), cast_once(made):
        plain = passed(reference_linear_cross_entropy(hidden, targets, made, TAILS["all"]), hidden, made)
        first, ours = (
            passed(linear_cross_entropy(hidden, targets, made, TAILS["all"]), hidden, made) for _ in range(2)
        )
    assert all(map(torch.equal, first, ours))
    for one, other, truth in zip(ours, plain, exact, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - truth).norm() <= max(1.5 * (other - truth).norm(), 1e-3 * truth.norm())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 40),
    rows=st.integers(1, 50),
    block_rows=st.integers(0, 9),
    tail=st.sampled_from(sorted(TAILS)),
    weight=st.floats(1e-3, 10),
    seed=st.integers(0, 99),
)
def test_neither_chunks_nor_blocks_change_it(chunks, n, rows, block_rows, tail, weight, seed):
    torch.manual_seed(seed)
    head, (hidden, targets) = linear(bias=True, trained=True), inputs(n)
    chunks(rows, block_rows)
    cut = passed(linear_cross_entropy(hidden, targets, head, TAILS[tail], weight), hidden, head)
    each, likeliest = token_losses(hidden, targets, head, TAILS[tail])
    chunks(10**6, 10**6)
    whole = passed(linear_cross_entropy(hidden, targets, head, TAILS[tail], weight), hidden, head)
    assert_same(cut, whole)
    logits = TAILS[tail](head(hidden))
    torch.testing.assert_close(
        each, nn.functional.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(likeliest, logits.argmax(dim=-1) == targets)
    assert each.sum().item() * weight == pytest.approx(float(whole[0]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("tail", ["plain", "all"])
@pytest.mark.parametrize("trained", [False, True])
def test_memory_does_not_grow_with_the_logits(trained, tail, chunks):
    chunks(4)
    head = linear(trained=trained)
    for n in (8, 200, 1600):
        hidden, targets = inputs(n)
        with Largest() as seen:
            loss = linear_cross_entropy(hidden, targets, head, TAILS[tail])
            kept = [tensor for tensor in loss.grad_fn.saved_tensors if tensor is not None]
            loss.backward()
            token_losses(hidden, targets, head, TAILS[tail])
        assert seen.elements <= max(4 * VOCAB, VOCAB * WIDTH, n * WIDTH)
        assert sum(map(Tensor.numel, kept)) == n * WIDTH + trained * VOCAB * WIDTH
    narrow, rows = linear().bfloat16(), hidden[:40].detach().bfloat16().requires_grad_()
    with Largest() as seen:
        linear_cross_entropy(rows, targets[:40], narrow, TAILS[tail])
    assert seen.wide == 2 * VOCAB < seen.elements, "a block of them at a time"
    with Largest() as seen:
        reference_linear_cross_entropy(hidden, targets, head)
    assert seen.elements == 1600 * VOCAB, "else this shows nothing"


@pytest.mark.parametrize("head", ["frozen", "trained with a bias", "packed"])
def test_no_targets_are_a_loss_of_zero_with_gradients_of_zero(head):
    made, (hidden, targets) = HEADS[head](), inputs(0)
    loss, *gradients = passed(linear_cross_entropy(hidden, targets, made), hidden, made)
    assert loss == 0
    assert loss.dtype == torch.float32
    assert [gradient.any().item() for gradient in gradients] == [False] * len(gradients)
    losses, likeliest = token_losses(hidden.bfloat16(), targets, made)
    assert (losses.shape, losses.dtype, likeliest.shape, likeliest.dtype) == ((0,), torch.float32, (0,), torch.bool)


@pytest.mark.parametrize("way", ["no gradient asked", "nothing to train"])
def test_where_no_gradient_is_asked_none_is_computed(way, monkeypatch):
    monkeypatch.setattr(module._LinearCrossEntropy, "forward", lambda *_: pytest.fail("the gradient was computed"))
    asked = way == "no gradient asked"
    head, (hidden, targets) = linear(bias=True, trained=asked), inputs()
    with torch.no_grad() if asked else nullcontext():
        loss = linear_cross_entropy(hidden if asked else hidden.detach(), targets, head, TAILS["all"], 0.5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference_linear_cross_entropy(hidden, targets, head, TAILS["all"]).detach() * 0.5)


def test_a_trained_head_behind_frozen_hidden_states_gets_its_gradient(chunks):
    chunks(4)
    head, (hidden, targets) = linear(trained=True), inputs()
    found = passed(linear_cross_entropy(hidden.detach(), targets, head), hidden.detach(), head)
    assert len(found) == 2
    assert_same(found, passed(reference_linear_cross_entropy(hidden.detach(), targets, head), hidden.detach(), head))


def test_the_gradient_that_comes_in_is_in_the_gradients_that_go_out():
    head, (hidden, targets) = linear(trained=True), inputs()
    found = passed(linear_cross_entropy(hidden, targets, head) * 3 - 1, hidden, head)
    assert_same(found, passed(reference_linear_cross_entropy(hidden, targets, head) * 3 - 1, hidden, head))


def test_neither_hidden_states_nor_the_head_are_written_to(chunks):
    chunks(4)
    head, (hidden, targets) = linear(bias=True, trained=True), inputs()
    before, state = hidden.detach().clone(), copy.deepcopy(head.state_dict())
    linear_cross_entropy(hidden, targets, head, TAILS["all"]).backward()
    assert torch.equal(hidden, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())


def test_logits_beyond_every_range_have_finite_losses_and_gradients():
    head, (hidden, targets) = linear(), inputs()
    hidden.data *= 1e4
    for tail in (NO_TAIL, TAILS["capped"]):
        assert all(
            tensor.isfinite().all()
            for tensor in passed(linear_cross_entropy(hidden, targets, head, tail), hidden, head)
        )


def test_large_logits_leave_the_loss_its_digits():
    """A loss of 1e-5 beside logits of 300: their difference is taken before anything small is added."""
    logits = torch.tensor([[300.0, 288.7, 280.0, -5.0]], requires_grad=True)
    head = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
    at = torch.tensor([0])
    found = linear_cross_entropy(logits, at, head.requires_grad_(False))
    wanted = torch.nn.functional.cross_entropy(logits.double(), at)
    assert abs(found.item() / wanted.item() - 1) < 0.02
