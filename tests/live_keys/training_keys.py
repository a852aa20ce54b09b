"""The keys of training and evaluation, and those at the top: seen in what a run does and leaves behind."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.errors import UserError
from qlora_cli.kernels.output_layer import PROVEN_ON
from qlora_cli.model.base import load_config
from qlora_cli.model.layer_kernels import in_words
from qlora_cli.model.recompute import checkpointing_layers
from qlora_cli.plan.memory import plan
from qlora_cli.recipe import Recipe
from qlora_cli.train.optimizers import build_optimizer
from tests.live_keys.bench import RATE, Bench, Live, Watch, becomes, watched

BY_EPOCHS = {"training.max_steps": None, "training.epochs": 2}
FLAT = {"training.lr_scheduler": "constant"}
SLOPED = {"training.lr_scheduler": "linear"}
WIDE = {"adapter.r": 64}
CHOSEN = {"training.gradient_checkpointing": "auto"}
EMBEDDING = 259 * 64 * 4  # bytes of the tiny model's, in fp32
LAYERS = 2 * 2**15  # codes and scales of seven weights, 22,016 bytes, pinned in a power of two
OUR_LAYERS = "5 norms and 2 MLPs fused (torch functions)"
EIGHT_BIT = {torch.uint8, torch.float32}  # bitsandbytes keeps 32 bits for the matrices below 4,096 weights


def of_run(see: Callable[[Watch], Any]) -> Callable[[Bench, Recipe], Any]:
    """Something seen in a run that came to its end."""

    def look(bench: Bench, recipe: Recipe) -> Any:
        watch = bench.trained(recipe)
        if watch.error:
            raise watch.error
        return see(watch)

    return look


def logged(name: str) -> Callable[[Bench, Recipe], list[int]]:
    """The steps whose metrics have `name`."""
    return of_run(lambda watch: watch.steps_with(name))


def rates(watch: Watch) -> list[float]:
    """The learning rate of every step as the optimizer had it, as a share of the base recipe's."""
    return [round(rate / RATE, 4) for rate, *_ in watch.rates]


def rate_of_a_and_move_of_b(watch: Watch) -> tuple[float, float]:
    """Of the first step: Adam moves every weight with a clear gradient by its whole rate."""
    return watch.rates[0][0], round(largest_move_of_b(watch), 5)


def largest_move_of_b(watch: Watch) -> float:
    """Of the weights that start at 0, in the first step."""
    ends = [end for start, end in zip(watch.start, watch.end, strict=True) if not start.any()]
    return torch.cat([end.flatten() for end in ends]).abs().max().item()


def shrinking_of_a(watch: Watch) -> float:
    """What the first step leaves of A, which has no gradient while B is 0."""
    pairs = [(start, end) for start, end in zip(watch.start, watch.end, strict=True) if start.any()]
    shares = torch.cat([(end / start).flatten() for start, end in pairs])
    assert shares.max() - shares.min() < 1e-5
    return round(shares.mean().item(), 5)


def moment(name: str, power: int) -> Callable[[Watch], float]:
    """The optimizer's running mean after the first step, as a share of the gradient to the power."""

    def see(watch: Watch) -> float:
        kept = torch.cat([state[name].flatten() for state in watch.state])
        gradient = torch.cat([g.flatten() for g in watch.gradient]) ** power
        return round((kept.norm() / gradient.norm()).item(), 5)

    return see


def norms(watch: Watch) -> tuple[float, float]:
    """The gradient's norm in the first step: as logged, which is before clipping, and as the optimizer got it."""
    applied = torch.cat([g.flatten() for g in watch.gradient]).norm().item()
    return round(watch.metrics[0]["grad_norm"], 4), round(applied, 4)


def clipped_to(limit: float) -> Callable[[Any, Any], bool]:
    """The same gradient logged, beyond both limits; applied at the base recipe's norm of 0.3, and at `limit`."""
    return lambda without, with_value: (
        without[0] == with_value[0] > 0.3 == without[1] and with_value[1] == (limit or with_value[0])
    )


def kept_by_optimizer(watch: Watch) -> tuple[str, set[torch.dtype]]:
    """The library that made the step, and in which types it keeps the means of the gradients."""
    kept = {state["state1" if "state1" in state else "exp_avg"].dtype for state in watch.state}
    return type(watch.optimizer).__module__.split(".")[0], kept


def on_a_gpu(bench: Bench, recipe: Recipe) -> str:
    """The kind of optimizer that a GPU gets: on a CPU the paged ones are torch's own, as a line says."""
    optimizer, _ = build_optimizer(torch.nn.Linear(4, 4), recipe.training, torch.device("cuda"))
    return type(optimizer).__name__


def largest_batch(watch: Watch) -> int:
    return max(len(ids) for ids in watch.trained_batches)


def forwards_per_step(watch: Watch) -> float:
    return len(watch.trained_batches) / len(watch.rates)


def attentions_and_gradient(watch: Watch) -> tuple[float, Tensor]:
    """Attentions that a micro-batch runs, recomputed ones too, of the two layers; and the first step's gradient."""
    return watch.num_attentions / len(watch.trained_batches), torch.cat([g.flatten() for g in watch.gradient])


def recomputed(without: tuple[float, Tensor], with_value: tuple[float, Tensor]) -> bool:
    same = torch.allclose(without[1], with_value[1], rtol=1e-5, atol=1e-8)
    return without[0] == 2 and with_value[0] == 4 and same


def kept_weights(bench: Bench, recipe: Recipe) -> int:
    """Linear layers that have their weight dequantised."""
    return sum("kept_weight" in vars(module) for module in bench.prepared(recipe).base.model.modules())


def planned_in_host_memory(bench: Bench, recipe: Recipe) -> int:
    """Bytes of weights beside a GPU."""
    return plan(recipe, load_config(Path(recipe.model.name_or_path), recipe.model), "cuda").memory.host["weights"]


def fused_layers(bench: Bench, recipe: Recipe) -> str:
    """Which modules of the base have fused functions, or where the recipe is refused."""
    try:
        return in_words(bench.prepared(recipe).base.model)
    except UserError as error:
        return f"exit {int(error.code)} for {error.where}"


def compiled_layers(bench: Bench, recipe: Recipe) -> int:
    """Layers with a compiled forward; tests/model/test_compiled.py runs it."""
    layers = checkpointing_layers(bench.prepared(recipe).base.model)
    return sum(getattr(layer, "is_compiled", False) for layer in layers)


def start_and_order(watch: Watch) -> tuple[Tensor, list[Any]]:
    """The adapter's start, and the rows of each micro-batch."""
    return torch.cat([p.flatten() for p in watch.start]), [ids.tolist() for ids in watch.trained_batches]


def checkpoints(watch: Watch) -> list[str]:
    return sorted(path.name for path in (watch.folder / "checkpoints").iterdir())


def saved(*steps: int) -> list[str]:
    return [f"step-{step:06}" for step in steps]


def deterministic(watch: Watch) -> set[bool]:
    return {on for on, training in zip(watch.deterministic, watch.trains, strict=True) if training}


def measured(watch: Watch) -> list[int]:
    """The rows of each batch of the held-out evaluation; not those by which a model's way with its logits is proven."""
    return [len(ids) for ids in watch.measured_batches if ids.shape != PROVEN_ON]


def decoded(bench: Bench, recipe: Recipe) -> int:
    """Forward passes over a single token, the answer's second to last one, while `qlora eval` answers one prompt."""
    with watched() as watch:
        commands.evaluate(recipe, QuietReport(), commands.Wanted(baseline=True, limit=1, again=True))
    return sum(ids.shape[1] == 1 for ids in watch.inputs)


def written_to(bench: Bench, recipe: Recipe) -> list[str]:
    """Which of two folders gets the adapter, the metrics and the checkpoints."""
    folders = [bench.places[name] for name in ("here", "there")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    assert bench.train_in_place(recipe).error is None
    results = ("adapter/adapter_model.safetensors", "metrics.jsonl", "checkpoints/step-000006")
    return [folder.name for folder in folders if all((folder / result).exists() for result in results)]


def told_to_trackers(bench: Bench, recipe: Recipe) -> str:
    """Whether a run writes TensorBoard's events, or ends for want of a tracker."""
    watch = bench.trained(recipe)
    if watch.error:
        return f"exit {int(watch.error.code)} for {watch.error.where}"
    return "events" if any(watch.folder.rglob("*tfevents*")) else "nothing"


TRAINING = [
    Live("training.epochs", 1, logged("loss"), becomes([1, 2, 3, 4, 5, 6], [1, 2, 3]), BY_EPOCHS),
    Live("training.epochs", 1.5, logged("loss"), becomes([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]), BY_EPOCHS),
    Live("training.max_steps", 2, logged("loss"), becomes([1, 2, 3, 4, 5, 6], [1, 2])),
    Live("training.micro_batch_size", 3, of_run(largest_batch), becomes(2, 3)),
    Live("training.gradient_accumulation_steps", 3, of_run(forwards_per_step), becomes(2, 3)),
    Live(
        "training.learning_rate",
        2 * RATE,
        of_run(rate_of_a_and_move_of_b),
        becomes((RATE / 2, RATE / 2), (RATE, RATE)),
    ),
    Live(
        "training.loraplus_ratio",
        4,
        of_run(rate_of_a_and_move_of_b),
        becomes((RATE / 2, RATE / 2), (RATE / 2, 4 * RATE / 2)),
    ),
    Live(
        "training.lr_scheduler",
        "constant",
        of_run(rates),
        becomes([0.5, 1.0, 0.9045, 0.6545, 0.3455, 0.0955], [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ),
    Live(
        "training.lr_scheduler",
        "linear",
        of_run(rates),
        becomes([0.5, 1.0, 0.9045, 0.6545, 0.3455, 0.0955], [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
    ),
    Live(
        "training.min_lr_ratio",
        0.5,
        of_run(rates),
        becomes([0.5, 1.0, 0.8, 0.6, 0.4, 0.2], [0.5, 1.0, 0.9, 0.8, 0.7, 0.6]),
        SLOPED,
    ),
    Live(
        "training.warmup_ratio",
        0.5,
        of_run(rates),
        becomes([0.5, 1.0, 1.0, 1.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        FLAT,
    ),
    Live(
        "training.warmup_steps",
        4,
        of_run(rates),
        becomes([0.5, 1.0, 1.0, 1.0, 1.0, 1.0], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        FLAT,
    ),
    Live("training.warmup_steps", 0, of_run(rates), becomes([0.5, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]), FLAT),
    Live(
        "training.optimizer",
        "adamw_8bit",
        of_run(kept_by_optimizer),
        becomes(("torch", {torch.float32}), ("bitsandbytes", EIGHT_BIT)),
        WIDE,
    ),
    *(
        Live("training.optimizer", name, on_a_gpu, becomes("AdamW", kind))
        for name, kind in (("paged_adamw_8bit", "PagedAdamW8bit"), ("paged_adamw_32bit", "PagedAdamW32bit"))
    ),
    Live("training.adam_beta1", 0.5, of_run(moment("exp_avg", 1)), becomes(0.1, 0.5)),
    Live("training.adam_beta2", 0.5, of_run(moment("exp_avg_sq", 2)), becomes(0.001, 0.5)),
    Live(
        "training.adam_epsilon",
        10,
        of_run(largest_move_of_b),
        lambda without, with_value: 0 < with_value < 0.1 * without,
    ),
    Live("training.weight_decay", 0.5, of_run(shrinking_of_a), becomes(1.0, 1 - 0.5 * RATE / 2)),
    Live("training.max_grad_norm", 0.01, of_run(norms), clipped_to(0.01)),
    Live("training.max_grad_norm", 0, of_run(norms), clipped_to(0)),
    Live("training.gradient_checkpointing", True, of_run(attentions_and_gradient), recomputed),
    Live("training.memory", "fast", kept_weights, becomes(0, 14)),
    *(
        Live("training.memory", value, of_run(attentions_and_gradient), recomputed, CHOSEN)
        for value in ("offload", "lean")
    ),
    Live("training.memory", "offload", planned_in_host_memory, becomes(0, EMBEDDING)),
    Live("training.memory", "lean", planned_in_host_memory, becomes(0, EMBEDDING + LAYERS)),
    *(
        Live("training.layer_kernels", value, fused_layers, becomes(OUR_LAYERS, seen))
        for value, seen in (("torch", ""), ("liger", "exit 2 for training.layer_kernels"))
    ),
    Live("training.torch_compile", True, compiled_layers, becomes(0, 2)),
    Live(
        "training.seed",
        8,
        of_run(start_and_order),
        lambda without, with_value: not without[0].equal(with_value[0]) and without[1] != with_value[1],
    ),
    Live("training.logging_steps", 3, logged("loss"), becomes([1, 2, 3, 4, 5, 6], [3, 6])),
    Live("training.eval_steps", 2, logged("eval_loss"), becomes([6], [2, 4, 6])),
    Live("training.save_steps", 4, of_run(checkpoints), becomes(saved(6), saved(4, 6))),
    Live(
        "training.save_total_limit",
        1,
        of_run(checkpoints),
        becomes(saved(2, 4, 6), saved(6)),
        {"training.save_steps": 2},
    ),
    Live("training.deterministic", True, of_run(deterministic), becomes({False}, {True})),
]

EVALUATION = [
    Live("evaluation.batch_size", 3, of_run(measured), becomes([2, 2], [3, 1])),
    Live("evaluation.max_new_tokens", 7, decoded, becomes(3, 6), {"evaluation.max_new_tokens": 4}),
]

TOP = [
    Live("output_dir", "$there", written_to, becomes(["here"], ["there"]), {"output_dir": "$here"}),
    *(
        Live("report_to", [name], told_to_trackers, becomes("nothing", "exit 4 for report_to"))
        for name in ("tensorboard", "wandb", "trackio", "mlflow")
        if importlib.util.find_spec(name) is None
    ),
]
if importlib.util.find_spec("tensorboard") is not None:
    TOP += [Live("report_to", ["tensorboard"], told_to_trackers, becomes("nothing", "events"))]
