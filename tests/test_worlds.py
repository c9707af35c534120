"""Replicas and shares in fake worlds of 1 to 64 ranks, against brute force; refusals; and a thousand ranks."""

import itertools
import math
import time
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from builders import examples, shapes
from hypothesis import assume, given
from hypothesis import strategies as st
from worlds import World, cuts, random_holding, random_world, seen_by, shard_of, spread_everywhere

from sharded_phema import replicas
from sharded_phema.errors import UnsupportedModel
from sharded_phema.layout import TALLY_MODULUS, Box, ParamShard, cut, tally, whole

seeds = st.integers(0, 1 << 30)
world_sizes = st.one_of(st.integers(1, 8), st.integers(9, 64))


def counted(shape, holdings):
    """How often each element is held, by brute force."""
    held = np.zeros(shape, np.int64)
    for box in itertools.chain.from_iterable(holdings):
        held[box.slices] += 1
    return held


@examples(60)
@given(seed=seeds, ranks=world_sizes)
def test_different_boxes_are_disjoint_and_cover_each_tensor(seed, ranks):
    world = random_world(seed, ranks, tensors=4)
    for pieces in zip(*world.layouts, strict=True):
        assert (counted(pieces[0].global_shape, {piece.boxes for piece in pieces}) == 1).all()


@examples(60)
@given(seed=seeds, ranks=st.integers(1, 6))
def test_any_range_of_a_piece_is_cut_into_boxes_that_hold_it(seed, ranks):
    world, rng = random_world(seed, ranks, tensors=4), Random(seed)
    for shard in itertools.chain.from_iterable(world.layouts):
        start, stop = sorted(rng.choices(range(shard.local.numel() + 1), k=2))
        parts = [world.tensors[shard.name][box.slices].reshape(-1) for box in cut(shard.boxes, start, stop)]
        assert torch.equal(torch.cat([torch.empty(0), *parts]), shard.local.reshape(-1)[start:stop])


@examples(60)
@given(seed=seeds, ranks=world_sizes)
def test_the_replicas_of_each_set_of_boxes_are_numbered_from_zero_and_the_first_ones_cover_the_tensor(seed, ranks):
    for pieces in zip(*random_world(seed, ranks, tensors=4).settled(), strict=True):
        for boxes in {piece.boxes for piece in pieces}:
            mates = [piece for piece in pieces if piece.boxes == boxes]
            assert [piece.replica for piece in mates] == list(range(len(mates))), "in the order of ranks"
            assert {piece.holders for piece in mates} == {len(mates)}
        assert (counted(pieces[0].global_shape, [p.boxes for p in pieces if p.replica == 0]) == 1).all()


@examples(40)
@given(seed=seeds, ranks=world_sizes)
def test_what_all_ranks_hold_is_shared_out_evenly_and_the_rest_stays(seed, ranks):
    settled, narrowed = random_world(seed, ranks, tensors=6).settled(), []
    for rank, layout in enumerate(settled):
        with seen_by(rank, ranks):
            narrowed.append(replicas.shared_out(layout)[0])
    loads = np.zeros(ranks, np.int64)
    for before, after in zip(zip(*settled, strict=True), zip(*narrowed, strict=True), strict=True):
        if before[0].holders < ranks or before[0].kind == "buffer" or not before[0].local.numel():
            assert all(a is b for a, b in zip(after, before, strict=True))
            continue
        assert (counted(after[0].global_shape, [piece.boxes for piece in after]) == 1).all()
        assert {piece.replica for piece in after} == {0}, "each writes what it averages"
        loads += [piece.local.numel() for piece in after]
        for mine, full in zip(after, before, strict=True):
            assert not mine.local.numel() or inside(mine.local, full.local), "an alias, not a copy"
            assert torch.equal(mine.current().reshape(-1), mine.local.reshape(-1))
            parts = [full.local.view(full.global_shape)[box.slices].reshape(-1) for box in mine.boxes]
            assert torch.equal(torch.cat([torch.empty(0), *parts]), mine.local.reshape(-1))
    assert loads.max() - loads.min() <= 1


def inside(part, tensor):
    return part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def strided(shape, rng):
    """The same values in row-major order of their indices, in memory that is perhaps permuted."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    order = rng.sample(range(len(shape)), len(shape))
    return values.permute(order).contiguous().permute(tuple(np.argsort(order)))


@examples(40)
@given(seed=seeds, ranks=st.integers(1, 9))
def test_spreading_brings_every_part_to_all_ranks_also_of_tensors_that_are_not_contiguous(seed, ranks):
    rng = Random(seed)
    shapes_ = [tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randint(0, 3))) for _ in range(4)]
    tensors = {f"t{i}": strided(shape, rng) for i, shape in enumerate(shapes_)}

    # clone() keeps the strides of dense tensors.
    own = [{name: value.clone() for name, value in tensors.items()} for _ in range(ranks)]
    layouts = [tuple(shard_of(value, (whole(value.shape),), name=n) for n, value in mine.items()) for mine in own]
    shared = []
    for rank, layout in enumerate(World(tensors, layouts).settled()):
        with seen_by(rank, ranks):
            parts, found = replicas.shared_out(layout)
        shared.append(found)
        kept = [shard.local.clone() for shard in parts]
        for shard in parts:
            pieces = [tensors[shard.name][box.slices].reshape(-1) for box in shard.boxes]
            assert torch.equal(torch.cat([torch.empty(0), *pieces]), shard.local.reshape(-1))
        for value in own[rank].values():
            value.fill_(torch.nan)
        for shard, value in zip(parts, kept, strict=True):
            shard.local.copy_(value)
    if ranks > 1:
        assert any(torch.isnan(value).any() for mine in own for value in mine.values())
    spread_everywhere(shared)
    for mine in own:
        assert all(torch.equal(mine[name], value) for name, value in tensors.items())
        assert all(mine[name].stride() == value.stride() for name, value in tensors.items())


def test_rows_of_tensors_that_are_not_contiguous_are_shared_out_too():
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    world = World({"w": weight}, [(shard_of(weight.clone(), (whole(weight.shape),)),) for _ in range(4)])
    for rank, layout in enumerate(world.settled()):
        with seen_by(rank, 4):
            (piece,), _ = replicas.shared_out(layout)
        assert piece.boxes == (Box((2 * rank, 0, 0, 0), (2, 4, 3, 3)),)


# Refusals ------------------------------------------------------------------------------------------------------------


def with_shards(world, name, change):
    """The world in which the shard of one tensor is another on some ranks."""
    layouts = [
        tuple(change(rank, shard) if shard.name == name else shard for shard in layout)
        for rank, layout in enumerate(world.layouts)
    ]
    return World(world.tensors, layouts)


def a_group(world, rng):
    """A tensor, boxes of it that some rank holds, and the ranks that hold them."""
    found = [(s.name, s.boxes) for layout in world.layouts for s in layout if s.local.numel()]
    if not found:
        return None
    name, boxes = rng.choice(found)
    ranks = [r for r, layout in enumerate(world.layouts) for s in layout if (s.name, s.boxes) == (name, boxes)]
    return name, boxes, ranks


def refusal(world):
    """The message, once it is known that every rank gives the same."""
    everyone, messages = world.facts(), []
    with pytest.raises(UnsupportedModel) as caught:
        world.settled()
    if "different values" in str(caught.value):
        layouts = [replicas.numbered(layout, everyone, rank) for rank, layout in enumerate(world.layouts)]
        values = np.stack([replicas.values_of(layout) for layout in layouts])
        acts = [partial(replicas.check_values, layout, everyone, values) for layout in layouts]
    else:
        acts = [partial(replicas.numbered, layout, everyone, rank) for rank, layout in enumerate(world.layouts)]
    for act in acts:
        with pytest.raises(UnsupportedModel) as caught:
            act()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    return messages[0]


@examples(40)
@given(seed=seeds, ranks=st.integers(1, 12))
def test_elements_that_no_rank_holds_are_refused(seed, ranks):
    world, rng = random_world(seed, ranks, tensors=4), Random(seed)
    found = a_group(world, rng)
    assume(found is not None)
    name, boxes, holders = found
    bad = with_shards(
        world, name, lambda rank, s: shard_of(world.tensors[name], (), name=name, kind=s.kind) if rank in holders else s
    )
    total = math.prod(world.tensors[name].shape)
    expected = f"{name}: the ranks hold {total - sum(b.numel for b in boxes)} elements, the whole tensor"
    assert refusal(bad).startswith(expected)


@examples(40)
@given(seed=seeds, ranks=st.integers(2, 12))
def test_one_replica_with_another_value_is_refused_by_name_unless_it_is_a_buffer(seed, ranks):
    world, rng = random_world(seed, ranks, tensors=4), Random(seed)
    found = a_group(world, rng)
    assume(found is not None and len(found[2]) > 1)
    name, _, holders = found
    odd = rng.choice(holders[1:])
    shard = next(s for s in world.layouts[odd] if s.name == name)
    shard.local.view(-1)[rng.randrange(shard.local.numel())] += 1
    if shard.kind == "buffer":
        assert len(world.settled()) == ranks
    else:
        expected = (
            f"{name}: ranks {holders[0]} and {odd} hold the same part of it with different values\nhint: give all"
        )
        assert refusal(world).startswith(expected)


@pytest.mark.parametrize(
    ("shape", "holdings"),
    [
        ((8,), [[Box((0,), (4,))], [Box((2,), (4,))]]),
        ((8,), [[Box((0,), (4,))], [Box((0,), (2,)), Box((2,), (2,))]]),
        ((8,), [[Box((0,), (3,))], [Box((3,), (3,))], [Box((0,), (1,)), Box((5,), (1,))]]),
        ((2, 2), [[Box((0, 0), (1, 2))], [Box((0, 1), (2, 1))]]),
    ],
)
def test_boxes_that_overlap_and_leave_others_out_are_refused_though_they_count_right(shape, holdings):
    tensor = torch.randn(shape)
    world = World({"w": tensor}, [(shard_of(tensor, tuple(boxes)),) for boxes in holdings])
    expected = f"w: boxes of different ranks overlap and leave elements out of the whole tensor {shape}"
    assert refusal(world).startswith(expected)


def test_replicas_with_different_strides_are_refused_unless_they_are_buffers():
    tensor = torch.randn(3, 4)
    copies = (tensor, tensor.t().contiguous().t(), tensor)
    for kind in ("trained", "frozen"):
        world = World({"w": tensor}, [(shard_of(copy, (whole((3, 4)),), kind=kind),) for copy in copies])
        assert "w: ranks 0 and 1 hold the same part of it with different strides" in refusal(world)
    world = World({"w": tensor}, [(shard_of(copy, (whole((3, 4)),), kind="buffer"),) for copy in copies])
    assert [layout[0].replica for layout in world.settled()] == [0, 1, 2]


@examples(150)
@given(shape=shapes, data=st.data())
def test_tallies_add_up_to_that_of_the_whole_exactly_for_boxes_that_hold_every_element_once(shape, data):
    # Oracle: brute force. Boxes of two cuts are mixed, so that many sets of them count right and do not cover.
    boxes = [box for pieces in data.draw(cuts(shape, 3)) for box in pieces]
    other = [box for pieces in data.draw(cuts(shape, 3)) for box in pieces]
    mixed = data.draw(st.lists(st.sampled_from(boxes + other), max_size=5)) if boxes + other else []
    assert tally(boxes) == tally([whole(shape)])
    assert sum(tally([box]) for box in boxes) % TALLY_MODULUS == tally(boxes)
    assert (tally(mixed) == tally([whole(shape)])) == bool((counted(shape, [mixed]) == 1).all())


# Size ----------------------------------------------------------------------------------------------------------------


def test_a_thousand_ranks_settle_three_hundred_tensors_in_seconds():
    ranks, rng = 1024, Random(0)
    # A hundred tensors three times, as to make the fake ranks takes longer than to settle them.
    shapes_ = [rng.choice([(4096, 64), (64, 4096), (2048,), (3, 5), (50257, 16)]) for _ in range(100)]
    holdings = [random_holding(rng, shape, ranks) for shape in shapes_]
    nothing = torch.empty(0)
    layouts = [
        tuple(
            ParamShard(f"t{i}", shape, held[rank], nothing, lambda: nothing)
            for i, (shape, held) in enumerate(zip(shapes_, holdings, strict=True))
        )
        for rank in range(ranks)
    ]
    everyone = np.tile(World({}, layouts).facts(), (1, 3, 1))
    assert everyone.shape == (1024, 300, 4)
    before = time.process_time()
    found = replicas.numbered(layouts[-1] * 3, everyone, ranks - 1)
    took = time.process_time() - before
    for shard, held in zip(found, holdings * 3, strict=True):
        mates = [rank for rank in range(ranks) if held[rank] == held[-1]]
        assert (shard.replica, shard.holders) == (len(mates) - 1, len(mates))
    assert took < 5, "on one slow core it takes a tenth of a second"
