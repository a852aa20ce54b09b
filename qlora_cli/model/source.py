"""Where a base model lies: a local folder, or a hub id that is downloaded once. No network for a local folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.prequantized import refuse_unknown_method
from qlora_cli.recipe.schema import Model

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt")
SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = ["*.safetensors"]
_COMMIT = re.compile("[0-9a-f]{40}")


def locate(model: Model) -> Path:
    """The folder with config.json and tokenizer of `model`; of a hub model without its weights, which take longer.

    Raises UserError where it is missing, is quantised already, or is a local folder without safetensors weights.
    """
    folder = Path(model.name_or_path)
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise UserError(folder, "the base model must be a folder, this is a file", "set model.name_or_path")
        if model.name_or_path.startswith((".", "/", "~")) or model.name_or_path.count("/") > 1:
            raise UserError(folder, "no such folder", "set model.name_or_path to a model folder or a hub id")
        folder = download(model, SMALL)
        check_config(folder)
        return folder
    if model.revision is not None:
        raise UserError(
            "model.revision",
            f"{model.revision!r} is set, but {folder} is a folder, which has no revisions",
            "remove it: it belongs to hub models",
        )
    check_config(folder)
    check_weights(folder)
    return folder


def fetch_weights(model: Model, folder: Path) -> None:
    """Downloads the weights of a hub model to the folder that `locate` gave: those of the same commit.

    Raises UserError as `locate` does.
    """
    if not os.path.isdir(model.name_or_path):
        commit = folder.name if _COMMIT.fullmatch(folder.name) else model.revision
        check_weights(download(model.model_copy(update={"revision": commit}), [*SMALL, *WEIGHTS]))


def download(model: Model, patterns: list[str]) -> Path:
    """The local snapshot of a hub model's files, downloaded where they are not in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*patterns, "*.py"] if model.trust_remote_code else patterns
    try:
        return Path(snapshot_download(model.name_or_path, revision=model.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.name_or_path: {model.name_or_path}",
            f"no such folder here, and the hub did not give it: {reason}",
            "check the name and the network, run `hf auth login` for a gated model, or give a local folder",
        ) from error


def check_config(folder: Path) -> None:
    """Refuses a model that is quantised in a way we do not load."""
    refuse_unknown_method(read_config(folder), folder)


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says."""
    return read_json(folder / "config.json", "a transformers model folder needs it")


def check_weights(folder: Path) -> None:
    """Refuses a folder without whole safetensors weights."""
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        check_header(shard)
    if shards:
        return
    if any((folder / name).exists() for name in PICKLES):
        raise UserError(
            folder,
            "the weights are a pickle, which can run code when read",
            "use a safetensors checkpoint of the same model",
            Exit.REFUSED,
        )
    raise UserError(
        folder, "no *.safetensors weights in the model folder", "finish the download or name another folder"
    )


def check_header(shard: Path) -> None:
    """Refuses a safetensors file that cannot be opened: transformers would not name it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(shard, f"damaged or cut short: {error}", "download it again") from error


def file_of(tensor: str, folder: Path) -> Path:
    """The safetensors file that holds a tensor of a model; the folder where the file has another name for it."""
    from safetensors import safe_open

    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            if tensor in file.keys():  # noqa: SIM118 (no mapping)
                return shard
    return folder


def read_json(path: Path, why: str) -> dict[str, Any]:
    """The object in a JSON file; `why` it is needed is part of the message where it is missing."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(path, f"no such file ({why})", "name a complete folder") from None
    except OSError as error:
        raise UserError(path, f"cannot be read: {error.strerror}", "check the permissions") from error
    except ValueError as error:
        raise UserError(path, f"not JSON: {error}", "restore the file") from error
    if not isinstance(value, dict):
        raise UserError(path, f"expected a JSON object, found {type(value).__name__}", "restore the file")
    return value
