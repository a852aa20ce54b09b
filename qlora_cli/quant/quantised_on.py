"""Quantising on a GPU what then lies in host memory, so that it has the bits of a model that is loaded on that GPU.

Devices sum in other orders: the mean in bitsandbytes' double quantisation differs in its last bits, and so do weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_cli.quant.plugin import Quantize


@contextmanager
def quantised_on(device: torch.device) -> Iterator[None]:
    """Within it transformers quantises each weight that it loads on `device`, and puts it back where it was."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    before: dict[Any, Any] = {kind: kind.convert for kind in (Bnb4bitQuantize, Quantize)}

    def there(convert: Any) -> Any:
        def run(op: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            weights = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
            home = next(iter(weights.values())).device
            moved = {name: weight.to(device) for name, weight in weights.items()}
            found: dict[str, Tensor] = convert(op, moved, *args, **kwargs)
            return {name: tensor.to(home) for name, tensor in found.items()}

        return run

    try:
        for kind, convert in before.items():
            kind.convert = there(convert)
        yield
    finally:
        for kind, convert in before.items():
            kind.convert = convert
