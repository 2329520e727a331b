import os
import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def every_test_begins_with_one_thread() -> None:
    """A benchmark takes more; processes forked by a later test would then wait for threads that they do not have."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def every_test_ends_its_wandb_run_and_session() -> Iterator[None]:
    """An open run would be taken over by the next logger; settings are read once, and a mode that was disabled would
    stay; and a service is found by a variable of the environment, which a test that gives back the environment it found
    would bring back when the service is long gone."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is None:
        return
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture(autouse=True)
def every_test_leaves_no_function_mode_on() -> Iterator[None]:
    """One that stays on watches the torch calls of all later tests, which then pass a hundred times slower."""
    yield
    left = torch._C._len_torch_function_stack()
    for _ in range(left):
        torch._C._pop_torch_function_stack()
    assert not left, f"{left} torch function modes are still on: call StepReader.end() or StepWatch.stop()"
