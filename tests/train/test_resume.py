"""Runs that are killed, and disks that fail: the last good checkpoint is always there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training import recipe, train

KILLS = 20

# The process that imports torch forks the processes that train and are killed: each starts at once.
SCRIPT = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch, torch._dynamo  # which optimizers import
from pentad.train.recipe import read_recipe
from pentad.train.run import open_run

torch.set_num_threads(1)
recipe, folder, kills = read_recipe(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
open_run(recipe)  # imports what runs import

def start(resume):
    child = os.fork()
    if child:
        return child
    try:
        open_run(recipe).train(resume=resume, note=lambda _: None, report=lambda _: None)
        os._exit(0)
    finally:
        os._exit(1)

def finished(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

started = time.perf_counter()
assert finished(start(False))
seconds = time.perf_counter() - started
expected = (folder / "final" / "model.safetensors").read_bytes()
chance, equal = random.Random(0), 0
for _ in range(kills):
    shutil.rmtree(folder)
    child = start(False)
    time.sleep(seconds * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert finished(start(True))
    equal += (folder / "final" / "model.safetensors").read_bytes() == expected
    assert len((folder / "log.jsonl").read_text().splitlines()) == recipe.run.steps
print(equal)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(tmp_path: Path, base: Path) -> None:
    given = recipe(tmp_path, base, "run.steps=12", "run.checkpoint_every=1", "run.micro_batch_tokens=40", "run.ema=0.9")
    file = tmp_path / "killed.toml"
    tables = given.model_dump(exclude_none=True, exclude_defaults=True)
    lines = [f"objective = {json.dumps(tables.pop('objective'))}"]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    file.write_text("\n".join(lines))
    arguments = [str(file), given.run.out, str(KILLS)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == KILLS


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_disk_that_fails_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path: Path, base: Path) -> None:
    import resource
    import signal

    from pentad.errors import PentadError
    from pentad.train import checkpoint

    given = recipe(tmp_path, base)
    train(given, kill_after=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(PentadError, match="step-4"):
            train(given, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    folder = tmp_path / "run/checkpoints"
    saved = checkpoint.latest(folder)
    assert saved is not None
    assert saved.step == 2
    assert [path.name for path in folder.iterdir()] == ["step-2"]
    final, _ = train(given, resume=True)
    assert (final / "model.safetensors").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, base: Path) -> None:
    from pentad.errors import PentadError

    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "run", Path("/proc/pentad")):
        with pytest.raises(PentadError, match=str(out)) as caught:
            train(recipe(tmp_path, base, f"run.out={out}"))
        assert "\n" not in str(caught.value)
