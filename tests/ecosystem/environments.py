"""Virtual environments in ``.venv-ecosystem/``, made once and kept until what they must hold changes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.ecosystem.absent_cuda import stand_in

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".venv-ecosystem"
TORCH = os.environ.get("TORCH", "2.13.0")


class NotInstalled(Exception):
    """pip's own last words."""


def environment(name: str, requirements: Sequence[str], torch: str = TORCH, extras: str = "") -> Path:
    """The Python of an environment that holds this package, with ``extras`` (``"[report]"``), and ``requirements``.

    torch goes in first and stays pinned: an open range would drag in gigabytes of CUDA packages.

    Raises:
        NotInstalled: pip finds no set of versions, or one with CUDA in it; or torchvision's operators can't load.
    """
    folder = KEPT / name
    python, mark = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join([f"torch=={torch}", extras, *sorted(requirements), (ROOT / "pyproject.toml").read_text()])
    if mark.exists() and mark.read_text() == wanted:
        return python
    print(f"installing {', '.join(requirements)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"torch=={torch}"]
    _checked(pip)
    _checked([*pip, "--editable", f"{ROOT}{extras}", *requirements])
    if any(folder.glob("lib/python*/site-packages/nvidia_*")):
        raise NotInstalled("pip brought CUDA packages along; take a torch without them")
    try:
        stand_in(next(folder.glob("lib/python*/site-packages")))
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotInstalled(f"torchvision needs a C compiler where torch has no CUDA: {error}") from error
    mark.write_text(wanted)
    return python


def _checked(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotInstalled(error_line(done.stderr))


def error_line(output: str) -> str:
    """The last line that is an error, without warnings and hints of pip."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no words at all")
