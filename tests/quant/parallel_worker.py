"""A small model of packed layers, and one of two processes that train it: with DDP, then sharded by FSDP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_cli.quant.embedding import PackedEmbedding
from qlora_cli.quant.linear import PackedLinear
from qlora_cli.quant.packed import Storage

NUM_IDS, WIDTH = 30, 128
IDS = torch.arange(8 * 5).view(8, 5) * 7 % NUM_IDS
"""A batch, half of which each process gets."""


class Packed(nn.Module):
    """Ids to logits through an embedding, two linear layers, and a head that is the embedding."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = PackedEmbedding(NUM_IDS, WIDTH, storage)
        self.wide, self.narrow = PackedLinear(WIDTH, 256, True, storage), PackedLinear(256, WIDTH, False, storage)
        for layer in (self.embedding, self.wide, self.narrow):
            layer.store(layer.packed_from(torch.randn(layer.shape, generator=generator)))
        self.wide.bias.data = torch.randn(256, generator=generator)
        self.head = PackedLinear(WIDTH, NUM_IDS, False, storage).tied_to(self.embedding)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.narrow(F.gelu(self.wide(x))))


def adapted(storage: Storage) -> Any:
    """The model with LoRA of another start than nothing on both linear layers, the same in every process."""
    torch.manual_seed(1)
    return get_peft_model(Packed(storage), LoraConfig(r=4, target_modules=["wide", "narrow"], init_lora_weights=False))


def loss(logits: Tensor) -> Tensor:
    """A mean over the batch: of equal halves its mean is that of the whole."""
    return logits.square().mean() / WIDTH


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of everything that learns; whole tensors where they are sharded."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {f"grad {name.removeprefix('module.')}": whole(grad) for name, grad in found.items() if grad is not None}


def whole(tensor: Any) -> Tensor:
    """A tensor of all processes where it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def with_ddp(model: Any, rank: int) -> dict[str, Tensor]:
    """Gradients of the whole batch, of which each process saw half."""
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model)
    loss(wrapped(IDS.chunk(2)[rank])).backward()
    return gradients(wrapped)


def with_fsdp(model: Any, rank: int) -> dict[str, Tensor]:
    """Gradients, logits, every stored tensor gathered, and how many bytes of codes lie in this process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    inner = model.base_model.model
    for part in (inner.wide, inner.narrow, model):
        fully_shard(part, mesh=mesh)
    logits = model(IDS.chunk(2)[rank])
    loss(logits).backward()
    here = sum(p.to_local().numel() for p in model.parameters() if p.dtype == torch.uint8)
    stored = {name: whole(tensor) for name, tensor in model.state_dict().items() if "head" not in name}
    return {**gradients(model), **stored, "logits": logits.detach(), "bytes here": torch.tensor(here)}


WRAPPED = {"ddp": with_ddp, "fsdp": with_fsdp}


def main(folder: Path, rank: int, *data_types: str) -> None:
    """Writes what each way found for each data type, by this process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for data_type in data_types:
        for name, way in WRAPPED.items():
            found = way(adapted(Storage(data_type)), rank)
            save_file(found, folder / f"{name}-{data_type}-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
