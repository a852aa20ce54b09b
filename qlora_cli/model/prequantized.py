"""Bases that are stored quantised: which kinds load, what they need, and what cannot be done with them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.whole_folder import fault
from qlora_cli.quant.data_types import QUANT_METHOD
from qlora_cli.recipe.schema import Adapter, Quantization


@dataclass(frozen=True)
class Method:
    """A way of storing weights quantised. needs: package to the least version that loads it."""

    needs: tuple[tuple[str, str], ...] = ()
    extra: str = ""  # of ours, which installs what is needed


GPTQMODEL = (("gptqmodel", "7.0.0"), ("optimum", "1.24.0"))
"""What transformers and PEFT load GPTQ and AWQ layers with; the versions are PEFT 0.21's."""

METHODS = {
    QUANT_METHOD: Method(),
    "gptq": Method(GPTQMODEL, extra="gptq"),
    "awq": Method(GPTQMODEL, extra="gptq"),
    "bitsandbytes": Method(),
}
"""Values of quantization_config.quant_method in config.json that load."""

RECORD = "start.json"
"""What a base that we stored was made of, and the errors of its layers."""

LOADING_KEYS = ("compute_dtype", "outlier_threshold")
"""Keys of `quantization` that are of the loaded model, not of its storage."""


def method_of(config: dict[str, Any]) -> str | None:
    """How a checkpoint with this config.json is stored quantised; None where it is not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"


def refuse_unknown_method(config: dict[str, Any], folder: Path) -> None:
    """Refuses a checkpoint that is quantised in a way that does not load, or not without a package that is absent."""
    refuse_unknown_form(config, folder)
    method = method_of(config)
    if method is None:
        return
    for package, least in METHODS[method].needs:
        if reason := _fault_of_package(package, least):
            raise UserError(
                folder / "config.json",
                f"the checkpoint is quantised by {method.upper()}, and {reason}",
                f"run `pip install 'qlora[{METHODS[method].extra}]'`",
                Exit.ENVIRONMENT,
            )


def refuse_unknown_form(config: dict[str, Any], folder: Path) -> None:
    """Refuses a checkpoint that is quantised in a way that does not load, whatever is installed."""
    method = method_of(config)
    odd = _odd_bitsandbytes(config["quantization_config"]) if method == "bitsandbytes" else ""
    if method is not None and (method not in METHODS or odd):
        raise UserError(
            folder / "config.json",
            f"the checkpoint is already quantised ({odd or method}), which is not available yet",
            "start from the full-precision checkpoint",
        )


def _odd_bitsandbytes(config: dict[str, Any]) -> str:
    """What does not load of bitsandbytes' own checkpoints: all but 4 bits in bytes."""
    if not config.get("load_in_4bit"):
        return "bitsandbytes, 8 bits"
    storage = config.get("bnb_4bit_quant_storage") or "uint8"
    return "" if storage == "uint8" else f"bitsandbytes, 4 bits stored as {storage}"


def _fault_of_package(package: str, least: str) -> str:
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return "" if Version(found) >= Version(least) else f"{package} {found} is older than {least}"


def refuse_damaged(folder: Path, *, contents: bool = True) -> None:
    """Refuses a base that we stored whose files are not those that its manifest signs; see `fault`."""
    if (folder / RECORD).is_file() and (reason := fault(folder, contents=contents)):
        raise UserError(folder, reason, "bring the folder back as it was: no other base fits its adapters")


def refuse_storage_keys(quantization: Quantization, config: dict[str, Any], folder: Path) -> None:
    """Refuses keys that say how to store a base which is stored quantised already."""
    method, defaults = method_of(config), Quantization().model_dump()
    for name, value in quantization.model_dump().items() if method else ():
        if name not in LOADING_KEYS and value != defaults[name]:
            plain = str(value).lower() if isinstance(value, bool) else value
            what = f"{plain} has no effect: {folder} is stored quantised already ({method})"
            raise UserError(f"quantization.{name}", what, "delete the key, or start from the full-precision checkpoint")


def refuse_start(adapter: Adapter, config: dict[str, Any], folder: Path) -> None:
    """Refuses an adapter's start that is computed of unquantised weights where there are none."""
    method = method_of(config)
    if method not in (None, QUANT_METHOD) and adapter.init not in ("default", "gaussian"):
        what = f"{adapter.init} needs the unquantised weights, and {folder} is stored quantised ({method})"
        raise UserError("adapter.init", what, "delete the key, or start from the full-precision checkpoint")
