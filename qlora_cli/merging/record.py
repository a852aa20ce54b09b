"""What is written of a merge into its folder: merge.json and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora_cli import __version__
from qlora_cli.evaluation import digest_of
from qlora_cli.merge.certificate import Certificate
from qlora_cli.merge.merge import How, Merged
from qlora_cli.merging.asking import Unmerged
from qlora_cli.merging.trained import Trained
from qlora_cli.model.heads import TASKS as TASKS_OF_MODELS
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.source import read_config
from qlora_cli.model.whole_folder import replace_text
from qlora_cli.quant.data_types import QUANT_METHOD
from qlora_cli.train.card import MERGED as RECORD
from qlora_cli.train.card import refresh, short, with_place

CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: {pipeline}
tags: [qlora]
---

# {base}, finetuned

Merged by qlora {version}{quantized} of the base and the adapter of a run.

```python
{needs}from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


PIPELINES = {
    "causal_lm": "text-generation",
    "seq2seq_lm": "text2text-generation",
    "sequence_classification": "text-classification",
    "question_answering": "question-answering",
}
"""The hub's names of the tasks."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Data types that a merged model can be written in."""


def record(
    trained: Trained, merged: Merged, how: How, certificate: Certificate | None, unmerged: Unmerged | None
) -> dict[str, Any]:
    """merge.json: what was merged onto what, and how near it is; a merge that was not verified says so."""
    return {
        "out": str(merged.folder),
        "task": trained.recipe.model.task,
        "adapter": str(trained.run.adapter),
        "adapter_digest": digest_of(trained.run.adapter),
        "base": how.onto,
        "base_model": trained.recipe.model.name_or_path,
        "same_base": unmerged.same_base if unmerged else None,
        "dtype": str(how.dtype).removeprefix("torch."),
        "bytes": merged.num_bytes,
        "seconds": round(merged.seconds, 3),
        "quantize_seconds": round(merged.quantize_seconds, 3),
        "untied": list(merged.untied),
        "verified": certificate is not None,
        "certificate": certificate.to_json() if certificate else None,
    }


def write_record(folder: Path, trained: Trained, result: dict[str, Any]) -> None:
    """merge.json and the model card of a merged folder."""
    task, kind = trained.recipe.model.task, result["dtype"]
    packed = method_of(read_config(folder)) == QUANT_METHOD
    card = CARD.format(
        base=short(trained.recipe.model.name_or_path),
        pipeline=PIPELINES[task],
        version=__version__,
        quantized="" if kind in DTYPES else f" and quantised to {kind}",
        needs="import qlora_cli.quant.plugin  # teaches transformers the packed layers\n" if packed else "",
        auto_class=TASKS_OF_MODELS[task].auto_class,
    )
    replace_text(folder / "README.md", with_place(card))
    refresh(folder, trained.run, trained.recipe, result)
    replace_text(folder / RECORD, json.dumps(result, indent=1))
