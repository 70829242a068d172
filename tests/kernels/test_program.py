"""Argument checks, loading the library, choosing an instruction set, threads and forks."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad import kernels
from pentad.kernels import Buffer, CachePools, Norm, Program, Tokens, Weight
from tests.helpers.blocks import random_blocks
from tests.helpers.programs import needs_kernels, packed, product, program, run_rows

ROOT = Path(__file__).parents[2]


def small(**options: Any) -> Program:
    """Make a program of an embedding, attention with 2 heads of 16 dimensions, and a matmul."""
    made = Program(head_dim=16, kv_heads=1, layers=1, threads=2, **options)
    made.embed(Weight.floats(torch.randn(10, 64)), Buffer.PROJECTED)
    made.attention(0, 2)
    made.matmul([Weight.floats(torch.randn(5, 32))], Buffer.ATTENDED, Buffer.LOGITS, wanted=True)
    return made


def tokens(**changes: Any) -> Tokens:
    fields = {"ids": [1, 2, 3], "past": 0, "dropped": 0, "pages": [2], "rotation": torch.zeros(64, 2, 8)}
    return Tokens(**{**fields, **changes})


def pools(**changes: Any) -> CachePools:
    fields = {"keys": [torch.zeros(64, 1, 16)], "values": [torch.zeros(64, 1, 16)], "page_size": 16}
    return CachePools(**{**fields, **changes})


@needs_kernels
def test_a_small_program_runs() -> None:
    assert torch.isfinite(small().run([tokens()], [0, 2], pools())).all()
    assert small().run([tokens()], [], pools()).shape == (0, 5)
    assert small().run([], [], pools()).shape == (0, 5)


@needs_kernels
@pytest.mark.parametrize(
    "bad",
    [
        {"ids": [10]},
        {"ids": [-1]},
        {"pages": []},
        {"pages": [4]},
        {"pages": [-1]},
        {"past": 14},
        {"past": -1},
        {"past": 20, "pages": [0, 1], "dropped": 8},
        {"past": 4, "dropped": 16},
        {"past": 62, "pages": [0, 1, 2, 3, 0]},
        {"rotation": torch.zeros(64, 2, 7)},
        {"rotation": torch.zeros(2, 2, 8)},
        {"rotation": torch.zeros(64, 2, 8, dtype=torch.float64)},
        {"rotation": torch.zeros(64, 8, 2).mT},
    ],
)
def test_invalid_tokens_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        small().run([tokens(**bad)], [0], pools())


@needs_kernels
@pytest.mark.parametrize("wanted", [[3], [-1]])
def test_invalid_wanted_rows_are_refused(wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted row"):
        small().run([tokens()], wanted, pools())


@needs_kernels
def test_wanted_rows_of_a_plan_that_returns_all_are_refused() -> None:
    made = program()
    made.embed(Weight.floats(torch.zeros(8, 4)), Buffer.LOGITS)
    with pytest.raises(ValueError, match="all 3 rows"):
        run_rows(made, [1, 2, 3], [0])


@needs_kernels
@pytest.mark.parametrize(
    "bad",
    [
        {"keys": []},
        {"keys": [torch.zeros(64, 2, 16)], "values": [torch.zeros(64, 2, 16)]},
        {"values": [torch.zeros(32, 1, 16)]},
        {"values": [torch.zeros(64, 1, 16, dtype=torch.float16)]},
        {"keys": [torch.zeros(64, 1, 16).double()], "values": [torch.zeros(64, 1, 16).double()]},
        {"keys": [torch.zeros(64, 1, 32)[..., ::2]], "values": [torch.zeros(64, 1, 32)[..., ::2]]},
        {"page_size": 8},
        {"page_size": 0},
    ],
)
def test_invalid_pools_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        small().run([tokens()], [0], pools(**bad))


@needs_kernels
def test_invalid_weights_are_refused() -> None:
    blocks = random_blocks("q4_1", 4, 64)
    for wrong in (blocks.blocks[:, :20], blocks.blocks[:3], blocks.blocks.char(), blocks.blocks.repeat(1, 2)[:, ::2]):
        with pytest.raises(ValueError, match="blocks"):
            Weight.packed(wrong, "q4_1", (4, 64))
    for type_name, columns in (("q4_1", 48), ("q4_k", 128), ("q3_k", 256), ("f32", 64), ("q4_1", 0)):
        assert not kernels.packs(type_name, columns)
        with pytest.raises(ValueError, match=type_name):
            Weight.packed(blocks.blocks, type_name, (4, columns))
    for wrong in (torch.zeros(4), torch.zeros(4, 4).double(), torch.zeros(4, 0), torch.zeros(4, 4, device="meta")):
        with pytest.raises(ValueError, match="matrix"):
            Weight.floats(wrong)
    with pytest.raises(ValueError, match="4 numbers"):
        Weight.floats(torch.zeros(4, 4), torch.zeros(5))


@needs_kernels
def test_inconsistent_operations_are_refused() -> None:
    made = program()
    made.embed(Weight.floats(torch.zeros(8, 64)))
    narrow, wide = Weight.floats(torch.zeros(3, 32)), Weight.floats(torch.zeros(3, 64))
    with pytest.raises(ValueError, match="columns"):
        made.matmul([wide, narrow], Buffer.RESIDUAL, Buffer.LOGITS)
    with pytest.raises(ValueError, match="rows of 32"):
        made.matmul([narrow], Buffer.RESIDUAL, Buffer.LOGITS)
    with pytest.raises(ValueError, match="rows of 64"):
        made.matmul([wide], Buffer.NORMED, Buffer.LOGITS)
    with pytest.raises(ValueError, match="quantized first"):
        made.matmul([packed(random_blocks("q4_1", 4, 64))], Buffer.RESIDUAL, Buffer.LOGITS)
    with pytest.raises(ValueError, match="64 numbers"):
        made.norm(Norm(torch.ones(32), 1e-5), quantize=False)
    with pytest.raises(ValueError, match="heads"):
        made.attention(0, 2)
    with pytest.raises(ValueError, match="gate"):
        made.gated([wide, Weight.floats(torch.zeros(4, 64))], Buffer.RESIDUAL)


def run_python(code: str, folder: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
@pytest.mark.skipif(os.environ.get("PENTAD_KERNELS") == "off", reason="the kernels are switched off")
def test_the_kernels_were_built() -> None:
    """Installation also succeeds without kernels, so a test must report that they are missing."""
    assert kernels.reason() is None


def test_the_kernels_can_be_switched_off() -> None:
    report = "from pentad import kernels; print(list(kernels.isas()), kernels.reason())"
    assert run_python(report, PENTAD_KERNELS="off") == "[] PENTAD_KERNELS is off"
    assert run_python(report, PENTAD_KERNELS="abacus").startswith("[] ")


@needs_kernels
@pytest.mark.parametrize("exported", [b"Flag.PAIRS", b"Op.flags", b"Step", b"MAX_SIZE"])
def test_a_library_of_another_version_is_refused(exported: bytes, tmp_path: Path) -> None:
    """The test copies pentad, and changes one name that its library exports."""
    package = Path(kernels.__file__).parents[1]
    shutil.copytree(package, tmp_path / "pentad", ignore=shutil.ignore_patterns("__pycache__", "CMake*"))
    library = tmp_path / "pentad/kernels/_kernels.so"
    content = library.read_bytes()
    library.write_bytes(content.replace(exported + b"\0", exported[:-1] + b"?\0"))
    report = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
sys.meta_path = [BuiltinImporter, FrozenImporter, PathFinder]  # without the finder of the editable installation
from pentad import kernels
print(len(kernels.isas()), kernels.reason())
"""
    printed = run_python(report, tmp_path, PYTHONPATH=str(tmp_path))
    assert printed.startswith("0 ")
    assert "_kernels.so" in printed
    assert exported.decode()[:-1] in printed


@needs_kernels
def test_one_instruction_set_can_be_chosen() -> None:
    report = "from pentad import kernels; print(*kernels.isas())"
    plainest = list(kernels.isas())[-1]
    assert run_python(report, PENTAD_KERNELS=plainest) == plainest
    assert run_python(report).split() == list(kernels.isas())


@needs_kernels
def test_steps_of_several_threads_do_not_mix() -> None:
    """Programs that run at once share one pool."""
    weights = [packed(random_blocks("q4_1", 64, 256, seed=i)) for i in range(4)]
    xs = [torch.randn(9, 256) for _ in weights]
    expected = [product(x, weight) for x, weight in zip(xs, weights, strict=True)]
    same: list[bool] = []

    def work(i: int) -> None:
        same.extend(torch.equal(product(xs[i], weights[i], threads=1 + i), expected[i]) for _ in range(50))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 200


@needs_kernels
def test_threads_may_share_a_program() -> None:
    """Steps of one program share its buffers and run one after the other."""
    made, same = program(), list[bool]()
    made.embed(Weight.floats(torch.arange(4000.0).view(1000, 4)))
    made.matmul([Weight.floats(torch.eye(4))], Buffer.RESIDUAL, Buffer.LOGITS)

    def work(first: int) -> None:
        for count in range(1, 60):
            ids = range(first, first + count)
            same.append(run_rows(made, ids)[:, 0].tolist() == [4 * i for i in ids])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(200 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert same == [True] * 4 * 59


@needs_kernels
def test_forked_children_can_run_the_parents_program() -> None:
    """Each child starts its own threads, although another thread was running a step at the fork."""
    code = """
import os, signal, threading, torch
from tests.helpers.blocks import random_blocks
from tests.helpers.programs import *
x = torch.randn(9, 256)
made = program(threads=4)
made.embed(Weight.floats(x))
made.quantize(Buffer.RESIDUAL)
made.matmul([packed(random_blocks("q4_1", 640, 256))], Buffer.RESIDUAL, Buffer.LOGITS)
expected, over = run_rows(made, range(9)), threading.Event()
same = lambda: all(torch.equal(run_rows(made, range(9)), expected) for _ in range(20))
def work():
    while not over.is_set():
        assert same()
other = threading.Thread(target=work)
other.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if same() else 1)
    assert os.waitpid(child, 0)[1] == 0
over.set()
other.join()
assert same()
"""
    run_python(code)


@needs_kernels
def test_more_threads_than_cores() -> None:
    x, weight = torch.randn(40, 256), packed(random_blocks("q8_0", 640, 256))
    expected = product(x, weight, threads=1)
    for _ in range(5):
        assert torch.equal(product(x, weight, threads=17), expected)


@needs_kernels
def test_embedding_rows_may_be_looked_up_in_any_order() -> None:
    made = program()
    made.embed(Weight.floats(torch.arange(40.0).view(10, 4)), Buffer.LOGITS)
    assert run_rows(made, [9, 0, 9])[:, 0].tolist() == [36, 0, 36]
