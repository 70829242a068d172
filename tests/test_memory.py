"""Memory of a process that chats, beyond importing torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pentad.weights
from tests.helpers.programs import needs_kernels

CHAT = """
import json, re, sys
import torch

def status_bytes(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(2)
before = status_bytes("VmHWM")
import pentad
model = pentad.load(sys.argv[1], context=2048)
model.chat("What is the capital of France?", temperature=0, max_tokens=64)
peak, now = status_bytes("VmHWM") - before, status_bytes("VmRSS") - before
print(json.dumps({"peak": peak, "now": now, "cache": model.step.cache.nbytes}))
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_chat_needs_at_most_weights_cache_and_80_mb(smollm2: Path) -> None:
    """Blocks are in memory once: the kernels pack one tensor at a time and then release the file's pages."""
    run = subprocess.run([sys.executable, "-c", CHAT, smollm2], capture_output=True, text=True, check=True)
    memory = json.loads(run.stdout)
    weights = [entry.nbytes for entry in pentad.weights.open(smollm2).tensors.values()]
    assert memory["now"] <= sum(weights) + memory["cache"] + 80e6
    assert memory["peak"] <= sum(weights) + memory["cache"] + 80e6 + max(weights)
