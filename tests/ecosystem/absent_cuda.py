"""Lets the torchvision that pip installs load its compiled operators beside a torch without CUDA.

Released torchvision wheels are linked against CUDA's runtime and torch's CUDA libraries. On a machine without them the
operators do not load, and ``import torchvision`` fails. Everything that runs on a CPU is in the wheel, though: empty
libraries of the missing names, whose functions do nothing, are enough.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so", "libcudart.so.13")


def stand_in(packages: Path) -> None:
    """Writes the missing libraries beside torch, and loads them whenever Python starts.

    Args:
        packages: the environment's ``site-packages``; nothing happens if it has no torchvision, or a torch with CUDA.

    Raises:
        FileNotFoundError: there is no C compiler, or no `nm`.
        subprocess.CalledProcessError: one of them fails.
    """
    compiled, folder = packages / "torchvision" / "_C.so", packages / "torch" / "lib"
    if sys.platform != "linux" or not compiled.exists() or (folder / "libtorch_cuda.so").exists():
        return
    missing = _symbols(compiled, "--undefined-only")
    missing = missing.difference(*(_symbols(library, "--defined-only") for library in folder.glob("lib*.so")))
    names = sorted(name for name in missing if "4cuda" in name or name.startswith(("cuda", "__cuda")))
    code = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in names)
    for name in LIBRARIES:
        command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(folder / name), "-x", "c", "-"]
        subprocess.run(command, input=code if name == LIBRARIES[0] else "", text=True, check=True, capture_output=True)
    loads = "; ".join(f"ctypes.CDLL({str(folder / name)!r})" for name in LIBRARIES)
    (packages / "absent_cuda.pth").write_text(f"import ctypes; {loads}\n")


def _symbols(library: Path, kind: str) -> set[str]:
    """Names of a library's dynamic symbols, without their versions."""
    listed = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
