"""Weights & Biases without interruption of training: without an API key or a network, runs are recorded offline.

``wandb`` is imported inside the functions only.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn


def offline_without_key() -> bool:
    """Switches this process's W&B runs to offline mode if there is no API key. Needs no prompt and no network.

    It prints nothing, because wandb itself prints the mode when a run starts. It changes nothing if wandb is not
    installed or ``WANDB_MODE`` is set. Call it before the first run starts.

    Returns:
        Whether it switched to offline mode.
    """
    if "WANDB_MODE" in os.environ or os.environ.get("WANDB_API_KEY") or find_spec("wandb") is None:
        return False
    if _key_is_known():
        return False
    os.environ["WANDB_MODE"] = "offline"
    return True


def _key_is_known() -> bool:
    """Whether ``wandb.init`` would find a key or another mode: in settings, an identity token, netrc, or a login.

    Settings are read into a new object: wandb loads its global ones once, and would not read a ``WANDB_MODE`` that is
    set after that.
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
"""How long `SafeWandbLogger` waits for the server."""


class SafeWandbLogger(WandbLogger):
    """A ``WandbLogger`` that records offline if a run can't start online for lack of a key, a network or a server.

    It waits half a minute for the server (W&B: a minute and a half); ``settings=`` changes that.
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
