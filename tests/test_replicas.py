"""Replicated models: every rank averages its part of what all hold, and the parts are the whole average."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import inputs
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from worlds import assert_equal, averages_here, laid_together

from sharded_phema.errors import OrderError, UnsupportedModel
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.store import BoxTensor

STEPS = 5


class Mixture(nn.Module):
    """Parameters of every sort: strided ones, a scalar, one without elements, bfloat16, frozen, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.transposed = nn.Parameter(torch.randn(7, 6).t())
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.low = nn.Parameter(torch.randn(9).bfloat16())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.fixed = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x) @ self.transposed.t()) * self.scale  # (batch, 6)
        image = hidden.unsqueeze(1).unsqueeze(3).expand(-1, 2, -1, 3)
        low = self.low.float().sum() + self.nothing.sum() + self.fixed.sum()
        return self.conv(image).flatten(1).sum(1) + low


def make_mixture() -> Mixture:
    torch.manual_seed(11)
    return Mixture()


def strided(model: nn.Module) -> int:
    return sum(not param.is_contiguous() for param in model.parameters())


def train(model: nn.Module, ema: PostHocEMA, steps: int = STEPS) -> None:
    """The same batch on each rank, whose mean gradient over 2 ranks is exact, and over 3 is made so by its sign."""
    trained = [param for param in model.parameters() if param.requires_grad]
    for step in range(1, steps + 1):
        model.zero_grad()
        model(inputs(step)).square().mean().backward()
        with torch.no_grad():
            for param in trained:
                param.sub_(0.01 * param.grad.sign())
        ema.update()


def tracked_elements(ema: PostHocEMA) -> list[int]:
    return [sum(s.local.numel() for s in layout) for layout in ema._averages_by_label().values()]


def ddp_body(root: Path) -> tuple:
    model = nn.parallel.DistributedDataParallel(make_mixture())
    assert strided(model) == 2, "the two that no flat view reaches"
    ema = PostHocEMA(model, root, snapshot_every=2)
    train(model, ema)
    with CommDebugMode() as collectives:
        ema.update()
        ema.snapshot()
    checks = [collectives.get_total_counts() == 0, *swap_checks(model, ema), *state_checks(ema, root)]
    return averages_here(ema), tracked_elements(ema), weights(model), checks


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


def swap_checks(model: nn.Module, ema: PostHocEMA) -> list[bool]:
    """Inside, all ranks compute with the whole average; after it, with their own weights."""
    before, label = weights(model), list(ema._averages_by_label())[1]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, averages_here(ema))
    average = laid_together(gathered)
    with torch.no_grad(), ema.swapped(sigma_rel=0.10):
        inside = weights(model)
        output = model(inputs(0))
    plain = make_mixture()
    plain.load_state_dict(inside | {"count": plain.count})
    trained = [name for name in before if name != "fixed"]
    rounded = [average[f"{label} {name}"].to(inside[name].dtype) for name in trained]
    return [
        *(torch.equal(inside[name], value) for name, value in zip(trained, rounded, strict=True)),
        torch.equal(output, plain(inputs(0))),
        not torch.equal(inside["transposed"], before["transposed"]),
        *(torch.equal(after, before[name]) for name, after in weights(model).items()),
    ]


def state_checks(ema: PostHocEMA, root: Path) -> list[bool]:
    """torch.save would lose what the other ranks hold and is refused; checkpoints of all ranks hold everything."""
    with pytest.raises(OrderError, match=r"only a part is on this rank[^$]*hint: [^$]*dcp\.save\(\{'ema': ema\}"):
        torch.save(ema.state_dict(), io.BytesIO())
    dcp.save({"ema": ema}, checkpoint_id=root.parent / f"{root.name}-checkpoint")
    return copy_checks(ema.state_dict())


def copy_checks(state: dict) -> list[bool]:
    """A shallow copy aliases the averages, a deep one does not; both have the same pieces."""
    parts = [value for tensors in state.values() for value in tensors.values() if isinstance(value, BoxTensor)]
    checks = [bool(parts)]
    for part in parts:
        for twin, alias in ((copy.copy(part), True), (copy.deepcopy(part), False)):
            assert twin.pieces.keys() == part.pieces.keys() and twin.shape == part.shape
            for offsets, piece in part.pieces.items():
                same = twin.pieces[offsets].data_ptr() == piece.data_ptr()
                checks += [torch.equal(twin.pieces[offsets], piece), same == alias or not piece.numel()]
    return checks


def plain_run(root: Path) -> tuple[dict[str, Tensor], int]:
    """The oracle: one process that averages everything."""
    model = make_mixture()
    with PostHocEMA(model, root, snapshot_every=2) as ema:
        train(model, ema)
        ema.update()
        return laid_together([averages_here(ema)]), tracked_elements(ema)[0]


def resumed_body(root: Path) -> tuple[list, list]:
    """From the last snapshot, and from the checkpoint."""
    ema = PostHocEMA(nn.parallel.DistributedDataParallel(make_mixture()), root)
    assert ema.resume() == STEPS + 1
    other = PostHocEMA(nn.parallel.DistributedDataParallel(make_mixture()), root)
    dcp.load({"ema": other}, checkpoint_id=root.parent / f"{root.name}-checkpoint")
    assert other.t == STEPS + 1
    return averages_here(ema), averages_here(other)


@pytest.mark.parametrize(("ranks", "resumed"), [(2, 3), (3, 1)])
def test_ranks_share_out_the_averages_of_what_all_hold(tmp_path, ranks, resumed) -> None:
    expected, total = plain_run(tmp_path / "one")
    results = run_ranks(ranks, ddp_body, tmp_path / "many")
    assert_equal(laid_together([found for found, _, _, _ in results]), expected)
    # Equal shares but for whole rows, of at most 18 elements, of the parameters that are not contiguous.
    assert all(max(tracked) <= -(-total // ranks) + 18 for _, tracked, _, _ in results)
    assert [sum(each) for each in zip(*(tracked for _, tracked, _, _ in results), strict=True)] == [total, total]
    for _, _, found, checks in results:
        assert_equal(found, results[0][2])
        assert all(checks), checks
    for found in zip(*run_ranks(resumed, resumed_body, tmp_path / "many"), strict=True):
        assert_equal(laid_together(list(found)), expected)


def even_body(root: Path) -> tuple[list[int], int]:
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 1), nn.PReLU()))
    ema = PostHocEMA(model, root)
    return tracked_elements(ema), sum(param.numel() for param in model.parameters())


def differing_body(root: Path) -> str:
    """Nobody brought these weights together."""
    torch.manual_seed(dist.get_rank())
    with pytest.raises(UnsupportedModel) as caught:
        PostHocEMA(nn.Linear(3, 2), root)
    return str(caught.value)


def several_body(root: Path) -> tuple:
    return even_body(root / "even"), differing_body(root / "differing")


def test_parts_differ_by_one_element_and_unlike_weights_are_refused(tmp_path) -> None:
    for (tracked, total), message in run_ranks(3, several_body, tmp_path):
        assert all(total // 3 <= count <= -(-total // 3) for count in tracked)
        expected = "weight: ranks 0 and 1 hold the same part of it with different values\nhint: give all ranks the same"
        assert message.startswith(expected)
    assert not (tmp_path / "differing").exists()
