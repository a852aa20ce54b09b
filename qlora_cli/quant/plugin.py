"""Packed layers in transformers' own way: from_pretrained quantises while it reads, save_pretrained keeps the codes.

Importing this module registers QUANT_METHOD with transformers, the one thing that outlives a `with` here: a checkpoint
that `save_pretrained` wrote loads again wherever this package has been imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_cli.errors import UserError
from qlora_cli.quant.data_types import QUANT_METHOD, UNIFORM
from qlora_cli.quant.embedding import packed_like
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.quant.packed import PackedLayer, Storage, tensors_of


class BadWeight(UserError):
    """A tensor of the checkpoint that cannot be quantised; `where` is its name."""


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model.

    data_type: a key of data_types.CODES. skip_modules: names or patterns of linear layers left as they are, as
    bitsandbytes' llm_int8_skip_modules. overrides: data type, or none, by pattern (fnmatch) of full module names; the
    first one that fits counts. embeddings: data type of the input embedding and what is tied to it, or none.
    The rest as in Storage.
    """

    def __init__(
        self,
        data_type: str = "int2",
        skip_modules: list[str] | None = None,
        overrides: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        embeddings: str = "none",
        **storage: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.data_type = data_type
        self.skip_modules = ["lm_head"] if skip_modules is None else skip_modules
        self.embeddings = embeddings
        pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
        self.overrides = [list(pair) for pair in pairs]  # their order counts, and config.json sorts keys
        known = Storage.__dataclass_fields__.keys() - {"data_type"}
        self.storage = {name: value for name, value in storage.get("storage", storage).items() if name in known}

    def storage_of(self, name: str) -> Storage | None:
        """How the weight of a linear layer is stored; None where it stays as it is."""
        if not should_convert_module(name, self.skip_modules):
            return None
        found = (kind for pattern, kind in self.overrides if fnmatchcase(name, pattern))
        return self._storage(next(found, self.data_type))

    @property
    def embedding_storage(self) -> Storage | None:
        """How the weight of the input embedding is stored; None where it stays as it is."""
        return self._storage(self.embeddings)

    def _storage(self, data_type: str) -> Storage | None:
        options = self.storage if data_type in UNIFORM else {**self.storage, "zero_point": False, "clip": "auto"}
        return None if data_type == "none" else Storage(data_type, **options)


class PackedQuantizer(HfQuantizer):
    """Swaps layers for packed ones before weights are read, and quantises each as it comes."""

    requires_calibration = False
    quantization_config: PackedConfig

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, PackedLayer) and name == "weight"

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of a weight as it will be stored, by which transformers reserves memory."""
        if self.param_needs_quantization(model, param_name):
            return float(get_module_from_name(model, param_name)[0].code.bits / 8)
        return float(super().param_element_size(model, param_name, param))

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.not_finite: list[str] = []
        self.untied: list[str] = []
        self.embedding = ""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        if (storage := self.quantization_config.embedding_storage) is not None:
            self.embedding = _swap_embedding(model, storage, self.pre_quantized)
        linear = [*_linear(model)]
        refuse_idle_overrides(self.quantization_config, [name for name, _module in linear])
        for name, module in linear:
            storage = self.quantization_config.storage_of(name)
            if storage is not None:
                _swap(model, name, module, storage, self.pre_quantized)

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if self.not_finite:  # told here: what is raised while weights are read loses its message
            what = f"holds NaN or infinity ({len(self.not_finite)} such tensors)"
            raise BadWeight(self.not_finite[0], what, "restore the checkpoint")
        for name, module in model.named_modules():
            if isinstance(module, PackedLayer) and (module.weight is not module.holder.weight or name in self.untied):
                what = f"is not {self.embedding}.weight, to which config.json ties it"
                raise BadWeight(
                    f"{name}.weight", what, "mend tie_word_embeddings, or set quantization.embeddings: none"
                )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def refuse_idle_overrides(config: PackedConfig, names: Sequence[str]) -> None:
    """Raises UserError for a pattern that decides about none of the linear layers of these names."""
    unskipped = [name for name in names if should_convert_module(name, config.skip_modules)]
    left = list(unskipped)
    for pattern, _kind in config.overrides:
        if any(fnmatchcase(name, pattern) for name in left):
            left = [name for name in left if not fnmatchcase(name, pattern)]
            continue
        known = sorted({name.rsplit(".", 1)[-1] for name in names})
        what, todo = f"{pattern!r} matches no linear module", f"name whole modules, as *.{known[0]} does"
        if any(fnmatchcase(name, pattern) for name in unskipped):
            what, todo = f"{pattern!r} has no effect: a pattern before it decides", "put the narrower pattern first"
        elif any(fnmatchcase(name, pattern) for name in names):
            what, todo = f"{pattern!r} has no effect: skip_modules leaves it out", "take it out of skip_modules"
        raise UserError("quantization.overrides", what, todo)


class Quantize(ConversionOps):
    """A weight as the checkpoint has it to the tensors of its layer."""

    def __init__(self, quantizer: PackedQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            module, _name = get_module_from_name(model, name)
            weight = value[0] if isinstance(value, list) else value
            if not all(bound.isfinite() for bound in torch.aminmax(weight)):  # of NaN both are NaN
                self.quantizer.not_finite.append(name)
                weight = torch.zeros_like(weight)
            packed = module.packed_from(weight.T if module.transposed else weight)
            tensors = {one: tensor for one, tensor in module.tensors_of(packed).items() if tensor is not None}
            path = name.removesuffix(".weight")
            if module.shared or path == self.quantizer.embedding:  # a checkpoint may have either, or both
                path = self._tied(path, module.holder, tensors)
            found |= {f"{path}.{one}": tensor for one, tensor in tensors.items()}
            module._is_hf_initialized = True
        return found

    def _tied(self, path: str, holder: PackedLayer, tensors: dict[str, Tensor]) -> str:
        """Whose tensors they become, those of a module at `path`; they must be what was read before, if anything."""
        known = tensors_of(holder.packed)
        if not holder.weight.is_meta and any(
            not torch.equal(one.to(known[name].device), known[name]) for name, one in tensors.items()
        ):
            self.quantizer.untied.append(path)
        return self.quantizer.embedding


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a model that are not packed, GPT-2's among them, with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, PackedLayer):
            yield name, module


def _swap(model: nn.Module, name: str, module: Any, storage: Storage, pre_quantized: bool) -> None:
    """Puts a packed layer without values in the place of a linear one.

    Its weight has the checkpoint's shape until it is quantised.
    """
    transposed = isinstance(module, Conv1D)
    rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
    if rows * columns % storage.block_size:
        what = f"has {rows * columns:,} values, which is no multiple of quantization.block_size {storage.block_size}"
        raise BadWeight(f"{name}.weight", what, f"set another block size, or put {name} into skip_modules")
    layer = PackedLinear(columns, rows, module.bias is not None, storage, device="meta", dtype=module.weight.dtype)
    layer.transposed = transposed
    if set(name.split(".")) & set(getattr(model, "_keep_in_fp32_modules", None) or ()):
        layer.hold_as_int8()
    if not pre_quantized:
        layer.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
    model.set_submodule(name, layer)


def _swap_embedding(model: Any, storage: Storage, pre_quantized: bool) -> str:
    """As `_swap` for the input embedding, and for what is tied to it: layers that share its packed tensors.

    Returns its name. Raises UserError for one that does more than look rows up, and a tied layer of another kind.
    """
    embedding = model.get_input_embeddings()
    named = [*model.named_modules(remove_duplicate=False)]
    first = next(name for name, module in named if module is embedding)
    rows = embedding.weight.shape[-1]
    if rows % storage.block_size:
        what = f"has rows of {rows:,} values, which is no multiple of quantization.block_size {storage.block_size}"
        raise BadWeight(f"{first}.weight", what, "set another block size, or quantization.embeddings: none")
    layer = _packed_like(embedding, storage, first)
    if not pre_quantized:
        layer.weight = nn.Parameter(torch.empty_like(embedding.weight, device="meta"), requires_grad=False)
    source = model.all_tied_weights_keys.get(f"{first}.weight", f"{first}.weight")
    sharing = {source, *(target for target, of in model.all_tied_weights_keys.items() if of == source)}
    for name, module in named:
        if module is embedding:
            model.set_submodule(name, layer)
        elif f"{name}.weight" in sharing:
            model.set_submodule(name, _packed_like(module, storage, name).tied_to(layer))
    return first


def _packed_like(module: Any, storage: Storage, name: str) -> PackedLayer:
    """A packed layer without values for an embedding, or for a head that is tied to it."""
    dtype = module.weight.dtype
    if type(module) is nn.Linear and module.bias is None:
        return PackedLinear(module.in_features, module.out_features, False, storage, device="meta", dtype=dtype)
    layer = packed_like(module, storage) if isinstance(module, nn.Embedding) else None
    if layer is None:
        kind = "Linear with a bias" if type(module) is nn.Linear else type(module).__name__
        what = f"{name} is a {kind}, which cannot be packed with the embedding"
        raise UserError("quantization.embeddings", what, "set it to none")
    return layer


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(PackedQuantizer)
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(PackedConfig)
