"""What a model is made for: the class that loads it, what its config says of the task, and the head that it brings."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.errors import UserError
from qlora_cli.model.names import key_mapping, live_names
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.safetensors_stream import read_checkpoint
from qlora_cli.model.source import read_config
from qlora_cli.recipe.schema import Model, Quantization


@dataclass(frozen=True)
class ModelTask:
    """auto_class: transformers' class that loads it; peft_type: PEFT's name of it; has_head: whether a head is new."""

    auto_class: str
    peft_type: str
    has_head: bool


TASKS: dict[str, ModelTask] = {
    "causal_lm": ModelTask("AutoModelForCausalLM", "CAUSAL_LM", has_head=False),
    "seq2seq_lm": ModelTask("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", has_head=False),
    "sequence_classification": ModelTask("AutoModelForSequenceClassification", "SEQ_CLS", has_head=True),
    "question_answering": ModelTask("AutoModelForQuestionAnswering", "QUESTION_ANS", has_head=True),
}
"""The tasks of a recipe, by model.task."""

TASK_KEYS = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Keys of config.json that the task decides, beside the architecture."""


@dataclass(frozen=True)
class Head:
    """What a task adds to the bare model: trained in full in fp32, never quantised. Empty for language models.

    modules: full names of its modules, a pooler inside the bare model among them where the checkpoint has none.
    new: of its parameters those that the checkpoint lacks; they start at values drawn from training.seed.
    renamed: names.key_mapping of the model, which loads with it.
    """

    modules: tuple[str, ...] = ()
    new: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        """Whether a module or a tensor of that full name belongs to it."""
        return isinstance(name, str) and any(f"{name}.".startswith(f"{module}.") for module in self.modules)

    @property
    def new_modules(self) -> list[str]:
        """Modules with a tensor that is new."""
        return [module for module in self.modules if any(name.startswith(f"{module}.") for name in self.new)]

    def spared(self, quantization: Quantization) -> Quantization:
        """The quantization with the head's modules among those that stay as they are."""
        skipped = quantization.skip_modules
        listed = [skipped] if isinstance(skipped, str) else list(skipped)
        return (
            quantization.model_copy(update={"skip_modules": [*listed, *self.modules]}) if self.modules else quantization
        )


NO_HEAD = Head()
"""That of a language model."""


def auto_class(task: str) -> Any:
    """The transformers class that loads a model for a task."""
    import transformers

    return getattr(transformers, TASKS[task].auto_class)


def can(config: Any, task: str) -> bool:
    """Whether transformers, or the model's own code, has a class of this architecture for a task.

    An encoder is no causal language model although transformers has a class: it would see the tokens that it predicts.
    """
    auto = auto_class(task)
    if TASKS[task].auto_class in (getattr(config, "auto_map", None) or {}):
        return True
    if task == "causal_lm" and (getattr(config, "is_encoder_decoder", False) or is_encoder(config)):
        return False
    return type(config) in auto._model_mapping


def is_encoder(config: Any) -> bool:
    """Whether a model reads in both directions: BERT and its kin, unless their config makes them decoders."""
    from transformers import AutoModelForMaskedLM

    decodes = any(getattr(config, key, False) for key in ("is_decoder", "is_encoder_decoder", "causal"))
    return type(config) in AutoModelForMaskedLM._model_mapping and not decodes


def needs_packed(config: Any, task: str, quantization: Quantization) -> bool:
    """Whether bitsandbytes would leave linear layers of an encoder-decoder as they are, which packed layers need not.

    transformers 5.23 quantises none of `_keep_in_fp32_modules` with it: of T5 a third of the weights.
    """
    if quantization.data_type in ("int8", "none") or not getattr(config, "is_encoder_decoder", False):
        return False
    found = auto_class(task)._model_mapping.get(type(config), None)
    return any(getattr(one, "_keep_in_fp32_modules", None) for one in (found if isinstance(found, tuple) else (found,)))


def for_task(config: Any, model: Model, folder: Path) -> Any:
    """The config with what the task says of labels, changed in place.

    Raises UserError for a task that the architecture cannot do, and for classes that the checkpoint names otherwise.
    """
    if not can(config, model.task):
        able = [task for task in TASKS if can(config, task)]
        kind = "an encoder" if is_encoder(config) else "a decoder"
        kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else kind
        what = f"{folder} is {kind} ({config.model_type}), which cannot do {model.task}"
        todo = f"choose from {', '.join(able)}" if able else "name another model"
        raise UserError("model.task", what, f"{todo}, or name another model" if able else todo)
    if model.task == "sequence_classification":
        refuse_other_names(config, model.labels, folder)
        number = len(model.labels) or model.num_labels
        if number is not None:
            config.num_labels = number
        if model.labels:
            config.id2label = dict(enumerate(model.labels))
            config.label2id = {label: index for index, label in enumerate(model.labels)}
        config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
    elif model.task == "question_answering":
        config.num_labels = 2  # the first and the last token of a span
    return config


def refuse_other_names(config: Any, labels: list[str], folder: Path) -> None:
    """Raises UserError where the checkpoint gives as many classes other names, or the same in another order.

    A head of its own would then answer with the wrong class. LABEL_0, LABEL_1 are transformers' names for none.
    """
    known = config.id2label or {}
    named = [str(known.get(index)) for index in range(len(known))]
    if len(named) != len(labels) or named in (labels, [f"LABEL_{index}" for index in range(len(named))]):
        return
    what = f"{labels}, and the checkpoint's classes are {named} in the order of their ids ({folder / 'config.json'})"
    how = "in another order" if set(named) == set(labels) else "other names"
    todo = f"set model.labels to {named}, and let a template write these names where rows hold others or other ids"
    raise UserError("model.labels", f"{how}: {what}", f"{todo}; for a new head delete id2label from a copy of the base")


def set_padding(config: Any, tokenizer: Any, task: str) -> None:
    """Tells a decoder that classifies which token is padding, in place: it reads the answer off the last other token.

    That is the tokenizer's pad token, or its eos where it has none. Encoders keep what they were trained with.
    Raises UserError where neither the tokenizer nor the config names one.
    """
    if task != "sequence_classification" or not can(config, "causal_lm"):
        return
    text = config.get_text_config()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is not None and pad < text.vocab_size:  # one beyond is refused with the whole vocabulary
        text.pad_token_id = pad
    if pad is None and text.pad_token_id is None:
        what = "neither a pad_token nor an eos_token, so a decoder cannot tell where a text of a batch ends"
        raise UserError("model.name_or_path", f"the tokenizer has {what}", "set pad_token in tokenizer_config.json")


def on_meta(config: Any, model: Model, folder: Path) -> Any:
    """The model of a config on the meta device: names and shapes without memory.

    Raises UserError where transformers cannot build it.
    """
    auto = auto_class(model.task)
    try:
        with torch.device("meta"):
            return auto.from_config(copy.deepcopy(config), trust_remote_code=model.trust_remote_code)
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise UserError(folder, f"transformers cannot build this model: {cause}", "check its config.json") from error


def find_head(folder: Path, config: Any, model: Model) -> Head:
    """The head that the model will have, from the names in its checkpoint; without weights there, all of it is new.

    Raises UserError for a head of another shape in the checkpoint, and a new one on a base that is stored quantised.
    """
    if not TASKS[model.task].has_head:
        return NO_HEAD
    skeleton = on_meta(config, model, folder)
    there = any(folder.glob("*.safetensors"))
    shapes = {name: entry.shape for name, entry in read_checkpoint(folder).entries().items()} if there else {}
    stored = {live: shapes[name] for name, live in live_names(skeleton, shapes).items()}
    head = head_of(skeleton, stored)
    if head.new and method_of(read_config(folder)) is not None:
        what = f"the base is stored quantised, and without {sorted(head.new)[0]}, which {model.task} needs"
        raise UserError(folder, what, "start from the full-precision checkpoint")
    refuse_other_shape(skeleton, head, stored, folder)
    return head


def head_of(model: Any, stored: Collection[str]) -> Head:
    """The head of a live model, or of one on the meta device. stored: names in it that the checkpoint has."""
    bare = getattr(model, model.base_model_prefix, None)
    modules = [
        name
        for name, child in model.named_children()
        if next(child.parameters(), None) is not None and not _is_bare(model, child, bare)
    ]
    if not any("pooler" in name.split(".") for name in stored):
        inside = (name for name, _ in model.named_parameters() if ".pooler." in name)
        poolers = {f"{name.rpartition('.pooler.')[0]}.pooler" for name in inside}
        modules += sorted(name for name in poolers if name not in Head(tuple(modules)))
    head = Head(tuple(modules))
    tensors = frozenset(name for name, _parameter in model.named_parameters() if name in head)
    return Head(head.modules, tensors - set(stored), key_mapping(model))


def _is_bare(model: Any, child: nn.Module, bare: Any) -> bool:
    """Whether a child is of the bare model, which some have in parts alone (T5ForQuestionAnswering)."""
    from transformers import PreTrainedModel

    return child is bare if bare is not None else isinstance(child, PreTrainedModel | nn.Embedding)


def refuse_other_shape(model: Any, head: Head, stored: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Refuses a checkpoint whose head has another number of labels than the recipe, or is of another shape."""
    for name, parameter in model.named_parameters():
        found, wanted = stored.get(name), tuple(parameter.shape)
        if name not in head or found is None or found == wanted:
            continue
        what = f"it is {list(found)} in the checkpoint, and the model has {list(wanted)}"
        todo = "check that config.json belongs to the checkpoint, or name a base without a head"
        if found[1:] == wanted[1:]:
            what = f"the checkpoint has a head for {found[0]} labels, the recipe asks for {wanted[0]}"
            todo = f"give the recipe {found[0]} labels to train this head on, or name a base without a head"
        raise UserError(f"{folder}: {name}", what, todo)


@torch.no_grad()
def start_head(model: Any, head: Head, seed: int) -> None:
    """Puts the head into fp32, and gives its new tensors the start that the model's class gives them, from the seed.

    Drawn on the CPU from a generator of its own: the same at every load and on every device.
    """
    for module_name in head.modules:
        module = model.get_submodule(module_name).float()
        fresh = copy.deepcopy(module).cpu()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            fresh.apply(model._init_weights)
        values = dict(fresh.named_parameters())
        for name, parameter in module.named_parameters():
            if f"{module_name}.{name}" in head.new:
                parameter.copy_(values[name])
