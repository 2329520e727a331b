"""Weights & Biases that never stops a training: without key or network a run is recorded offline.

Nothing here is imported before it is used, and ``wandb`` itself only inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_memsink._lightning import is_a


def offline_without_key() -> bool:
    """Records W&B runs of this process offline if no API key can be found. Never prompts, never asks the network.

    Says nothing: who uses W&B reads it in wandb's own opening lines.

    Leaves everything alone where wandb is not installed or ``WANDB_MODE`` is set. Call it before the first run.

    Returns:
        Whether it switched to offline.
    """
    if "WANDB_MODE" in os.environ or os.environ.get("WANDB_API_KEY") or find_spec("wandb") is None:
        return False
    if _key_is_known():
        return False
    os.environ["WANDB_MODE"] = "offline"
    return True


def _key_is_known() -> bool:
    """What ``wandb.init`` would find: a settings file, an identity token, netrc, or a login in this process.

    Settings are read into an object of our own: wandb's global ones are loaded once, and would not see
    ``WANDB_MODE`` set after that.
    """
    from wandb import Settings
    from wandb.sdk.lib import wbauth

    settings = Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    if settings.mode != "online" or settings.api_key or settings.identity_token_file:
        return True
    host = settings.base_url
    return bool(wbauth.session_credentials(host=host) or wbauth.read_netrc_auth(host=host))


SECONDS = 30.0


class SafeWandbLogger(WandbLogger):
    """``WandbLogger`` that records offline when a run can't be started online: no key, no network, no server.

    It waits half a minute for the server, where W&B waits a minute and a half; ``settings=`` changes that.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at the first call."""
        if self._experiment is None and "settings" not in self._wandb_init:
            from wandb import Settings

            self._wandb_init["settings"] = Settings(init_timeout=SECONDS)
        try:
            return super().experiment
        except Exception as error:  # wandb raises UsageError, CommError, AuthenticationError, TimeoutError and others
            if self._wandb_init.get("mode") == "offline":
                raise
            self._offline = True
            self._wandb_init["mode"] = "offline"
            rank_zero_warn(
                f"W&B can't start an online run ({type(error).__name__}: {error}). This one is recorded offline; "
                "upload it later with `wandb sync PATH`."
            )
            return super().experiment


def keep_files(logger: Logger, files: Iterable[Path]) -> None:
    """Files and folders as a W&B artifact of type ``memsink-report``, with the run; nothing for other loggers."""
    if not is_a(logger, WandbLogger) or logger.experiment.disabled:
        return
    from wandb import Artifact

    run = logger.experiment
    artifact = Artifact(f"memsink-{run.id}", type="memsink-report")
    for path in files:
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path), name=path.name)
    run.log_artifact(artifact)


def how_to_open(logger: Logger) -> str | None:
    """Where a W&B run is and what to type; None for other loggers and disabled runs."""
    if not is_a(logger, WandbLogger):
        return None
    run = logger.experiment
    if run.disabled:
        return None
    if run.offline:
        where = run.settings.sync_dir
        return f"W&B run, recorded offline.\n  Look at it: wandb leet {where}\n  Upload it: wandb sync {where}"
    return f"W&B run: {run.url}"
