"""What machine a figure was made on."""

import os
import platform
import resource
import sys
from pathlib import Path


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_machine() -> dict:
    """Processor, cores, memory in GB and load average of this machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        model = facts.get("model name", model)
        if "cpu family" in facts:
            model += f" (family {facts['cpu family']}, model {facts['model']})"
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """The most memory that this process, or the largest of its children, has taken."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def stolen() -> float:
    """Seconds of all cores together that this virtual machine has waited while its host ran others.

    Since it started, as Linux counts them; 0 where nothing is told.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    return int(stat.read_text().split()[8]) / os.sysconf("SC_CLK_TCK")
