"""What a run was on, and whether it had the machine for itself."""

import os
import platform
import re
import resource
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "numpy", "zarr", "numcodecs", "polars")
BUSY = 0.25
"""Cores' worth of other work from which a machine counts as loaded."""


def describe() -> dict[str, Any]:
    """Processor, memory, system and the library versions that matter; JSON-able, and no name of a host or a person."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine as a part of a file name, such as ``amd-epyc-2-cores``."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['processor']} {machine['cores']} cores".lower()).strip("-")


def commit() -> str | None:
    """The commit that was measured, with ``+changes`` if files differ from it; null outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Load:
    """How many cores' worth of work others did on this machine since it was made."""

    def __init__(self):
        self._began = self._now()

    def others(self) -> float | None:
        """Cores; null where the system does not tell (it does on Linux)."""
        then, now = self._began, self._now()
        if then is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(then, now, strict=True))
        return round(max(0.0, (busy - own) / wall), 2)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: wall, busy of all cores, busy of this process and its finished children."""
        if not (stat := Path("/proc/stat")).is_file():
            return None
        user, nice, system, _idle, _waiting, *interrupts = map(int, stat.read_text().split("\n", 1)[0].split()[1:8])
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), busy, sum(one.ru_utime + one.ru_stime for one in used)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()
