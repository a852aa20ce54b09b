"""The recipe that `qlora init` writes: the keys that most runs set, each with its meaning."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.errors import Exit, UserError
from qlora_cli.recipe.dump import to_yaml
from qlora_cli.recipe.load import check
from qlora_cli.recipe.located_yaml import Located, parse_yaml

MODEL = "Qwen/Qwen3-0.6B"
DATA = "data/train.jsonl"

STARTER = """\
# yaml-language-server: $schema=recipe.schema.json
# Your editor completes and checks the keys once `qlora schema > recipe.schema.json` has been run beside this file.
# Every key and its default: docs/recipe.md. Check: qlora validate {path}

model:
  name_or_path: {model}  # a hub id or a folder

quantization:
  data_type: nf4        # how the frozen base is stored; none: 16-bit LoRA
  double_quant: true    # the block scales are quantised too

adapter:
  r: 16                 # rank
  alpha: 32             # the update is scaled by alpha / r
  target_modules: all-linear

data:
  train:
    - path: {data}
      format: auto      # by the columns; or alpaca, messages, prompt_completion, question_answer, text
  # eval:               # held-out data, from another file or split
  #   - path: data/heldout.jsonl
  max_length: 2048      # tokens

training:
  epochs: 3             # or max_steps
  micro_batch_size: 4   # rows in one forward pass
  gradient_accumulation_steps: 4
  learning_rate: 2e-4
  lr_scheduler: cosine
  optimizer: paged_adamw_8bit

output_dir: {output_dir}
"""


def write_starter(path: Path, model: str | None = None, data: str | None = None) -> None:
    """Write a valid starter recipe to a new file. Raises UserError where the file exists or the names are no names."""
    text = _starter(path, MODEL if model is None else model, DATA if data is None else data)
    values, _ = parse_yaml(text, Located(str(path)))
    _, problems = check(values)
    if problems:
        option = {"model": "--model", "data": "--data"}[str(problems[0].path[0])]
        raise UserError(option, problems[0].what, problems[0].todo)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(path, "exists already", "Name another file, or delete this one first", Exit.REFUSED) from None
    except OSError as error:
        raise UserError(path, f"cannot be written: {error.strerror}", "Name a file in a folder that exists") from None


def _starter(path: Path, model: str, data: str) -> str:
    """The starter's text, with its names in quotes where YAML needs them."""
    values = {"model": model, "data": data, "output_dir": f"runs/{path.stem or 'default'}"}
    quoted = {name: to_yaml(value).strip() for name, value in values.items()}
    return STARTER.format(path=" ".join(str(path).split()), **quoted)
