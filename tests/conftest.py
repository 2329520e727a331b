import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def every_test_ends_its_wandb_service() -> Iterator[None]:
    """An open run would be taken over by the next logger, and a service is found by a variable of the environment,
    which a test that gives back the environment it found would bring back when the service is long gone."""
    yield
    if "WANDB_SERVICE" in os.environ:
        import wandb

        wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)
