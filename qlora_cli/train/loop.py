"""Training from the recipe to the adapter folder, on one screen."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.data.order import Window, micro_batches, share_of
from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.loss import held_out_loss
from qlora_cli.evaluate.measuring import Subject, given
from qlora_cli.evaluate.measuring import figures as figures_of
from qlora_cli.model.base import readable_bytes
from qlora_cli.model.placement import can_stream
from qlora_cli.recipe import Recipe
from qlora_cli.tasks.causal_lm import collate_packed
from qlora_cli.tasks.table import AnyBatch, batches
from qlora_cli.train.best import Best, judged, keep_best, prune_best, publish_best
from qlora_cli.train.card import refresh
from qlora_cli.train.checkpoint import Progress, snapshot, write_checkpoint
from qlora_cli.train.optimizers import never_waiting, set_learning_rate
from qlora_cli.train.publish import owner_of, publish_adapter
from qlora_cli.train.recompute import Planner, correct, forget_step, give_back_memory, grow, ran_out, start_measuring
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, append_metrics
from qlora_cli.train.schedules import lr_factor
from qlora_cli.train.session import Session, prepare
from qlora_cli.train.signals import Interrupted, asked_to_stop
from qlora_cli.train.step import accumulate, clip, deterministic_kernels, random_state, sum_over_processes


class Manner(NamedTuple):
    """How a run goes. pause_at: stop with a checkpoint after so many steps; the schedule stays that of the whole run.

    resume: auto, never or a checkpoint. planner: who says how many layers to recompute, where the recipe does not.
    """

    pause_at: int | None = None
    resume: str = "auto"
    planner: Planner | None = None


def train(recipe: Recipe, run: Run, report: Report, manner: Manner) -> Path:
    """Finetunes and returns the adapter folder; continues where `run` has a valid checkpoint.

    Raises UserError for what the user can mend and Interrupted after a signal, in both cases with progress saved.
    """
    with deterministic_kernels(recipe.training.deterministic):
        session = prepare(recipe, run, report, manner.resume, manner.planner)
        last_step = min(session.total_steps, manner.pause_at or session.total_steps)
        report.begin(session.step, session.total_steps)
        try:
            finished = take_steps(session, last_step)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise out_of_memory(session, error) from error
        finally:
            session.feed.close()
            report.end()
            if session.writer.failure is not None:
                report.say(f"warning  the last checkpoint could not be written: {session.writer.failure}")
        if finished and session.accelerator.is_main_process:
            publish_result(session)
        session.accelerator.wait_for_everyone()
        session.accelerator.end_training()
    return run.adapter


def take_steps(session: Session, last_step: int) -> bool:
    """Optimizer steps up to `last_step`, with what falls due between them: metrics, evaluations, checkpoints.

    Returns whether the run is finished: at its last step, or before it where evaluations gain nothing any more.
    """
    training = session.recipe.training
    if is_stopped_early(session):  # before it was killed
        return True
    with asked_to_stop(session.report.say) as stop_code, session.writer:
        for window, place in session.feed.windows(last_step, session.step, session.place):
            code = take_step(session, window, stop_code)
            session.place = place
            session.writer.check()
            last = session.step == session.total_steps
            if last or session.step % training.logging_steps == 0:
                log_metrics(session, window)
            if last or session.step % training.eval_steps == 0:
                evaluate_with_room(session)
            stopped = is_stopped_early(session)
            if session.step == last_step or code or stopped or session.step % training.save_steps == 0:
                save(session)
            if code:
                session.writer.wait()
                session.report.say(f"stopped  after step {session.step}, which is saved; the same command goes on")
                raise Interrupted(code)
            if stopped:
                break
    return session.step == session.total_steps or is_stopped_early(session)


def is_stopped_early(session: Session) -> bool:
    """Whether so many evaluations were no better than the best one that the run ends."""
    patience, best = session.recipe.evaluation.early_stopping_patience, session.best
    return patience is not None and best is not None and best.misses >= patience


def publish_result(session: Session) -> None:
    """The adapter folder: of the best evaluation where the recipe names a metric for it, else of the last step."""
    run, best = session.run, session.best
    if best is None:
        publish_adapter(run.adapter, session.model, session.base, session.recipe, session.step)
    else:
        early = f", stopped early at step {session.step}" if session.step < session.total_steps else ""
        session.report.say(f"best     {best.metric} {best.value:.4g} at step {best.step}{early}")
        publish_best(run.adapter, run.best, best)
    refresh(run.adapter, run, session.recipe)


def out_of_memory(session: Session, error: RuntimeError) -> UserError:
    """What did not fit, and which keys make it smaller."""
    longest = session.feed.longest
    peak = readable_bytes(memory_bytes(session.base.device))
    all_recomputed = session.recomputing.number >= session.recomputing.of
    more = "" if all_recomputed else ", or set training.gradient_checkpointing: true"
    if session.base.device.type == "cuda" and session.recipe.training.memory in ("auto", "fast"):
        more += f", or set training.memory: offload{' or lean' if can_stream(session.recipe) else ''}"
    return UserError(
        f"step {session.step + 1}",
        f"out of memory at a peak of {peak} with {session.recomputing.words}, the longest row has {longest:,} tokens: "
        f"{(str(error).splitlines() or ['no more is told'])[0]}",
        f"lower training.micro_batch_size or data.max_length{more}; "
        "`qlora plan` tells what fits; the last checkpoint is untouched",
        Exit.FAILED,
    )


def take_step(session: Session, window: Window[Example], stop_code: Callable[[], Exit | None]) -> Exit | None:
    """One optimizer step over the window's rows; returns the signal that any process received before its end."""
    training = session.recipe.training
    num_tokens = sum(row.num_trained for row in window.rows)
    set_learning_rate(session.optimizer, training.learning_rate * lr_factor(training, window.step, session.total_steps))
    loss = gradient_of(session, window, num_tokens)
    parameters = [p for group in session.optimizer.param_groups for p in group["params"]]
    loss, code = sum_over_processes(session.accelerator, parameters, loss, stop_code())
    session.losses.add(window, num_tokens, loss, clip(parameters, training.max_grad_norm))
    with never_waiting():
        session.optimizer.step()
    session.optimizer.zero_grad()
    session.step = window.step + 1
    session.trained_tokens += num_tokens
    session.report.advance(session.step)
    return code


def gradient_of(session: Session, window: Window[Example], num_tokens: int) -> Tensor:
    """Adds the gradient of this process's share of the window, and returns its share of the loss.

    Where memory runs out, less is kept and the window begins anew, from the same state of the generators: bit for bit
    what it had been with room enough. Raises that error where nothing less is to be had; of several processes none can
    go back alone, since the others wait for its gradient.
    """
    recomputing = session.recomputing
    alone = session.accelerator.num_processes == 1
    state, again = random_state() if alone and recomputing.has_more else {}, False
    before = start_measuring(session.base.device) if recomputing.planner is not None else 0
    while True:
        try:
            loss = accumulate(session.base, session.model, own_batches(session, window), num_tokens)
            break
        except RuntimeError as error:
            if not (ran_out(error) and alone and recomputing.has_more):
                raise
        tried = recomputing.words  # behind the handler, whose traceback holds on to the tensors of the pass
        forget_step(session.optimizer, state)
        again = grow(recomputing, again)
        session.report.say(
            f"memory   ran out in step {window.step + 1} with {tried}: it is repeated with {recomputing.words}"
        )
    if recomputing.planner is not None:
        taken = torch.cuda.max_memory_allocated(session.base.device) - before
        correct(recomputing, own_batches(session, window), taken, session.report.say)
    return loss


def own_batches(session: Session, window: Window[Example]) -> Iterator[AnyBatch]:
    """This process's forward passes of the window; how it is cut does not change the gradient."""
    accelerator, device = session.accelerator, session.base.device
    size = session.recipe.training.micro_batch_size
    by_length = sorted(window.units, key=lambda unit: sum(row.num_tokens for row in unit))
    mine = share_of(by_length, accelerator.process_index, accelerator.num_processes)
    if session.feed.capacity is not None:
        for units in micro_batches(mine, size):
            yield collate_packed(list(chain.from_iterable(units)), device)
    else:
        rows = list(chain.from_iterable(mine))
        lengths = [row.num_tokens for row in rows]
        yield from batches(rows, lengths, size, session.feed.longest, session.packed, session.base)


def log_metrics(session: Session, window: Window[Example]) -> None:
    """One line of metrics over the steps since the last one: to the file, the display and the trackers."""
    session.losses.read()
    training, logged = session.recipe.training, session.losses.sums
    seconds = time.perf_counter() - session.clock
    values = {
        "step": session.step,
        "epoch": session.feed.epochs_done(session.step),
        "loss": logged["loss"] / logged["tokens"],
        "learning_rate": training.learning_rate * lr_factor(training, window.step, session.total_steps),
        "grad_norm": logged["grad_norm"],
        "trained_tokens_per_s": session.trained_tokens / seconds,
        "memory_bytes": memory_bytes(session.base.device),
    }
    session.losses.start_anew()
    session.clock, session.trained_tokens = time.perf_counter(), 0
    tell(session, values)


def evaluate_with_room(session: Session) -> None:
    """An evaluation, begun anew without weights that are kept dequantised where these leave it too little memory."""
    try:
        evaluate(session)
        return
    except RuntimeError as error:
        if not (ran_out(error) and session.recomputing.keeps):
            raise
    session.report.say("memory   ran out in an evaluation: from here on no weight is kept dequantised")
    grow(session.recomputing, False)
    give_back_memory()
    evaluate(session)


def evaluate(session: Session) -> None:
    """Held-out loss of the adapter as it stands, the figures of the suites, and which evaluation is the best so far."""
    session.losses.read()
    recipe, started = session.recipe, time.perf_counter()
    figures: dict[str, Any] = {}
    if session.eval_set.rows:
        size = recipe.evaluation.batch_size
        size = recipe.training.micro_batch_size if size == "auto" else size
        result = held_out_loss(session.base, session.model, session.eval_set.rows, size, session.packed)
        figures |= {f"eval_{name}": value for name, value in result.figures(recipe.model.task).items()}
        figures["eval_rows"] = result.num_rows
    subject = Subject("adapter", session.base, session.model, "")
    for suite in session.suites:
        answers = dict(given(suite, subject, range(suite.num_rows)))
        found = figures_of(suite, [answers[row] for row in range(suite.num_rows)])
        figures |= {f"{suite.name}.{name}": value for name, value in found.items()}
    if not figures:
        return
    tell(session, {"step": session.step, **figures})
    if recipe.evaluation.best_metric is not None:
        session.best = agreed(session, judged_here(session, recipe.evaluation.best_metric, figures))
        if session.best.step == session.step and session.accelerator.is_main_process:
            session.writer.wait()  # it deletes all but the best adapter that its checkpoint names
            keep_best(session.run.best, session.model, session.base, recipe, session.step)
    session.clock += time.perf_counter() - started  # an evaluation is no training time


def judged_here(session: Session, metric: str, figures: Mapping[str, float]) -> Best:
    """The best evaluation by a metric, this one among them."""
    measures = {f"{suite.name}.{name}": one for suite in session.suites for name, one in suite.measures.items()}
    this = Best(metric, float(figures[metric]), session.step, measured=session.measured)
    lower = measures[metric].lower_is_better if metric in measures else metric in ("eval_loss", "eval_perplexity")
    return judged(this, session.best, lower)


def agreed(session: Session, best: Best) -> Best:
    """The main process's judgement, on all of them: so that all stop after the same step."""
    from accelerate.utils import broadcast_object_list

    return Best(**broadcast_object_list([best.to_json()])[0])


def tell(session: Session, values: dict[str, Any]) -> None:
    """Metrics to the display, metrics.jsonl and the trackers, from the main process alone."""
    if session.accelerator.is_main_process:
        session.report.metrics(values)
        append_metrics(session.run, values)
        session.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=session.step)


def save(session: Session) -> None:
    """Begins a checkpoint of all processes, which the main one writes while training goes on.

    One at a time: the one before is waited for. What fails is raised at a later step, or at the run's end. With several
    processes all wait for it: one that ends first has its launcher kill the one that still writes.
    """
    from accelerate.utils import gather_object

    session.losses.read()
    random = gather_object([random_state()])
    if not session.accelerator.is_main_process:
        session.accelerator.wait_for_everyone()
        return
    session.writer.wait()
    run, best = session.run, session.best
    progress = Progress(session.step, random, session.losses.sums, session.place, best.to_json() if best else None)
    held = snapshot(session.model, session.optimizer, progress, owner_of(session.recipe, session.base))
    keep = session.recipe.training.save_total_limit

    def write() -> None:
        write_checkpoint(run.checkpoints, held, keep)
        prune_best(run.best, best)

    session.writer.start(write)
    if session.accelerator.num_processes > 1:
        session.writer.wait()
        session.accelerator.wait_for_everyone()


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the GPU, or the peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
