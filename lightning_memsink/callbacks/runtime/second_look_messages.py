"""Why a second look has not measured samples, and what to type."""

from __future__ import annotations

from collections.abc import Sequence

OFF = "MemorizationDetector(recheck=0) judges samples by their visits alone."
MANUAL = "under manual optimization training_step trains, and there is no validation_step"

NO_BATCH = "none of their rows could be fetched, or all brought other samples than before"


def of_error(error: Exception) -> str:
    """An error of the user's code in one line."""
    lines = f"{error}".strip().split("\n")
    if lines[0].startswith("Caught "):  # in a worker, whose traceback the text is
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else repr(error)


def failed(reason: str) -> str:
    """No sample of a look was measured."""
    return (
        f"memsink could not measure samples again that were trained on: {reason.rstrip('.')}. Training goes on, and "
        f"samples are judged by their visits. {OFF}"
    )


def falls_back(reason: str) -> str:
    """The validation step can't take what the training loader gives."""
    return (
        "memsink measures samples again by training_step in evaluation mode, since validation_step can't take their "
        f"batches: {reason.rstrip('.')}."
    )


def left_out(missed: int, asked: int, reasons: Sequence[str]) -> str:
    """Some samples of a look were not measured."""
    why = f" ({reasons[0].rstrip('.')})" if reasons else ""
    return (
        f"memsink could not measure {missed} of {asked} samples again: their rows can't be fetched, or bring other "
        f"samples than before{why}. They get no verdict from such a look. {OFF}"
    )
