from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from serve_app.model.attention import Plan, Rule, Run, attention, no_mask, one_kernel, runs, use

HEADS, D = 4, 8


def plan_of(lengths: list[int], filler: int = 0) -> Plan:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.zeros(1, sum(lengths) + filler, dtype=torch.int64)
    return Plan(runs(lengths), sum(lengths) + filler, max(lengths), cu_seqlens, positions)


def projected(total: int, heads: int = HEADS) -> Tensor:
    """(1, heads, total, D) as layers have it: a transposed view on (1, total, heads, D)."""
    return torch.randn(1, total, heads, D).transpose(1, 2)


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, window: int | None, bias: Tensor | None
) -> Tensor:
    """Softmax over one mask of the whole row, in float64: who is in another sequence, too far or ahead is not seen."""
    total = query.shape[2]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    distance = position[:, None] - position[None, :]
    seen = sequence[:, None] == sequence[None, :]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    repeat = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeat, dim=1).double() for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * D**-0.5
    if bias is not None:
        rows, columns = position[:, None].expand(total, total), position[None, :].expand(total, total)
        scores = scores + bias[0][:, rows, columns].double()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).float()


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [2, 2, 7, 7, 7, 13], [9, 1, 9]], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
def test_no_sequence_sees_another(lengths: list[int], causal: bool, window: int | None, key_heads: int) -> None:
    total = sum(lengths)
    query, key, value = projected(total), projected(total, key_heads), projected(total, key_heads)

    with use(plan_of(lengths)):
        output, _ = attention(SimpleNamespace(is_causal=causal), query, key, value, None, D**-0.5, None, window)

    torch.testing.assert_close(output, by_hand(query, key, value, lengths, causal, window, None))


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("window", [None, 4])
def test_position_bias_starts_anew_in_each_sequence(causal: bool, window: int | None) -> None:
    lengths = [3, 3, 8]
    query, key, value = projected(14), projected(14), projected(14)
    bias = torch.randn(1, HEADS, 8, 8)

    with use(plan_of(lengths)):
        output, _ = attention(
            SimpleNamespace(is_causal=causal), query, key, value, None, D**-0.5, None, window, position_bias=bias
        )

    torch.testing.assert_close(output, by_hand(query, key, value, lengths, causal, window, bias))


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_bias_that_is_the_same_for_all_keys_changes_nothing(causal: bool, window: int | None) -> None:
    query, key, value = projected(14), projected(14), projected(14)
    layer, bias = SimpleNamespace(is_causal=causal), torch.randn(1, HEADS, 1, 1)

    with use(plan_of([3, 3, 8])):
        output, _ = attention(layer, query, key, value, None, D**-0.5, None, window, position_bias=bias)

    torch.testing.assert_close(output, by_hand(query, key, value, [3, 3, 8], causal, window, None))


def test_only_a_mask_of_nothing_is_taken_in_a_packed_row() -> None:
    query, key, value = projected(5), projected(5), projected(5)
    layer = SimpleNamespace(is_causal=True)
    with use(plan_of([3, 2])):
        output, _ = attention(layer, query, key, value, no_mask(query.device), D**-0.5)
        with pytest.raises(ValueError, match="mask of its own"):
            attention(layer, query, key, value, torch.ones(1, 1, 5, 5, dtype=torch.bool), D**-0.5)
    torch.testing.assert_close(output, by_hand(query, key, value, [3, 2], True, None, None))


def test_filler_behind_the_last_sequence_gets_zeros_and_is_not_seen() -> None:
    query, key, value = projected(9), projected(9), projected(9)
    with use(plan_of([4, 2], filler=3)):
        output, _ = attention(SimpleNamespace(is_causal=False), query, key, value, None, D**-0.5)
    first = [part[:, :, :6] for part in (query, key, value)]
    torch.testing.assert_close(output[:, :6], by_hand(*first, [4, 2], False, None, None))
    assert not output[:, 6:].any()


def test_without_a_plan_it_is_plain_attention_with_the_mask_it_is_given() -> None:
    query, key, value = (torch.randn(2, HEADS, 5, D) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[..., 0] = True
    output, _ = attention(SimpleNamespace(is_causal=False), query, key, value, mask, D**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_plan_ends_with_its_block_even_when_the_block_fails() -> None:
    query = torch.randn(2, HEADS, 5, D)
    with pytest.raises(RuntimeError, match="boom"), use(plan_of([5])):
        raise RuntimeError("boom")
    attention(SimpleNamespace(is_causal=False), query, query, query, None, D**-0.5)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(HEADS)}, "s_aux"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "mask of its own"),
        ({"key": torch.randn(1, HEADS, 7, D)}, "not packed self-attention"),
        ({"query": torch.randn(2, HEADS, 5, D)}, "not packed self-attention"),
    ],
    ids=["softcap", "sinks", "mask", "cross-attention", "two rows"],
)
def test_what_it_does_not_know_is_refused_while_packed(wrong: dict[str, Any], complaint: str) -> None:
    call = {name: projected(5) for name in ("query", "key", "value")}
    with use(plan_of([5])), pytest.raises(ValueError, match=complaint):
        attention(SimpleNamespace(is_causal=False), **{**call, "attention_mask": None, **wrong})


def flash_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of varlen_attn: rows (total, heads, d); a window of (left, right) keys, -1 for all."""
    assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa is (query.shape[1] != key.shape[1])
    left, right = window_size
    outputs = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        seen = ((left < 0) | (distance <= left)) & ((right < 0) | (distance >= -right))
        rows = [part[start:end].transpose(0, 1)[None] for part in (query, key, value)]
        output = torch.nn.functional.scaled_dot_product_attention(*rows, seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def older_flash(*args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """As in versions of torch that cannot share key heads."""
    return flash_by_hand(*args, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [flash_by_hand, older_flash])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_one_kernel_for_all_sequences_is_told_the_same_rule(
    kernel: Any, causal: bool, window: int | None, key_heads: int
) -> None:
    lengths = [2, 2, 7, 13]
    query, key, value = projected(24), projected(24, key_heads), projected(24, key_heads)
    output = one_kernel(kernel, query, key, value, plan_of(lengths), Rule(D**-0.5, causal, window, None))
    torch.testing.assert_close(output, by_hand(query, key, value, lengths, causal, window, None))


def test_runs_are_neighbours_of_equal_length() -> None:
    assert runs([2, 2, 5, 2]) == (Run(0, 2, 2), Run(4, 1, 5), Run(9, 1, 2))
