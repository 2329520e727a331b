"""Curves in a local Trackio project."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trackio")

RUN = """
import warnings; warnings.simplefilter("ignore")
from lightning_memsink import LiveCurves
from lightning_memsink.reporting.loggers.trackio import TrackioLogger
from tests.support.small_runs import fit, watch
fit([*watch(), LiveCurves()], logger=TrackioLogger("small", "one"))
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("small", "one")
gaps = {row["step"]: row["memsink/gap"] for row in rows if "memsink/gap" in row}
print("steps", sorted(gaps), "memorized", rows[-1].get("memsink/verdict/memorized"))
"""


@pytest.mark.slow
def test_every_evaluation_is_in_the_project(tmp_path):
    """In a process of its own, since Trackio takes its folder from the environment when it is imported."""
    root = Path(__file__).parents[2]
    environment = {"PATH": "", "HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=False)
    assert "steps [7, 14, 21, 28, 35, 42, 49, 56, 63] memorized 4" in result.stdout, result.stderr[-2000:]
