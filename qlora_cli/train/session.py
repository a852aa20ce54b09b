"""What one training process holds, and how it is put together: base, adapter, data, optimizer, progress."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from torch.optim import Optimizer

from qlora_cli.data.examples import Examples, load_examples, wanted_rows
from qlora_cli.data.limits import Limits
from qlora_cli.data.order import Order
from qlora_cli.data.readers import DataFile
from qlora_cli.data.rows import Role, count
from qlora_cli.data.statistics import layout_of
from qlora_cli.data.stream import Stream
from qlora_cli.errors import Exit, UserError
from qlora_cli.kernels.isolation import NotIsolated, check_isolation, prepare_packing
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, Found, find_base, fingerprint, load_base
from qlora_cli.recipe import Recipe
from qlora_cli.train.checkpoint import fault, load_checkpoint, newest_valid, step_of
from qlora_cli.train.facts import run_facts
from qlora_cli.train.feed import Feed, Place, StoredFeed, StreamFeed
from qlora_cli.train.optimizers import build_optimizer
from qlora_cli.train.run import TRAINED_ON, Run, date_of, metrics_until, read_facts, write_facts
from qlora_cli.train.step import restore_random_state, seed_everything


class Report(Protocol):
    """What training tells while it runs; a display implements it."""

    def say(self, text: str) -> None: ...
    def prepared(self, role: str, num_rows: int) -> None: ...
    def begin(self, step: int, total_steps: int) -> None: ...
    def advance(self, step: int) -> None: ...
    def metrics(self, values: dict[str, Any]) -> None: ...
    def end(self) -> None: ...


@dataclass
class Session:
    """Everything that one training process holds; `step`, `place` and `logged` are all that moves.

    place:  where the feed stands after `step` steps, where their number does not say it.
    packed: whether examples go through the model one behind the other, without padding.
    """

    recipe: Recipe
    run: Run
    report: Report
    accelerator: Any
    base: Base
    model: Any
    optimizer: Optimizer
    feed: Feed
    eval_set: Examples
    packed: bool
    total_steps: int
    step: int = 0
    place: Place | None = None
    logged: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "tokens": 0.0})
    clock: float = field(default_factory=time.perf_counter)
    trained_tokens: int = 0  # since `clock`


def prepare(recipe: Recipe, run: Run, report: Report, resume: str) -> Session:
    """Loads base, adapter, data and optimizer, and puts the run back to where it stopped."""
    training = recipe.training
    accelerator = build_accelerator(recipe, run)
    found = find_base(recipe)
    today = date_of(run)
    feed = open_feed(recipe, found, report, today, global_batch(recipe, accelerator))  # a bad row is told in seconds
    eval_set = encode_role(recipe, found, "eval", report, today)
    base = load_base(recipe, accelerator.device, found)
    say_base(report, recipe, base)
    refuse_trained_on(feed.examples, eval_set)
    refuse_beyond_context(base, feed.examples, eval_set)
    base_digest = fingerprint(base.model)
    packed = keep_apart(recipe, base, report)

    seed_everything(training.seed)  # before the adapter: its A matrices are random
    model = attach_adapter(base, recipe.adapter, recipe.model.task)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.say(f"adapter  {trainable:,} trainable weights in fp32, compute in {str(base.compute_dtype)[6:]}")
    optimizer, note = build_optimizer(model, training, base.device)
    if note:
        report.say(f"note     {training.optimizer} is {note}")
    steps = feed.total_steps(training.epochs, training.max_steps)
    say_layout(report, recipe, feed, packed)
    session = Session(recipe, run, report, accelerator, base, model, optimizer, feed, eval_set, packed, steps)
    if accelerator.is_main_process:
        write_facts(run, run_facts(recipe, base, base_digest, feed, today))
    restore(session, resume)
    check_agreement(session, base_digest)
    seed_processes(session)
    checkpoint_activations(session)
    return session


def encode_role(recipe: Recipe, base: Found, role: Role, report: Report, today: date) -> Examples:
    """The encoded rows of data.train or data.eval, with what was read and left out told."""
    examples = load_role(recipe, base, role, report, today)
    for line in examples.summary() if examples.rows else []:
        report.say(f"{role:<8} {line}")
    return examples


def load_role(recipe: Recipe, base: Found, role: Role, report: Report, today: date) -> Examples:
    """The encoded rows of data.train or data.eval, with nothing told but how far it is."""
    return load_examples(
        recipe.data,
        role,
        base.tokenizer,
        base.stop_token_ids,
        seed=recipe.training.seed,
        today=today,
        progress=lambda num_rows: report.prepared(role, num_rows),
    )


def open_feed(recipe: Recipe, base: Found, report: Report, today: date, units_per_step: int) -> Feed:
    """What is trained on: the rows of data.train, all of them prepared, or read and prepared while training."""
    data = recipe.data
    if not data.train[0].streaming:
        examples = encode_role(recipe, base, "train", report, today)
        return StoredFeed(examples, order_of(recipe, examples, units_per_step))
    wanted = wanted_rows(data, "train", base.tokenizer, base.stop_token_ids, seed=recipe.training.seed, today=today)
    capacity = wanted.limits.longest if data.packing is True else None
    workers = None if data.workers == "auto" else data.workers

    def tell(error: UserError) -> None:
        report.say(f"train    bad row left out: {error}")

    stream = Stream(wanted, units_per_step, recipe.training.seed, capacity, workers, tell)
    for source in data.train:
        report.say(f"train    {source.path}: read while training, weight {source.weight:g}")
    return StreamFeed(stream, wanted.limits.longest, stream.digest())


def refuse_trained_on(train_set: Examples, eval_set: Examples) -> None:
    """Refuses held-out files that are among the trained ones, whatever folder or pattern they were named by."""
    if train_set.folder != eval_set.folder and not (train_set.is_split and eval_set.is_split):
        trained = {os.path.realpath(part.path) for part in train_set.parts if isinstance(part, DataFile)}
        for part in eval_set.parts:
            if isinstance(part, DataFile) and os.path.realpath(part.path) in trained:
                what = f"{part.path} is held out and trained on"
                raise UserError("data.eval", what, "name other files: a model that has seen them cannot be measured")


def refuse_beyond_context(base: Base, *sets: Examples) -> None:
    """Refuses rows of more tokens than the model has positions: it was never trained to read so far."""
    context = getattr(base.model.config, "max_position_embeddings", None)
    for examples in sets:
        lengths = examples.lengths
        too_long = [index for index in range(len(lengths)) if context and lengths[index] > context]
        if too_long:
            raise UserError(
                examples.rows[too_long[0]].where,
                f"the row has {lengths[too_long[0]]:,} tokens, the model {context:,} positions "
                f"({count(len(too_long), 'such row')})",
                f"set data.max_length: {context} and data.on_long_row to truncate or skip",
            )


def keep_apart(recipe: Recipe, base: Base, report: Report) -> bool:
    """Whether examples can go through the model one behind the other: proven on the model itself.

    Raises UserError where data.packing asks for it and the model mixes them.
    """
    wanted, attention = recipe.data.packing, recipe.model.attn_implementation
    if wanted is False:
        return False
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    try:
        with base.compute():
            if attention == "auto":
                prepare_packing(base.model, base.device, vocabulary)
            else:
                check_isolation(base.model, base.device, vocabulary)
    except NotIsolated as error:
        if wanted is True:
            todo = "set data.packing: false, or another model.attn_implementation"
            raise UserError("data.packing", f"this model cannot train packed rows: {error}", todo) from error
        report.say(f"note     padded batches, since this model does not keep packed rows apart: {error}")
        return False
    return True


def order_of(recipe: Recipe, train_set: Examples, units_per_step: int) -> Order:
    """The order of the examples; with data.packing: true, of rows that they fill."""
    capacity = Limits.of(recipe.data).longest if recipe.data.packing is True else None
    sources = tuple((source.num_examples, source.weight) for source in train_set.sources)
    return Order(sources, units_per_step, recipe.training.seed, train_set.lengths, capacity)


def say_layout(report: Report, recipe: Recipe, feed: Feed, packed: bool) -> None:
    """How the examples of the first epoch lie in the batches, and what share of these is padding."""
    if isinstance(feed, StoredFeed):
        report.say(f"batches  {layout_of(feed.order, recipe.training.micro_batch_size).words(packed)}")


def say_base(report: Report, recipe: Recipe, base: Base) -> None:
    """How many bytes of the base lie in which type, and what is odd about it on this device."""
    report.say(f"base     {recipe.model.name_or_path}  {base.summary}")
    if base.note:
        report.say(f"note     {base.note}")


def build_accelerator(recipe: Recipe, run: Run) -> Any:
    """accelerate's view of devices, processes and trackers.

    Raises UserError (exit 4) for a tracker that is not installed, where accelerate would only warn.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    installed = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if absent := [name for name in recipe.report_to if name not in installed]:
        raise UserError(
            "report_to", f"{', '.join(absent)} is not installed", "run `pip install 'qlora[track]'`", Exit.ENVIRONMENT
        )
    accelerator = Accelerator(log_with=list(recipe.report_to) or None, project_dir=str(run.folder))
    if recipe.report_to:
        sections = {name: part for name, part in recipe.model_dump(by_alias=True).items() if isinstance(part, dict)}
        flat = {f"{name}.{key}": str(value) for name, part in sections.items() for key, value in part.items()}
        accelerator.init_trackers("qlora", config=flat)
    return accelerator


def global_batch(recipe: Recipe, accelerator: Any) -> int:
    """The global batch: examples, or rows that they fill, of one optimizer step over all processes."""
    training = recipe.training
    return training.micro_batch_size * training.gradient_accumulation_steps * accelerator.num_processes


def restore(session: Session, resume: str) -> None:
    """Puts the session back to the newest checkpoint that verifies, if there is one."""
    run, accelerator = session.run, session.accelerator
    if accelerator.is_main_process:
        newest = newest_valid(run.checkpoints, session.report.say)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        newest = newest_valid(run.checkpoints, session.report.say)
    if resume not in ("auto", "never"):
        newest = chosen_checkpoint(run, Path(resume), newest)
    if newest is not None:
        check_belongs(newest, session)
        progress = load_checkpoint(newest, session.model, session.optimizer, accelerator.num_processes)
        session.step, session.place, session.logged = progress.step, progress.place, progress.logged
        restore_random_state(progress.random[accelerator.process_index])
        session.report.say(f"resume   {newest}, step {session.step} of {session.total_steps}")
    if accelerator.is_main_process:
        metrics_until(run, session.step)


def check_belongs(checkpoint: Path, session: Session) -> None:
    """Refuses a checkpoint of another run: other base, tokenizer, template or data, or beyond this run's last step."""
    theirs, ours = read_facts(Run(checkpoint.parent.parent)), read_facts(session.run)
    assert ours is not None, "run.json is written before a checkpoint is looked for"
    for name, what in TRAINED_ON.items():
        if theirs and theirs["fingerprints"][name] != ours["fingerprints"][name]:
            raise UserError(checkpoint, f"{what} of its run is another", "name a checkpoint of this very run")
    if (step := step_of(checkpoint)) > session.total_steps:
        raise UserError(
            checkpoint, f"is of step {step}, and this run ends at {session.total_steps}", "raise training.max_steps"
        )


def chosen_checkpoint(run: Run, wanted: Path, newest: Path | None) -> Path:
    """The checkpoint named by `--resume PATH`: a whole one, and none newer in the run that it would overwrite."""
    if reason := fault(wanted):
        raise UserError(f"--resume {wanted}", reason, "name a checkpoints/step-NNNNNN folder")
    if newest is not None and newest.resolve() != wanted.resolve():
        raise UserError(
            f"--resume {wanted}",
            f"{newest} is there too and would be overwritten",
            "choose another output_dir, or move that checkpoint away",
        )
    return wanted


def check_agreement(session: Session, base_digest: str) -> None:
    """Refuses processes that stand at different steps, or on other weights or data: their sum would be no gradient.

    It happens where two machines do not share the run folder, or hold different copies of a model.
    """
    from accelerate.utils import gather_object

    if session.accelerator.num_processes == 1:
        return
    weights = hashlib.sha256()
    for parameter in session.model.parameters():
        if parameter.requires_grad:
            weights.update(parameter.detach().cpu().numpy().tobytes())
    mine = (session.step, base_digest, session.feed.digest, weights.hexdigest())
    everyone = gather_object([mine])
    for what, seen in zip(("step", "base model", "training data", "adapter"), zip(*everyone, strict=True), strict=True):
        if len(set(seen)) > 1:
            raise UserError(
                f"output_dir: {session.run.folder}",
                f"the processes disagree on the {what}: {', '.join(map(str, seen[:4]))}",
                "put the run folder, the model and the data where every machine sees the same",
            )


def seed_processes(session: Session) -> None:
    """Gives every process its own dropout; the adapter was drawn from the recipe's seed on all of them."""
    rank = session.accelerator.process_index
    if session.step == 0 and session.accelerator.num_processes > 1:
        seed_everything(session.recipe.training.seed + rank)


def checkpoint_activations(session: Session) -> None:
    """Sets training mode and non-reentrant recomputation of activations, `auto` being on a GPU."""
    wanted = session.recipe.training.gradient_checkpointing
    model = session.base.model
    session.model.train()
    model.config.use_cache = False
    if wanted is True or (wanted == "auto" and session.base.device.type == "cuda"):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
