"""axolotl, from its public interface: a YAML file, `axolotl train`, and a plugin of its own kind for our callback.

Never run here: it was written from axolotl's documentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
from cases import Case
from channel import Channel
from trainer import obey

CHANNELS: list[Channel] = []
"""The one of this process: axolotl makes the plugin from its name."""


class Waiting(BasePlugin):
    """Puts the runner between the steps of the trainer that axolotl builds."""

    def post_model_load(self, cfg: Any, model: Any) -> None:
        CHANNELS[0].weights_loaded()

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [obey(trainer, CHANNELS[0])]


def run(case: Case, channel: Channel) -> None:
    """Matched settings. Rows are tokenised: a data set of no type is left as it is."""
    from axolotl.cli.train import do_cli  # type: ignore[import-not-found]

    CHANNELS.append(channel)
    file = Path(case.folder) / "axolotl.yaml"
    file.write_text(yaml.safe_dump(settings(case)))
    do_cli(config=str(file))


def settings(case: Case) -> dict[str, Any]:
    """axolotl's file."""
    return {
        "base_model": str(case.model),
        "plugins": [f"{__name__}.{Waiting.__name__}"],
        "adapter": "qlora",
        "load_in_4bit": True,
        "bnb_config_kwargs": {"bnb_4bit_use_double_quant": True},
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "datasets": [{"path": str(case.rows), "ds_type": "json", "type": ""}],
        "val_set_size": 0,
        "sequence_len": case.length,
        "sample_packing": False,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # rows in their order
        "micro_batch_size": case.rows_per_step,
        "gradient_accumulation_steps": 1,
        "max_steps": case.needed_steps,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "constant",
        "learning_rate": case.learning_rate,
        "weight_decay": 0.0,
        "max_grad_norm": 0.3,
        "bf16": True,
        "flash_attention": True,
        "gradient_checkpointing": case.recompute,
        "save_strategy": "no",
        "seed": case.seed,
        "output_dir": str(Path(case.folder) / "axolotl"),
    }
