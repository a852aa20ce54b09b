"""TRL's SFTTrainer, at the case's settings or at its own defaults.

At its defaults are SFTConfig (recomputation, bfloat16, its optimizer and schedule, the order of rows over real ones)
and the adapter's dropout of TRL's command line, 0.05. What the case fixes for everyone stays: NF4 with double
quantisation, r 16, alpha 32 on all linear layers, rows per step, longest row, learning rate and seed. Its rows come
tokenised with their labels, which it leaves as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import Case
from channel import Channel
from contestant_naive import adapter, load
from datasets import Dataset
from trainer import obey
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]


def matched(case: Case, channel: Channel) -> None:
    """Everything as the others have it."""
    settings = {
        "gradient_checkpointing": case.recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.3,
        "train_sampling_strategy": "sequential",
        "bf16": case.compute == "bfloat16",
    }
    train(case, channel, load(case), settings, adapter())


def defaults(case: Case, channel: Channel) -> None:
    """As SFTConfig and TRL's command line have it; drawn rows, which are all alike, in their order for the gate."""
    settings = {} if case.data else {"train_sampling_strategy": "sequential"}
    train(case, channel, load(case), settings, adapter(lora_dropout=0.05))


def train(case: Case, channel: Channel, model: Any, settings: dict[str, Any], peft_config: Any) -> None:
    """The real `SFTTrainer.train()`."""
    channel.weights_loaded()
    rows = Dataset.from_list(case.read_rows())
    channel.facts["steps_of_pass"] = [-(-len(rows) // case.rows_per_step)] * case.total_steps
    length = {"num_train_epochs": case.needed_steps} if case.data else {"max_steps": case.needed_steps}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(Path(case.folder) / "trl"),
            per_device_train_batch_size=case.rows_per_step,
            max_length=case.length,
            learning_rate=case.learning_rate,
            seed=case.seed,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            **length,
            **settings,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(str(case.model)),
        peft_config=peft_config,
    )
    trainer.add_callback(obey(trainer, channel))
    trainer.train()
