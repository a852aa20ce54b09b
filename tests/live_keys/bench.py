"""What the tables of live keys stand on: a recipe through the real loader, a prepared session, a watched run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.errors import UserError
from qlora_cli.recipe import Recipe, load_recipe
from qlora_cli.train.run import Run
from qlora_cli.train.session import Session, prepare

RATE = 0.01
"""The base recipe's learning rate; its first step is a step of warmup and uses half of it."""

BASE: dict[str, Any] = {
    "model": {"name_or_path": "$model"},
    "quantization": {"compute_dtype": "float32"},
    "adapter": {"r": 4, "alpha": 8},
    "data": {"train": [{"path": "$rows"}], "eval": [{"path": "$heldout"}], "max_length": 256, "packing": False},
    "training": {
        "max_steps": 6,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": "adamw",
        "learning_rate": RATE,
        "logging_steps": 1,
        "seed": 7,
        "gradient_checkpointing": False,
    },
}
"""Twelve rows, four in a step; $names stand for places that a Bench knows."""

Values = Mapping[str, Any]
"""Values of a recipe by dotted key."""


@dataclass(frozen=True)
class Live:
    """A key, a value for it, and what proves that the value is obeyed.

    see:    what is looked at outside the stored recipe, once without the value and once with it.
    expect: whether the two sights are right; it cannot be true of two equal ones.
    beside: what both recipes hold besides.
    along:  what the value cannot be without, and the recipe without it cannot hold.
    """

    key: str
    value: Any
    see: Callable[[Bench, Recipe], Any]
    expect: Callable[[Any, Any], bool]
    beside: Values = field(default_factory=dict)
    along: Values = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.key}={json.dumps(self.value)}"


def becomes(without: Any, with_value: Any) -> Callable[[Any, Any], bool]:
    """What is seen is exactly this without the value, and that with it."""
    return lambda before, after: bool(before == without and after == with_value)


@dataclass
class Watch:
    """What passed through the model and the optimizer: every forward pass, every step, and the first step in full."""

    inputs: list[Tensor] = field(default_factory=list)  # (B, T) token ids of each forward pass
    trains: list[bool] = field(default_factory=list)  # whether it was one of training
    deterministic: list[bool] = field(default_factory=list)
    num_attentions: int = 0  # forward passes of any layer's attention in training, recomputation included
    optimizer: Optimizer | None = None
    rates: list[list[float]] = field(default_factory=list)  # of each step, by group
    start: list[Tensor] = field(default_factory=list)  # the adapter before the first step, and
    gradient: list[Tensor] = field(default_factory=list)  # its gradient as the optimizer got it
    end: list[Tensor] = field(default_factory=list)  # the adapter after it, and
    state: list[dict[str, Tensor]] = field(default_factory=list)  # what the optimizer then kept
    error: UserError | None = None
    folder: Path = Path()

    def forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before every module's forward: the embedding sees the token ids, recomputation runs the attention twice."""
        if isinstance(module, nn.Embedding):
            self.inputs.append(args[0].cpu().clone())
            self.trains.append(module.training)
            self.deterministic.append(torch.are_deterministic_algorithms_enabled())
        self.num_attentions += type(module).__name__ == "LlamaAttention" and module.training

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        if len(self.rates) == 1:
            self.optimizer = optimizer
            self.start = [p.detach().clone() for p in parameters(optimizer)]
            self.gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters(optimizer)]

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if len(self.rates) == 1:
            self.end = [p.detach().clone() for p in parameters(optimizer)]
            self.state = [
                {name: value.clone() for name, value in optimizer.state[p].items() if isinstance(value, Tensor)}
                for p in parameters(optimizer)
            ]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def steps_with(self, name: str) -> list[int]:
        """The steps whose line of metrics has `name`."""
        return [line["step"] for line in self.metrics if name in line]

    @property
    def trained_batches(self) -> list[Tensor]:
        """The token ids of every micro-batch that was trained on."""
        return [ids for ids, training in zip(self.inputs, self.trains, strict=True) if training]

    @property
    def measured_batches(self) -> list[Tensor]:
        """The token ids of every batch of an evaluation."""
        return [ids for ids, training in zip(self.inputs, self.trains, strict=True) if not training]


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextmanager
def watched() -> Iterator[Watch]:
    """Watches every model and optimizer of the process until the block ends; torch's mode of kernels is put back."""
    watch, deterministic = Watch(), torch.are_deterministic_algorithms_enabled()
    handles = [
        register_module_forward_pre_hook(watch.forward),
        register_optimizer_step_pre_hook(watch.before_step),
        register_optimizer_step_post_hook(watch.after_step),
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
        torch.use_deterministic_algorithms(deterministic)


@dataclass(frozen=True)
class Measured:
    """What `qlora eval` told of the only suite of a recipe, its answers in the order of the rows, and what passed."""

    suite: dict[str, Any]
    answers: list[dict[str, Any]]
    watch: Watch

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """The base's figures, by name."""
        figures: dict[str, dict[str, Any]] = self.suite["models"]["base"]
        return figures


class Bench:
    """Recipes from dotted values, and what becomes of them. Equal recipes are prepared and trained once.

    places: what $names in a recipe stand for. root: a folder of its own.
    """

    def __init__(self, places: Mapping[str, Path], root: Path):
        self.places, self.root = places, root
        self.num_folders = 0
        self.done: dict[str, Any] = {}

    def recipe(self, values: Values) -> Recipe:
        """BASE with these values, written to a file and read through the command line's loader and --set."""
        path = self.root / "recipe.yaml"
        path.write_text(self._in_place(yaml.safe_dump(BASE)))
        overrides = [f"{key}={self._in_place(json.dumps(value))}" for key, value in values.items()]
        if "output_dir" not in values:
            overrides.append(f"output_dir={self.root / 'run'}")
        return load_recipe(path, overrides)

    def prepared(self, recipe: Recipe) -> Session:
        """The session that training would begin with."""
        return self._once("prepare", recipe, self.prepare_anew)

    def table(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The lines of a start that changed the base, as stored with it."""
        record: dict[str, list[dict[str, Any]]] = json.loads(
            (self.prepared(recipe).base.folder / "start.json").read_text()
        )
        return record["table"]

    def prepare_anew(self, recipe: Recipe) -> Session:
        deterministic = torch.are_deterministic_algorithms_enabled()
        try:
            return prepare(recipe, Run(self._new_folder()), QuietReport(), "auto")
        finally:
            torch.use_deterministic_algorithms(deterministic)

    def trained(self, recipe: Recipe) -> Watch:
        """A run to its end in a folder of its own, watched."""
        return self._once("train", recipe, self._train_anew)

    def _train_anew(self, recipe: Recipe) -> Watch:
        return self.train_in_place(recipe.model_copy(update={"output_dir": str(self._new_folder())}))

    def train_in_place(self, recipe: Recipe) -> Watch:
        """`qlora train`, in the recipe's own folder; what the user can mend is kept in `error`."""
        with watched() as watch:
            watch.folder = Path(recipe.output_dir)
            try:
                commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=None)
            except UserError as error:
                watch.error = error
        return watch

    def measured(self, recipe: Recipe) -> Measured:
        """`qlora eval` of the base, untrained, in a folder of its own."""
        return self._once("measure", recipe, self.measure_anew)

    def measure_anew(self, recipe: Recipe) -> Measured:
        with watched() as watch:
            watch.folder = self._new_folder()
            own = recipe.model_copy(update={"output_dir": str(watch.folder)})
            (suite,) = commands.evaluate(own, QuietReport(), commands.Wanted(baseline=True))["suites"]
        stored = (watch.folder / "eval" / f"{suite['name']}.base.jsonl").read_text().splitlines()
        return Measured(suite, sorted(map(json.loads, stored[1:]), key=lambda answer: answer["row"]), watch)

    def _once(self, verb: str, recipe: Recipe, make: Callable[[Recipe], Any]) -> Any:
        name = verb + recipe.model_dump_json(exclude={"output_dir"})
        if name not in self.done:
            self.done[name] = make(recipe)
        return self.done[name]

    def _new_folder(self) -> Path:
        self.num_folders += 1
        folder = self.root / f"run{self.num_folders}"
        folder.mkdir()
        return folder

    def _in_place(self, text: str) -> str:
        return Template(text).safe_substitute({name: str(path) for name, path in self.places.items()})
