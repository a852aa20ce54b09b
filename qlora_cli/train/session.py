"""What one training process holds, and how it is put together: base, adapter, data, optimizer, progress."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from qlora_cli.data.examples import Examples
from qlora_cli.errors import UserError
from qlora_cli.evaluate.suite import Opened
from qlora_cli.model.adapter import attach_adapter, load_adapter
from qlora_cli.model.base import Base, Found, find_base, fingerprint, load_base
from qlora_cli.model.compiled import check_compiler, compile_layers
from qlora_cli.model.layer_kernels import check_kernels, in_words
from qlora_cli.model.skeleton import check_storage
from qlora_cli.model.start import changes_base
from qlora_cli.model.stored_base import Making, on_stored_base, start_folder
from qlora_cli.model.whole_folder import fault
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Training
from qlora_cli.train.allocator import keep_freed_memory
from qlora_cli.train.base import calibration_rows, make_base, recipe_of_base
from qlora_cli.train.best import Best, restored
from qlora_cli.train.checkpoint import Progress, load_checkpoint, newest_valid, step_of
from qlora_cli.train.facts import file_hashes, run_facts
from qlora_cli.train.feed import Feed, Place, StreamFeed
from qlora_cli.train.losses import Losses, no_losses
from qlora_cli.train.optimizers import build_optimizer
from qlora_cli.train.processes import build_accelerator, global_batch
from qlora_cli.train.reading import (
    encode_role,
    keep_apart,
    open_feed,
    refuse_beyond_context,
    refuse_long_stream,
    refuse_trained_on,
    say_layout,
)
from qlora_cli.train.recompute import Need, Planner, Recomputing, begin
from qlora_cli.train.report import Report
from qlora_cli.train.run import TRAINED_ON, Run, date_of, metrics_until, read_facts, write_facts
from qlora_cli.train.step import restore_random_state, seed_everything
from qlora_cli.train.suites import Reading, context_of, suites_in_training
from qlora_cli.train.writer import Writer


@dataclass
class Session:
    """Everything that one training process holds; `step`, `place`, `best` and `losses` are all that moves.

    place:  where the feed stands after `step` steps, where their number does not say it.
    packed: whether examples go through the model one behind the other, without padding.
    suites: those of evaluation.during_training. best: the best evaluation so far, by evaluation.best_metric.
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
    losses: Losses
    recomputing: Recomputing
    suites: Sequence[Opened] = ()
    step: int = 0
    place: Place | None = None
    best: Best | None = None
    writer: Writer = field(default_factory=Writer)  # of checkpoints
    clock: float = field(default_factory=time.perf_counter)
    trained_tokens: int = 0  # since `clock`

    @property
    def measured(self) -> str:
        """SHA-256 of the rows behind the figure that evaluation.best_metric names."""
        name = (self.recipe.evaluation.best_metric or "").partition(".")[0]
        digests = [self.eval_set.digest, *(suite.digest for suite in self.suites if suite.name == name)]
        return digests[-1]


def prepare(recipe: Recipe, run: Run, report: Report, resume: str, planner: Planner | None = None) -> Session:
    """Loads base, adapter, data and optimizer, and puts the run back to where it stopped.

    planner: asked how many layers are to be recomputed, once all that takes memory is there but the steps.
    """
    training = recipe.training
    accelerator = build_accelerator(recipe, run)
    check_machine(training, accelerator.device)
    on_base = recipe_of_base(recipe, run)
    found = find_base(on_base)
    check_storage(on_base, found)
    today = date_of(run)
    feed = open_feed(recipe, found, report, today, global_batch(recipe, accelerator))  # a bad row is told in seconds
    eval_set = encode_role(recipe, found, "eval", report, today)
    if not recipe.data.eval_fraction:
        refuse_trained_on(feed.examples.parts, eval_set)
    refuse_beyond_context(found, feed.examples, eval_set)
    reading = Reading(report, today, feed.examples.parts)
    suites = suites_in_training(recipe, context_of(recipe, found, reading, eval_set), eval_set)
    if isinstance(feed, StreamFeed):
        refuse_long_stream(found, feed)
    if on_base is recipe and changes_base(recipe.adapter):
        rows = calibration_rows(recipe, feed.examples.rows, report)
        making = Making(report.say, accelerator.device, run.base, rows)
        on_base = with_made_base(recipe, run, found, making, accelerator)
        found = find_base(on_base)
    base = load_base(on_base, accelerator.device, found)
    say_base(report, on_base, base)
    keep_freed_memory(base.device.type)
    base_digest = fingerprint(base.model)
    packed = keep_apart(recipe, base, report, max(feed.longest, int(eval_set.lengths.max(initial=0))))

    seed_everything(training.seed)  # before the adapter: its A matrices are random
    if on_base is recipe:
        model = attach_adapter(base, recipe.adapter)
    else:
        model = load_adapter(base, start_folder(base.folder, recipe.adapter), trainable=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.say(f"adapter  {trainable:,} trainable weights in fp32, compute in {str(base.compute_dtype)[6:]}")
    optimizer, note = build_optimizer(model, training, base.device)
    if note:
        report.say(f"note     {training.optimizer} is {note}")
    steps = feed.total_steps(training.epochs, training.max_steps)
    say_layout(report, recipe, feed, packed)
    losses = Losses(no_losses(), late=base.device.type == "cuda")
    recomputing = Recomputing(base.model, 0, 0)  # until everything is loaded
    parts = (base, model, optimizer, feed, eval_set, packed, steps, losses, recomputing, suites)
    session = Session(recipe, run, report, accelerator, *parts)
    if accelerator.is_main_process:
        say_if_held_out_changed(run, eval_set, report)
        facts = run_facts(recipe, base, base_digest, feed, today)
        write_facts(run, {**facts, "held_out": eval_set.digest, "held_out_files": file_hashes(eval_set.parts)})
    restore(session, resume)
    check_agreement(session, base_digest)
    seed_processes(session)
    start_training(session, planner)
    return session


def check_machine(training: Training, device: torch.device) -> None:
    """Refuses kernels and compilation that cannot be had on this machine, before anything is loaded."""
    check_kernels(training, device)
    if training.torch_compile:
        check_compiler(device)


def with_made_base(recipe: Recipe, run: Run, found: Found, making: Making, accelerator: Any) -> Recipe:
    """The recipe on the base that the adapter's start makes, which the main process stores for all."""
    from accelerate.utils import broadcast_object_list

    made = [make_base(recipe, run, found, making) if accelerator.is_main_process else None]
    return on_stored_base(recipe, broadcast_object_list(made)[0])


def say_base(report: Report, recipe: Recipe, base: Base) -> None:
    """How many bytes of the base lie in which type, what is odd about it on this device, and which layers are fused."""
    report.say(f"base     {recipe.model.name_or_path}  {base.summary}")
    if base.note:
        report.say(f"note     {base.note}")
    if kernels := in_words(base.model):
        report.say(f"kernels  {kernels}")


def say_if_held_out_changed(run: Run, eval_set: Examples, report: Report) -> None:
    """Tells where a continued run measures other rows than it did before."""
    if (read_facts(run) or {}).get("held_out", eval_set.digest) != eval_set.digest:
        report.say("note     the held-out rows have changed since this run began: compare no loss with earlier ones")


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
        session.step, session.place, session.losses.sums = progress.step, progress.place, progress.logged
        restore_best(session, newest, progress)
        restore_random_state(progress.random[accelerator.process_index])
        session.report.say(f"resume   {newest}, step {session.step} of {session.total_steps}")
    if accelerator.is_main_process:
        metrics_until(run, session.step)


def restore_best(session: Session, checkpoint: Path, progress: Progress) -> None:
    """Takes up the best evaluation so far, unless it is of another metric or of other rows, or its adapter is gone."""
    from accelerate.utils import broadcast_object_list

    if progress.best is None:
        return
    best, reason = Best(**progress.best), ""
    found: list[Any] = [None, reason]
    if session.accelerator.is_main_process:
        metric = session.recipe.evaluation.best_metric
        found = [*restored(session.run.best, checkpoint, best, metric, session.measured)]
    session.best, reason = broadcast_object_list(found)
    if reason:
        session.report.say(
            f"note     the best evaluation so far, of step {best.step}, {reason}; the next one is the best"
        )


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


def start_training(session: Session, planner: Planner | None) -> None:
    """Sets training mode, and how many layers are recomputed in backward; compiles them, where the recipe says so."""
    base, feed, training = session.base, session.feed, session.recipe.training
    session.model.train()
    base.model.config.use_cache = False
    filled = feed.capacity is not None
    need = Need(base, training.micro_batch_size, feed.capacity or feed.longest, session.packed or filled)
    session.recomputing = begin(training, need, planner, session.report.say)
    if session.accelerator.is_main_process:
        store_plan(session)
    if training.torch_compile:
        session.report.say(f"compile  {compile_layers(session.model)} layers, in their first steps")


def store_plan(session: Session) -> None:
    """Adds to run.json what this run is planned to come to, so that a report can hold it against what came.

    memory_bytes: the peak that the allocator holds, None where nobody planned it.
    """
    made = session.recomputing
    plan = {"steps": session.total_steps, "memory_bytes": made.planned_bytes}
    plan |= {"layers_recomputed": made.number, "layers": made.of}
    write_facts(session.run, {**(read_facts(session.run) or {}), "plan": plan})
