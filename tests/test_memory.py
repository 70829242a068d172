"""What a process that chats takes, beyond what importing torch does."""

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

def taken(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(2)
before = taken("VmHWM")
import pentad
model = pentad.load(sys.argv[1], context=2048)
model.chat("What is the capital of France?", temperature=0, max_tokens=64)
print(json.dumps({"peak": taken("VmHWM") - before, "now": taken("VmRSS") - before, "cache": model.step.cache.nbytes}))
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_chat_takes_weights_cache_and_80_mb(smollm2: Path) -> None:
    """Blocks lie in memory once: the file's pages go when the kernels have packed them, tensor by tensor."""
    run = subprocess.run([sys.executable, "-c", CHAT, smollm2], capture_output=True, text=True, check=True)
    taken = json.loads(run.stdout)
    weights = [entry.nbytes for entry in pentad.weights.open(smollm2).tensors.values()]
    assert taken["now"] <= sum(weights) + taken["cache"] + 80e6
    assert taken["peak"] <= sum(weights) + taken["cache"] + 80e6 + max(weights)
