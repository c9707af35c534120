"""Small models whose shapes are awkward to shard, and one way to train them that is exact on any number of ranks."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


class Awkward(nn.Module):
    """Rows that do not divide, a single row (empty shards), a tied weight, a vector and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.middle = nn.Linear(7, 1)
        self.last = nn.Linear(1, 10)
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.again = nn.Linear(5, 7, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) + torch.tanh(self.again(x))
        return torch.tanh(self.conv(self.last(torch.tanh(self.middle(hidden))).unsqueeze(1)).flatten(1))


def make_model(dtype: torch.dtype = torch.float32) -> Awkward:
    """The same weights at every call."""
    torch.manual_seed(7)
    return Awkward().to(dtype)


def shard(model: Awkward, *, low_precision: bool = False, mesh_shape: tuple[int, ...] = ()) -> Awkward:
    """Apply fully_shard to every layer and the root; with a two-axis mesh this is HSDP."""
    options: dict = {}
    if low_precision:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if mesh_shape:
        options["mesh"] = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    for layer in (model.middle, model.last, model.conv):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def inputs(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The batch of a step: the same on every rank, so that averaging gradients over 2 or 4 ranks is exact."""
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).to(dtype)


class Trainer:
    """Adam on a fixed sequence of batches."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype = model, dtype
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        self.done = 0

    def step(self) -> None:
        """One optimizer step."""
        self.done += 1
        loss = self.model(inputs(self.done, self.dtype)).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters of a sharded model, from its shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without backward leaves the root gathered
    return {name: param.full_tensor().detach().clone() for name, param in model.named_parameters()}
