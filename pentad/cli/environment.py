"""``pentad env``: a description of the machine for bug reports."""

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pentad
from pentad.cli import output
from pentad.cli.options import Json

PEERS = ("transformers", "llama-cpp-python")  # not needed, but shown if installed


def env(as_json: Json = False) -> None:
    """Describe this machine, for bug reports.

    Shows versions, processor, devices, cache folders and missing packages.

    JSON: pentad, python, packages {name: version or null}, missing, platform, cpu, cores, memory,
    threads, instructions, kernels, devices, caches.
    """
    facts = _facts()
    if as_json:
        output.write_json(facts)
        return
    packages = facts.pop("packages")
    caches = facts.pop("caches")
    rows = [(name, _plain(value)) for name, value in facts.items() if value not in (None, [])]
    rows += [(name, version) for name, version in packages.items() if version]
    rows += [(f"{name} cache", path) for name, path in caches.items()]
    output.write_table(rows)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts() -> dict[str, Any]:
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from pentad import kernels
    from pentad.weights.cache import cache_folder

    requirements = [line for line in metadata.requires("pentad") or [] if "extra ==" not in line]
    needed = [re.split(r"[^\w-]", line)[0] for line in requirements]
    packages = {name: _version(name) for name in (*needed, *PEERS)}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(f"cuda:{i} ({name})" for i, name in enumerate(gpus))]
    return {
        "pentad": pentad.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "missing": [name for name in needed if packages[name] is None],
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory": _memory(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": next(iter(kernels.isas()), None) or f"none: {kernels.reason()}",
        "devices": devices + (["mps"] if torch.backends.mps.is_available() else []),
        "packages": packages,
        "caches": {"pentad": str(cache_folder()), "hugging face": HF_HUB_CACHE},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name, as the system gives it."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return platform.processor() or platform.machine()


def _memory() -> str | None:
    from pentad.memory import physical_memory

    nbytes = physical_memory()
    return None if nbytes is None else output.size(nbytes)
