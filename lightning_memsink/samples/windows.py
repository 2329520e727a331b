"""The windows that a long document is cut into: one visit a pass, whose loss is the mean over all of its tokens.

V  windows, in the order in which they were trained on
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.samples.loss_table import LossTable


def join_windows(
    table: LossTable, rows: Tensor, losses: Tensor, tokens: Tensor, windows: Tensor, epochs: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a visit's loss is after each window, and which windows go on with a visit.

    A visit begins with an epoch, and where its first window comes again. A window without a finite loss adds nothing.

    Args:
        table: of the samples, in which the visits that may go on are noted.
        rows: ``[V]`` rows of the table.
        losses: ``[V]`` mean over the tokens of each window.
        tokens: ``[V]`` how many of them have a loss.
        windows: ``[V]`` int64 hashes of the windows.
        epochs: ``[V]`` in which they were trained on.
        steps: ``[V]`` optimizer steps before.

    Returns:
        Losses ``[V]`` of the visits so far, the tokens ``[V]`` that they are of, and bool ``[V]`` where a window is a
        further part of a visit.
    """
    losses, tokens, is_part = losses.float().clone(), tokens.clone(), torch.zeros(len(rows), dtype=torch.bool)
    for some in _rounds(rows):
        at, known = rows[some], torch.isfinite(losses[some])
        goes_on = (table.window_epoch[at] == epochs[some].short()) & (table.window[at] != windows[some])
        before = torch.where(goes_on, table.window_tokens[at], 0)
        own = torch.where(known, tokens[some], 0)
        total = before + own
        weighed = table.last_loss[at].nan_to_num() * before + losses[some].nan_to_num() * own
        losses[some] = torch.where(total > 0, weighed / total, torch.nan)
        tokens[some], is_part[some] = total.to(tokens.dtype), goes_on
        table.write("window_tokens", at, total)
        table.write("window", at, torch.where(goes_on, table.window[at], windows[some]))
        table.write("window_epoch", at, epochs[some])
        table.write("window_step", at, torch.where(goes_on, table.window_step[at], steps[some].int()))
        is_known = total > 0
        table.last_loss[at[is_known]] = losses[some][is_known]
    return losses, tokens, is_part


def _rounds(rows: Tensor) -> list[Tensor]:
    """Places ``[V]`` in groups in which no row comes twice, each row's places in their order."""
    order = rows.argsort(stable=True)
    sorted_rows = rows[order]
    starts = torch.ones_like(sorted_rows, dtype=torch.bool)
    starts[1:] = sorted_rows[1:] != sorted_rows[:-1]
    first = torch.arange(len(rows))[starts]
    rank = torch.arange(len(rows)) - first[starts.cumsum(0) - 1] if len(rows) else rows
    return [order[rank == number] for number in range(int(rank.max()) + 1 if len(rows) else 0)]
