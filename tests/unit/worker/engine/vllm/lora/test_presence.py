"""Shell. What the kernels know of the slots."""

from __future__ import annotations

import torch

from worker.engine.vllm.lora.presence import RANK_AT, Presence


def layer(slices: int, slots: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return (
        [torch.zeros(slots, 1, 4, 8) for _ in range(slices)],
        [torch.zeros(slots, 1, 8, 4) for _ in range(slices)],
    )


def storages(*buffers: torch.Tensor, rank: int = 2) -> dict[int, int]:
    return {buffer.untyped_storage().data_ptr(): rank for buffer in buffers}


def bits(values: torch.Tensor) -> list[int]:
    return (values & 0xFFFF).tolist()


def test_before_anything_is_written_every_layer_counts() -> None:
    presence = Presence([layer(3), layer(1)], 3)
    assert presence.wanted([1]).tolist() == [True, True, True]
    assert presence.on_device.ne(0).all()


def test_a_slot_has_the_slices_that_were_written_and_no_others() -> None:
    qkv, o = layer(3), layer(1)
    presence = Presence([qkv, o], 3)
    presence.write(1, storages(qkv[1][0], qkv[1][2], qkv[0][0]))
    assert bits(presence.on_device[:2, 1]) == [0b101, 0]
    assert presence.wanted([1]).tolist() == [True, False, True]
    presence.write(1, storages(o[1][0]))
    assert bits(presence.on_device[:2, 1]) == [0, 1]
    presence.write(0, storages(qkv[1][1]))
    assert presence.wanted([0, 1]).tolist() == [True, True, True]
    assert presence.wanted([]).tolist() == [False, False, False]


def test_a_layer_is_known_by_its_first_weights() -> None:
    qkv, o = layer(3), layer(1)
    presence = Presence([qkv, o], 3)
    assert [presence.row(it) for it in (qkv[0][0], o[0][0])] == [0, 1]
    unknown = presence.row(qkv[0][1])
    presence.write(1, {})
    assert presence.on_device[unknown].ne(0).all(), "it may have weights in any slot"


def test_where_it_is_not_known_what_was_written_every_layer_counts() -> None:
    qkv, o = layer(3), layer(1)
    presence = Presence([qkv, o], 3)
    presence.write(1, storages(o[1][0]))
    presence.write(1, None)
    assert presence.wanted([1]).all() and presence.on_device[:, 1].ne(0).all()


def test_buffers_that_share_a_storage_count_together() -> None:
    a, both = [torch.zeros(3, 1, 4, 8)] * 2, torch.zeros(2, 3, 1, 8, 4)
    presence = Presence([(a, [both[0], both[1]])], 3)
    presence.write(0, storages(both))
    assert bits(presence.on_device[0, 0]) == 0b11


def test_a_slot_has_the_largest_rank_of_a_layer_s_slices() -> None:
    qkv, o = layer(3), layer(1)
    presence = Presence([qkv, o], 3)
    assert (presence.on_device >> RANK_AT & 0xFFFF).min() >= 512, "before anything is written"
    presence.write(1, storages(qkv[1][0], rank=3) | storages(qkv[1][2], rank=1))
    assert (presence.on_device[:2, 1] >> RANK_AT).tolist() == [3, 0]


def test_a_layer_of_more_slices_than_there_are_bits_may_have_any() -> None:
    many, o = layer(RANK_AT + 1), layer(1)
    presence = Presence([many, o], 3)
    presence.write(1, storages(many[1][16]))
    assert presence.wanted([1]).tolist() == [False, True]
    assert presence.row(many[0][0]) == len(presence) - 1
