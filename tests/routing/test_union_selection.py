"""Unions of neighbouring queries: round trip, isolation, both modes, edges."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton import launch


def picks(b=2, t=13, k=2, n=3, blocks=7, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    selected = torch.randint(-1, blocks, (b, t, k, n), generator=g)
    return selected, torch.rand((b, t, k, n), generator=g) < 0.8


def sets_of(selected, valid, tile):
    """The union of each tile with Python's own sets."""
    b, t, k, _ = selected.shape
    return [
        [
            [
                sorted({int(x) for x in selected[i, s : s + tile, g][valid[i, s : s + tile, g]] if x >= 0})
                for g in range(k)
            ]
            for s in range(0, t, tile)
        ]
        for i in range(b)
    ]


@pytest.mark.parametrize("mode", ["bitmap", "sort"])
@pytest.mark.parametrize(("tile", "blocks", "n"), [(4, 7, 3), (1, 7, 3), (64, 7, 3), (5, 1000, 2), (3, 1, 4)])
def test_union_is_the_set_of_the_tile_and_leads_back_to_every_pick(mode, tile, blocks, n):
    selected, valid = picks(blocks=blocks, n=n)
    maps = ki.union_selection(selected, query_tile_size=tile, num_blocks=blocks, selected_valid=valid, mode=mode)
    assert maps.union_block_indices.shape[-1] == min(tile * n, blocks)
    expected = sets_of(selected, valid, tile)
    for b, tiles in enumerate(expected):
        for i, groups in enumerate(tiles):
            for g, blocks_of_tile in enumerate(groups):
                size = int(maps.union_sizes[b, i, g])
                row = maps.union_block_indices[b, i, g].tolist()
                assert row[:size] == blocks_of_tile
                assert set(row[size:]) <= {-1}
    own = maps.union_block_indices[:, torch.arange(selected.shape[1]) // tile].gather(
        -1, maps.query_union_indices.clamp(min=0).long()
    )
    assert torch.equal(maps.query_union_valid, valid & (selected >= 0))
    assert torch.equal(own[maps.query_union_valid], selected[maps.query_union_valid].int())
    assert (maps.query_union_indices[~maps.query_union_valid] == -1).all()


def test_modes_agree_exactly_and_auto_is_one_of_them():
    selected, valid = picks(t=70, n=5, blocks=40)
    every = [
        ki.union_selection(selected, query_tile_size=16, num_blocks=40, selected_valid=valid, mode=mode)
        for mode in ("bitmap", "sort", "auto")
    ]
    for other in every[1:]:
        for a, b in zip(every[0], other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_query_gains_no_block_from_its_neighbours():
    selected = torch.arange(8).view(1, 8, 1, 1)  # adversarial: all different
    maps = ki.union_selection(selected, query_tile_size=8, num_blocks=8)
    assert torch.equal(ki.materialize_query_union_mask(maps)[0, :, 0], torch.eye(8, dtype=torch.bool))
    assert maps.telemetry(8) == (8.0, 8.0, 1.0, 1.0)


@pytest.mark.parametrize("mode", ["bitmap", "sort"])
def test_nothing_to_join(mode):
    maps = ki.union_selection(torch.full((1, 3, 1, 2), -1), query_tile_size=2, num_blocks=4, mode=mode)
    assert maps.union_sizes.tolist() == [[[0], [0]]]
    assert (maps.union_block_indices == -1).all()
    assert not ki.materialize_query_union_mask(maps).any()
    for shape, blocks in (((0, 3, 1, 2), 4), ((1, 0, 1, 2), 4), ((1, 3, 1, 0), 4), ((1, 3, 1, 0), 0)):
        maps = ki.union_selection(
            torch.zeros(shape, dtype=torch.int64), query_tile_size=2, num_blocks=blocks, mode=mode
        )
        assert maps.query_union_indices.shape == shape
        assert maps.telemetry(blocks).mean_over_picks == 0


def test_one_graph_serves_every_length():
    def call(selected):
        return ki.union_selection(selected, query_tile_size=4, num_blocks=7)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for t in (9, 14, 6):
        selected, _ = picks(t=t)
        for a, b in zip(compiled(selected), call(selected), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_tile_size": 0}, ValueError, "query_tile_size must be at least 1, got 0"),
        ({"num_blocks": -1}, ValueError, "num_blocks must be at least 0, got -1"),
        ({"num_blocks": 3}, ValueError, "selected must be of block indices below 3, or negative for none, got 6"),
        ({"mode": "hash"}, ValueError, "mode must be one of 'auto', 'bitmap', 'sort', got 'hash'"),
        ({"selected": torch.zeros(2, 3, 4, dtype=torch.int64)}, ValueError, "selected must be"),
        ({"selected": torch.zeros(2, 3, 4, 1)}, TypeError, "selected must be an integer tensor"),
        ({"selected_valid": torch.ones(2, 13, 2, 2, dtype=torch.bool)}, ValueError, "selected_valid must be"),
        ({"selected_valid": torch.ones(2, 13, 2, 3)}, TypeError, "selected_valid must be"),
    ],
)
def test_bad_calls_say_what_is_wrong(changes, error, message):
    call = {"selected": picks()[0], "query_tile_size": 4, "num_blocks": 7, **changes}
    with pytest.raises(error, match=message):
        ki.union_selection(**call)
    with pytest.raises(TypeError, match="maps must be UnionMaps"):
        ki.materialize_query_union_mask(())


@pytest.mark.parametrize(("tile", "blocks", "n"), [(4, 7, 3), (64, 7, 3), (5, 1000, 2), (16, 2**28, 3), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_one_launch_gives_the_same_maps(tile, blocks, n, dtype):
    """The fourth needs keys of 64 bits: a block and an entry do not fit 32."""
    if not launch.interpreting():
        pytest.skip("runs in Triton's interpreter, on a CPU")
    selected, valid = picks(blocks=max(1, min(blocks, torch.iinfo(dtype).max)), n=n)
    selected = (selected if blocks else selected.fill_(-1)).to(dtype)
    options = {"query_tile_size": tile, "num_blocks": blocks, "mode": "sort"}
    for which in (valid, None):
        found = ki.union_selection(selected, selected_valid=which, backend="triton", **options)
        expected = ki.union_selection(selected, selected_valid=which, backend="eager", **options)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


def test_the_kernel_says_what_it_does_not_take():
    selected, _ = picks()
    options = {"query_tile_size": 2000, "num_blocks": 7, "backend": "triton"}
    with pytest.raises(ki.Ineligible, match="at most 4,096 entries"):
        ki.union_selection(selected, **options)
    with pytest.raises(ki.Ineligible, match="bitmap"):
        ki.union_selection(selected, **options | {"query_tile_size": 4, "mode": "bitmap"})
