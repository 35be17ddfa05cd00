"""What every number that is quoted carries: hardware, command, commit and date, as the head of a result.

print(circumstances())

- hardware: AMD EPYC 9B14, 2 cores, 25 GB, one H100
- command: `python tests/benchmarks/bench_freeze.py --shape small`
- commit: 69a97f9-dirty
- date: 2026-11-26
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPUS = Path("/proc/cpuinfo")


def circumstances(beside: str = "") -> str:
    """Four lines of a Markdown list; `beside` is added to the hardware, e.g. "one thread, model in float32".
    Of an absolute path in the command, which tells of nobody else's machine, the name is given."""
    script = Path(sys.argv[0]).resolve()
    arguments = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    command = ["python", str(script.relative_to(ROOT)), *arguments]
    lines = {
        "hardware": ", ".join([hardware(), *([beside] if beside else [])]),
        "command": f"`{shlex.join(command)}`",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def hardware() -> str:
    import torch

    lines = CPUS.read_text().splitlines() if CPUS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join([cpu, f"{memory_gb:.0f} GB", *gpus])


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
