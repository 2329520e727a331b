"""Rules of provenance for layers over sequences: attention, recurrence, packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.layout_rules import regroup
from lightning_memsink.losses.provenance import Owners, Part, Provenance, Rows, collapse, merge, rows
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each, tensors_in, with_shared, within


def attention(call: Call) -> Outcome:
    """``F.scaled_dot_product_attention``: within samples, keys and values are those of the query's sample."""
    query, key, value = call.tensor(0, "query"), call.tensor(1, "key"), call.tensor(2, "value")
    mask = call.get(3, "attn_mask")
    ndim = len(call.shape)
    parts: list[Part] = [(within(call, query, [-1]), [*query.shape[:-1], 1])]
    parts.append((within(call, key, [-1, -2]), [*key.shape[:-2], 1, 1]))
    parts.append((within(call, value, [-2]), [*value.shape[:-2], 1, value.shape[-1]]))
    if isinstance(mask, Tensor):
        parts.append((within(call, mask, [-1]), [*mask.shape[:-1], 1]))
    if len(query.shape) > 2 and query.shape[-3] != key.shape[-3]:  # grouped heads
        if any(isinstance(p, Rows) and any(o.shape[-3] != 1 for o in p.candidates) for p, _ in parts):
            raise NotFollowed
    return merge([(p, [1] * (ndim - len(e)) + list(e)) for p, e in parts], call.shape)


def multi_head_attention(call: Call) -> Outcome:
    """``F.multi_head_attention_forward``: ``[L, N, E]`` or ``[L, E]``; weights ``[N, L, S]`` are the second result."""
    query, key, value = call.tensor(0, "query"), call.tensor(1, "key"), call.tensor(2, "value")
    padding, mask = call.kwargs.get("key_padding_mask"), call.kwargs.get("attn_mask")
    output = tensors_in([call.result])[0]
    parts: list[Part] = [(within(call, query, [-1]), query.shape)]
    for operand in (key, value):
        parts.append((within(call, operand, [0, -1]), [1, *operand.shape[1:]]))
    if isinstance(padding, Tensor) and call.of(padding) is not None:
        ones = within(call, padding, [-1])
        parts.append(
            (each(ones, lambda o: o.reshape(1, -1, 1) if padding.ndim == 2 else o.reshape(1, 1)), output.shape)
        )
    own = [query, key, value, padding]
    if isinstance(mask, Tensor) and mask.ndim == 3 and call.of(mask) is not None:
        parts.append(
            (
                each(within(call, mask, [1, 2]), lambda owners: _of_heads(owners, query.shape[1], len(mask))),
                output.shape,
            )
        )
        own.append(mask)
    merged = with_shared(call, merge(parts, output.shape), own, output.shape)
    results = tensors_in([call.result])
    if len(results) == 1:
        return [merged]
    weights = merged
    if output.ndim == 3:  # [L, N, 1] -> [N, L, 1], with a head axis if weights have one
        weights = each(merged, lambda owners: owners.transpose(0, 1))
        if results[1].ndim == 4:
            weights = each(weights, lambda owners: owners.unsqueeze(1))
    elif results[1].ndim == 3:
        weights = each(merged, lambda owners: owners.unsqueeze(0))
    return [merged, weights]


def _of_heads(owners: Owners, samples: int, count: int) -> Owners:
    """From a mask ``[samples * heads, L, S]`` to ``[1, samples, 1]``."""
    by_sample = collapse(regroup(owners, (count, 1, 1), (samples, count // samples)), [1])
    if by_sample is None:
        raise NotFollowed
    return by_sample.reshape(1, -1, 1)


def encoder_layer(call: Call) -> Outcome:
    """``torch._transformer_encoder_layer_fwd``: ``[N, L, E]``."""
    source = call.tensor(0, "src")
    return with_shared(call, within(call, source, [1, 2]), [source], call.shape)


def native_attention(call: Call) -> Outcome:
    operands = [call.tensor(position, name) for position, name in enumerate(("query", "key", "value"))]
    results = tensors_in([call.result])
    provenance = merge([(within(call, o, [1, 2]), [o.shape[0], 1, 1]) for o in operands], operands[0].shape)
    provenance = with_shared(call, provenance, operands, operands[0].shape)
    return [each(provenance, lambda o, n=result.ndim: o.reshape([-1] + [1] * (n - 1))) for result in results]  # type: ignore[misc]


def recurrent(call: Call) -> Outcome:
    """lstm, gru, rnn of torch._VF: output, then the last states ``[layers, N, hidden]``."""
    source, second, third = call.args[:3]
    results = tensors_in([call.result])
    if isinstance(third if call.name != "lstm" else second, Tensor):  # packed: the second argument is batch_sizes
        return _packed(call, source, second, third, results)
    batch_first = bool(call.args[8])
    states = tensors_in([second])
    batch = 0 if batch_first else 1
    parts: list[Part] = [(_batch_axis(within(call, source, [1 - batch, 2]), batch), (1, source.shape[batch], 1))]
    parts += [(within(call, state, [0, 2]), (1, state.shape[1], 1)) for state in states]
    shape = (1, source.shape[batch], 1)
    state = with_shared(call, merge(parts, shape), [source, *states], shape)
    output = each(state, lambda owners: owners.transpose(0, 1)) if batch_first else state
    return [output, *[state] * (len(results) - 1)]


def _batch_axis(provenance: Provenance | None, batch: int) -> Provenance | None:
    return each(provenance, lambda owners: owners.transpose(0, 1)) if batch == 0 else provenance


def _packed(call: Call, source: Tensor, batch_sizes: Tensor, states: Any, results: Sequence[Tensor]) -> Outcome:
    """The first ``batch_sizes[t]`` sequences of each step stand below one another."""
    sizes = batch_sizes.tolist()
    provenance = within(call, source, [1])
    if not isinstance(provenance, Rows) or len(provenance.candidates) != 1:
        raise NotFollowed
    owners = provenance.candidates[0].expand(source.shape[0], 1)
    first = owners[: sizes[0]]
    if not all(torch.equal(first[: len(step)], step) for step in owners.split(sizes)):
        raise NotFollowed
    state: Provenance | None = rows([first.reshape(1, -1, 1)])
    shape = (1, sizes[0], 1)
    parts = [(within(call, s, [0, 2]), shape) for s in tensors_in([states])]
    merged = merge([(state, shape), *parts], shape)
    merged = with_shared(call, merged, [source, *tensors_in([states])], shape)
    if not isinstance(merged, Rows) or not torch.equal(merged.candidates[0], state.candidates[0]):  # type: ignore[union-attr]
        raise NotFollowed
    return [provenance, *[merged] * (len(results) - 1)]


def cell(call: Call) -> Outcome:
    """lstm_cell, gru_cell, rnn_tanh_cell: ``[N, features]``."""
    source = call.tensor()
    states = tensors_in([call.get(1, "hx")])
    shape = (*source.shape[:-1], 1)
    provenance = merge([(within(call, operand, [-1]), shape) for operand in (source, *states)], shape)
    provenance = with_shared(call, provenance, [source, *states], shape)
    return provenance if isinstance(call.result, Tensor) else [provenance] * len(call.result)


def pack(call: Call) -> Outcome:
    """``torch._pack_padded_sequence(input, lengths, batch_first)`` and its inverse, applied to the owners."""
    source = call.tensor(0, "input", "data")
    provenance = within(call, source, range(2 if call.name == "_pack_padded_sequence" else 1, source.ndim))
    if not isinstance(provenance, Rows):
        return [provenance, None]
    packs = call.name == "_pack_padded_sequence"
    found = []
    for owners in provenance.candidates:
        full = owners.expand(*source.shape[: 2 if packs else 1], *owners.shape[2 if packs else 1 :]).contiguous()
        args = [full, *[argument.cpu() if isinstance(argument, Tensor) else argument for argument in call.args[1:]]]
        if not packs:
            args[3] = -1  # the value of padding
        moved = call.func(*args)[0]
        whole = None if packs else collapse(moved, [1 if call.args[2] else 0])  # padding of a sequence is its sample's
        found.append(moved if whole is None else whole)
    return [rows(found), None]


RULES: dict[str, Rule] = {
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head_attention,
    "_transformer_encoder_layer_fwd": encoder_layer,
    "_native_multi_head_attention": native_attention,
    **dict.fromkeys("lstm gru rnn_tanh rnn_relu".split(), recurrent),
    **dict.fromkeys("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split(), cell),
    "_pack_padded_sequence": pack,
    "_pad_packed_sequence": pack,
}
