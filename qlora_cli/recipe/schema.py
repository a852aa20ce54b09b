"""Every key of a recipe: its type, default, unit and effect. Built once, checked once, never written to.

`key(..., live=...)` names the values whose feature exists today. Any other value is refused as "not available yet";
the default and `auto` are always legal. docs/recipe.md and the JSON Schema are generated from this file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def key(default: Any, effect: str, *, unit: str = "", live: tuple[Any, ...] | None = None, **constraints: Any) -> Any:
    """A recipe key: `effect` and `unit` for the docs, `live` = the values available today (None: all of them)."""
    extra: dict[str, Any] = {"unit": unit}
    if live is not None:
        extra["live"] = list(live)
    if callable(default):
        return Field(default_factory=default, description=effect, json_schema_extra=extra, **constraints)
    return Field(default, description=effect, json_schema_extra=extra, **constraints)


class Section(BaseModel):
    """A frozen part of the recipe in which every unknown key is an error and nothing is coerced silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)


def _number(value: Any) -> Any:
    """A whole number is legal where a fraction is asked for: `alpha: 16`."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Real = Annotated[float, BeforeValidator(_number)]
"""A number; `16` is as good as `16.0`."""

Text = Annotated[str, Field(min_length=1)]
"""A string that is not empty: an empty name, path or pattern is always a slip."""

Names = list[Text] | Text
"""One name or pattern, or a list of them."""


class Model(Section):
    """Which base model, for which task."""

    name_or_path: str = key(..., "the base model: a hub id or a folder", min_length=1)
    revision: Text | None = key(None, "branch, tag or commit of a hub model")
    task: Literal["causal_lm", "seq2seq_lm", "sequence_classification", "question_answering"] = key(
        "causal_lm",
        "causal_lm: the next token; seq2seq_lm: a text from a text, by an encoder and a decoder; "
        "sequence_classification: a class, or a number, of a text or a pair; question_answering: a span of a context",
    )
    attn_implementation: Text = key(
        "auto",
        "attention kernel by its transformers name: sdpa, eager, flash_attention_2, ...; auto: transformers' choice",
    )
    trust_remote_code: bool = key(False, "run Python code that comes with the model: only for a source that you trust")
    labels: list[Text] = key(
        list,
        "names of the classes of sequence_classification in the order of their ids; rows hold a name or an id, names "
        "alone where one of them is a number",
    )
    num_labels: int | None = key(
        None,
        "classes of sequence_classification whose rows hold ids from 0, without names; 1: a number is predicted",
        ge=1,
    )
    added_tokens: list[Text] = key(
        list, "tokens to add to the tokenizer; their rows of the embedding, and of the head, are trained in full"
    )


class Quantization(Section):
    """How the frozen weights of the base are stored."""

    data_type: Literal["nf4", "fp4", "int4", "nf2", "int2", "int8", "none"] = key(
        "nf4", "storage of the linear weights; none: 16-bit LoRA"
    )
    double_quant: bool = key(True, "quantise the block scales too (QLoRA section 3): 0.37 bits per weight less")
    block_size: int = key(64, "weights that share one scale", unit="weights", ge=16, le=65536, multiple_of=4)
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = key(
        "auto",
        "dtype of activations and unquantised weights; auto: bfloat16 where the hardware is fast at it, else float32",
        live=("auto", "bfloat16", "float32"),
    )
    skip_modules: Names = key(lambda: ["lm_head"], "linear modules left unquantised, by name or pattern")
    overrides: dict[str, Literal["nf4", "fp4", "int4", "nf2", "int2", "none"]] = key(
        dict, "data type by pattern of whole module names, with *; the first that fits counts (mixed precision)"
    )
    embeddings: Literal["nf4", "fp4", "int4", "nf2", "int2", "none"] = key(
        "none", "storage of the input embedding, and of a head that is tied to it; its rows are whole blocks"
    )
    zero_point: bool = key(False, "int4, int2: levels from the least weight to the largest, by a zero point per block")
    clip: Literal["auto", "absmax", "percentile", "2sigma", "search"] = key(
        "auto", "int4, int2: weights beyond are clipped; auto: the range of least error per block"
    )
    outlier_threshold: Real = key(
        6.0, "int8: input features beyond this magnitude are multiplied in 16 bits (LLM.int8); 0: none", ge=0
    )


class LoftQ(Section):
    """LoftQ's start of the adapter."""

    iterations: int = key(5, "alternations of quantisation and SVD (LoftQ algorithm 1); the best one is kept", ge=1)
    order: Literal["quantize_first", "svd_first"] = key(
        "quantize_first", "quantize_first: LoftQ's; svd_first: begins with an SVD of the weight and ends quantising"
    )
    calibration: int = key(
        0,
        "training rows whose activations weigh the errors (QERA); 0: none. Needs the unquantised base in memory",
        unit="rows",
        ge=0,
    )


class Adapter(Section):
    """The LoRA adapter: the only weights that learn."""

    r: int = key(16, "rank of A and B", ge=1)
    alpha: Real = key(32.0, "the update is scaled by alpha / r", gt=0)
    dropout: Real = key(0.0, "probability that an input feature of the adapter is dropped in training", ge=0, lt=1)
    target_modules: Annotated[list[Text], Field(min_length=1)] | Text = key(
        "all-linear", "modules that get an adapter: all-linear (all but the head), names, or one regular expression"
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = key(
        None, "indices of the only layers that get an adapter; null: all", min_length=1
    )
    init: Literal["default", "gaussian", "loftq", "pissa", "olora"] = key(
        "default",
        "start of A and B: default Kaiming-uniform, B = 0; loftq: what quantisation lost; pissa, olora: the principal "
        "part of the weights. The last three change the base, which is stored in the run folder",
    )
    loftq: LoftQ = key(LoftQ, "settings of init: loftq")
    use_rslora: bool = key(False, "scale by alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = key(False, "train a magnitude per output feature too (DoRA)")
    modules_to_save: list[Text] = key(list, "modules trained in full beside the adapter, such as lm_head")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = key(dict, "rank for modules whose name matches a pattern")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0), BeforeValidator(_number)]] = key(
        dict, "alpha for modules whose name matches a pattern"
    )
    from_: Text | None = key(None, "continue this adapter folder instead of starting anew", alias="from")


class RowTemplate(Section):
    """Two Jinja strings over a row's columns, for rows of no known format."""

    prompt: str = key(..., "what is read: `Data: {{ mr }}\\nText:`")
    completion: str = key(..., "what is trained: ` {{ ref }}`; of sequence_classification the label", min_length=1)
    pair: Text | None = key(None, "second text of a pair (sequence_classification)")
    chat: bool = key(False, "put them into the chat template as a user's and an assistant's turn; false: verbatim")


class Source(Section):
    """One data source."""

    path: str = key(
        ...,
        "a file (json, jsonl, csv, tsv, txt, each also as gz or zst; parquet, arrow), a folder, a pattern or a hub id",
        min_length=1,
    )
    name: Text | None = key(None, "configuration of a hub data set")
    split: Text | None = key(
        None, "split of a hub data set or a folder; null: of the hub train for data.train, else test or validation"
    )
    format: Literal[
        "auto",
        "alpaca",
        "messages",
        "sharegpt",
        "prompt_completion",
        "input_output",
        "question_answer",
        "summarisation",
        "source_target",
        "classification",
        "squad",
        "text",
        "seed_tasks",
        "hh_rlhf",
        "oasst",
        "chip2",
        "self_instruct",
        "longform",
    ] = key("auto", "row format; auto: by the columns, and the choice is printed")
    template: RowTemplate | None = key(None, "Jinja strings for columns of no known format, instead of format")
    limit: int | None = key(None, "use only the first rows", unit="rows", ge=1)
    weight: Real = key(
        1.0,
        "passes over this source in one epoch: 2 takes each row twice, 0.5 another half each time; of streams a share",
        gt=0,
    )
    streaming: bool = key(
        False, "read and prepare rows while training, shuffled in blocks of 4,096; needs training.max_steps"
    )


class Data(Section):
    """What the model learns from, and what it is measured on."""

    train: list[Source] = key(..., "training data", min_length=1)
    eval: list[Source] = key(list, "held-out data")
    eval_fraction: Real = key(
        0.0, "share of the training rows held out, chosen by their content and training.seed", ge=0, lt=1
    )
    max_length: int = key(2048, "longest example", unit="tokens", ge=2)
    source_max_length: int | None = key(
        None, "longest prompt; with target_max_length, instead of max_length", unit="tokens", ge=1
    )
    target_max_length: int | None = key(None, "longest answer", unit="tokens", ge=1)
    doc_stride: int = key(
        128, "tokens that two windows of max_length share of a long context (question_answering)", unit="tokens", ge=0
    )
    packing: Literal["auto"] | bool = key(
        "auto",
        "true: examples that cannot see each other fill rows of max_length, and these are the rows of a step; "
        "auto: the same examples in each step as without, but without padding; false: padded batches",
    )
    chat_template: Text | None = key(None, "a .jinja file; null: the tokenizer's own chat template")
    chat_template_kwargs: dict[str, Any] = key(dict, "what the chat template is given besides: {enable_thinking: true}")
    train_on: Literal["completion", "last", "all"] = key(
        "completion", "which tokens are trained: every answer, the last answer, or everything"
    )
    on_bad_row: Literal["error", "skip"] = key(
        "error", "what happens to a row that cannot be read or trained on; skip: it is counted and listed"
    )
    on_long_row: Literal["error", "truncate", "skip"] = key("error", "what happens to a row beyond the length limits")
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = key(
        "auto", "processes that render and tokenise; auto: one per core, at most 16", unit="processes"
    )


class Training(Section):
    """The loop."""

    epochs: Real = key(3.0, "passes over the training data", gt=0)
    max_steps: int | None = key(
        None, "stop after so many optimizer steps; wins over epochs", unit="optimizer steps", ge=1
    )
    micro_batch_size: int = key(4, "rows in one forward pass of one device", unit="rows", ge=1)
    gradient_accumulation_steps: int = key(4, "forward passes per optimizer step", ge=1)
    learning_rate: Real = key(2e-4, "peak learning rate", gt=0)
    loraplus_ratio: Real = key(1.0, "learning rate of B over that of A (LoRA+)", gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = key("cosine", "shape of the learning rate after warmup")
    min_lr_ratio: Real = key(0.0, "floor of the schedule, as a share of learning_rate", ge=0, le=1)
    warmup_ratio: Real = key(0.03, "share of the steps with a rising learning rate", ge=0, le=1)
    warmup_steps: int | None = key(
        None, "steps with a rising learning rate; wins over warmup_ratio", unit="optimizer steps", ge=0
    )
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw"] = key(
        "paged_adamw_8bit",
        "paged and 8-bit ones are bitsandbytes', adamw is torch's fused AdamW, and on a CPU the paged ones are too",
    )
    adam_beta1: Real = key(0.9, "decay of the mean of the gradients", ge=0, lt=1)
    adam_beta2: Real = key(0.999, "decay of the mean of their squares", ge=0, lt=1)
    adam_epsilon: Real = key(1e-8, "added to the denominator", gt=0)
    weight_decay: Real = key(0.0, "decoupled weight decay", ge=0)
    max_grad_norm: Real = key(0.3, "clip the gradient's global norm to this; 0: no clipping", ge=0)
    gradient_checkpointing: Literal["auto"] | bool = key(
        "auto",
        "recompute activations in backward instead of keeping them; auto: of as few layers as free memory asks for",
    )
    memory: Literal["auto", "fast", "offload", "lean"] = key(
        "auto",
        "fast: weights stay dequantised where they fit; on a GPU offload: the embedding and what recomputed layers are "
        "given lie in host memory; lean: the frozen layers too, two at a time on the GPU",
    )
    layer_kernels: Literal["auto", "liger", "torch"] = key(
        "auto",
        "what computes norms, gated MLPs and rotary embeddings; liger: liger-kernel, on a GPU; torch: the model's own "
        "code; auto: liger where it is there and nothing is compiled, else functions of ours that keep less memory",
    )
    torch_compile: bool = key(
        False,
        "compile what lies between the linear layers of each layer, for steps of training; the first one takes longer",
    )
    neftune_noise_alpha: Real | None = key(None, "noise on the embeddings (NEFTune)", live=(None,), gt=0)
    seed: int = key(42, "seed of the adapter's start, the order of rows and dropout", ge=0, lt=2**32)
    on_nonfinite: Literal["stop", "skip"] = key(
        "stop", "what happens at a loss or gradient that is not finite", live=("stop",)
    )
    logging_steps: int = key(10, "a line of metrics every so many steps", unit="optimizer steps", ge=1)
    eval_steps: int = key(200, "held-out loss every so many steps, and at the end", unit="optimizer steps", ge=1)
    save_steps: int = key(200, "checkpoint every so many steps", unit="optimizer steps", ge=1)
    save_total_limit: int = key(3, "checkpoints kept", ge=1)
    deterministic: bool = key(False, "deterministic kernels only: slower, repeatable on a GPU")


class Suite(Section):
    """One measurement, written to eval/NAME.json."""

    suite: Literal["loss", "choice", "generate", "classify", "squad", "lm_eval"] = key(..., "what is measured")
    name: Text | None = key(None, "its name in tables and files; null: the suite's")
    data: list[Source] = key(list, "its rows; none: the held-out rows of the recipe")
    metrics: list[Text] = key(list, "generate, classify: metrics by name; none: those of the suite and the task")
    pattern: Text | None = key(None, "generate: the regular expression of the metric regex")
    delimiter: str | None = key(None, "choice: text between the question and a choice; null: by the kind of the file")
    shots: int = key(0, "choice: solved examples before each question", unit="rows", ge=0)
    shots_from: Text | None = key(None, "choice: file with the solved examples; null: other rows of the same file")
    tasks: list[Text] = key(list, "lm_eval: names of its tasks, or paths of their YAML files")
    limit: int | None = key(
        None, "only the first rows, of all its sources together; lm_eval: of each task", unit="rows", ge=1
    )


class Evaluation(Section):
    """How held-out data is measured."""

    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = key(
        "auto",
        "rows of the longest length in one forward pass, of shorter ones more; auto: training.micro_batch_size",
        unit="rows",
    )
    max_new_tokens: int = key(128, "longest generated answer", unit="tokens", ge=1)
    num_beams: int = key(1, "beams of generated answers; 1: greedy", ge=1)
    length_penalty: Real = key(
        1.0, "beams: their score is divided by length to this power; above 1 favours long answers"
    )
    no_repeat_ngram_size: int = key(
        0, "so many generated tokens never follow each other twice; 0: no limit", unit="tokens", ge=0
    )
    max_answer_length: int = key(30, "longest answer span of question_answering", unit="tokens", ge=1)
    bootstrap_resamples: int = key(1000, "resamples of the rows behind each 95% interval; 0: no intervals", ge=0)
    suites: list[Suite] = key(list, "what `qlora eval` measures; none: what fits the task, on the held-out rows")
    during_training: list[Text] = key(list, "names of suites that are run every training.eval_steps too")
    best_metric: Text | None = key(
        None, "figure by which the best adapter is kept and training stops early, as NAME.FIGURE: loss.loss"
    )
    early_stopping_patience: int | None = key(
        None, "stop after so many evaluations without a better best_metric", unit="evaluations", ge=1
    )


class Recipe(Section):
    """One finetuning run."""

    model: Model = key(..., "the base model")
    quantization: Quantization = key(Quantization, "how the base is stored")
    adapter: Adapter = key(Adapter, "what learns")
    data: Data = key(..., "what it learns from")
    training: Training = key(Training, "how it learns")
    evaluation: Evaluation = key(Evaluation, "how it is measured")
    output_dir: str = key("runs/default", "the run folder", min_length=1)
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = key(list, "trackers, through accelerate")
