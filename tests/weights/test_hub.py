"""The hub: choosing files, revisions, offline use, damaged downloads, progress, and the cache."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.file_download
import pytest

from pentad.errors import BadInput, PentadError
from pentad.weights import hub, registry
from pentad.weights.registry import locate
from tests.helpers.hub_server import HubServer, serve
from tests.helpers.progress import Watcher

CONFIG = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer.model": b"sentencepiece",
    "chat_template.jinja": b"{{ messages }}",
}
OTHER = {
    "README.md": b"read me",
    ".gitattributes": b"*",
    "original/consolidated.pth": b"a pickle",
    "onnx/model.onnx": b"a graph",
}
WEIGHTS = {"model.safetensors": b"weights" * 1000}
QUANTS = {
    "tiny.Q4_K.gguf": b"4 bits",
    "tiny.Q4_K_M.gguf": b"4 bits, more",
    "tiny.Q8_0.gguf": b"8 bits",
    "mmproj-tiny-Q8_0.gguf": b"a projector",
    "BF16/tiny-BF16-00001-of-00002.gguf": b"first",
    "BF16/tiny-BF16-00002-of-00002.gguf": b"second",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A fake hub that replaces the real one for huggingface_hub, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "pentad"))
    with serve() as hub_server:
        constants = huggingface_hub.constants
        template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub_server


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def test_only_files_that_pentad_reads_are_downloaded(server: HubServer) -> None:
    pickles = {"pytorch_model.bin": b"a pickle", "training_args.bin": b"another"}
    server.add("org/tiny", CONFIG | OTHER | WEIGHTS | pickles)
    folder = locate("org/tiny")
    assert read_folder(folder) == CONFIG | WEIGHTS
    assert sorted(server.downloads) == sorted(CONFIG | WEIGHTS)


def test_cached_files_are_not_downloaded_again(server: HubServer) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    folder = locate("org/tiny")
    server.downloads.clear()
    assert locate("org/tiny") == folder
    assert server.downloads == []


def test_sharded_weights_are_preferred_to_consolidated_ones(server: HubServer) -> None:
    parts = {
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
        "model.safetensors.index.json": b"{}",
    }
    server.add("org/tiny", CONFIG | parts | {"consolidated.safetensors": b"onetwo"})
    assert read_folder(locate("org/tiny")) == CONFIG | parts


@pytest.mark.parametrize(
    "weights",
    [["consolidated.safetensors"], ["consolidated.00.pth", "consolidated.01.pth"], ["consolidated.00.pt"], []],
)
def test_consolidated_weights_alone(server: HubServer, weights: list[str]) -> None:
    files = {"params.json": b"{}", "tokenizer.model": b"pieces", **dict.fromkeys(weights, b"onetwo")}
    server.add("org/tiny", files | {"README.md": b""})
    assert read_folder(locate("org/tiny")) == files


def test_pickles_are_downloaded_if_there_are_no_safetensors(server: HubServer) -> None:
    weights = {"pytorch_model.bin": b"a pickle"}
    server.add("org/old", CONFIG | OTHER | weights | {"training_args.bin": b"another"})
    assert read_folder(locate("org/old")) == CONFIG | weights


def test_a_config_alone(server: HubServer) -> None:
    server.add("org/plan", {"config.json": b"{}", "README.md": b""})
    assert read_folder(locate("org/plan")) == {"config.json": b"{}"}


def test_a_revision(server: HubServer) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    server.add("org/tiny", CONFIG | {"model.safetensors": b"older"}, revision="v1.0")
    server.add("org/tiny", CONFIG | {"model.safetensors": b"newer"}, revision="refs/pr/1")
    assert (locate("org/tiny@v1.0") / "model.safetensors").read_bytes() == b"older"
    assert (locate("org/tiny@refs/pr/1") / "model.safetensors").read_bytes() == b"newer"
    commit = server.commit("org/tiny", "v1.0")
    assert locate(f"org/tiny@{commit}") == locate("org/tiny@v1.0")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Q4_K_M", b"4 bits, more"),
        ("q4_k_m", b"4 bits, more"),
        ("Q4_K", b"4 bits"),
        ("tiny.Q8_0.gguf", b"8 bits"),
        ("tiny.Q8_0", b"8 bits"),
    ],
)
def test_one_file_of_a_gguf_repository(server: HubServer, name: str, content: bytes) -> None:
    server.add("org/quants", CONFIG | QUANTS)
    path = locate(f"org/quants:{name}")
    assert path.suffix == ".gguf"
    assert path.read_bytes() == content
    assert server.downloads == [path.name]


def test_all_parts_of_a_split_gguf_file(server: HubServer) -> None:
    server.add("org/quants", QUANTS)
    path = locate("org/quants:bf16")
    assert path.name == "tiny-BF16-00001-of-00002.gguf"
    assert set(read_folder(path.parent)) == {path.name, "tiny-BF16-00002-of-00002.gguf"}


def test_the_only_gguf_file_needs_no_name(server: HubServer) -> None:
    server.add("org/one", {"tiny.Q8_0.gguf": b"8 bits", "mmproj-tiny.gguf": b"", "README.md": b""})
    assert locate("org/one").read_bytes() == b"8 bits"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/quants", ["several", "tiny.Q4_K,", "tiny.Q4_K_M", "tiny.Q8_0", "tiny-BF16"]),
        ("org/quants:IQ2_XS", ["no GGUF file", "IQ2_XS", "tiny.Q4_K_M", "tiny-BF16"]),
        ("org/full:Q4_K_M", ["no GGUF file", "`:Q4_K_M`"]),
        ("org/parts", ["1 of the 3", "model.safetensors"]),
        ("org/foreign", ["no weights", "tf_model.h5"]),
        ("org/empty", ["no weights", "none"]),
        ("org/nobody", ["org/nobody", "HF_TOKEN"]),
        ("org/full@v9", ["revision 'v9'", "/org/full"]),
    ],
)
def test_names_without_a_match_are_refused(server: HubServer, name: str, words: list[str]) -> None:
    server.add("org/quants", QUANTS)
    server.add("org/full", CONFIG | WEIGHTS)
    server.add("org/parts", CONFIG | {"model-00002-of-00003.safetensors": b"two"})
    server.add("org/foreign", {"config.json": b"{}", "tf_model.h5": b"hdf"})
    server.add("org/empty", {})
    with pytest.raises(BadInput) as caught:
        locate(name)
    for word in words:
        assert word in one_line(caught.value)
    assert server.downloads == []


def test_a_gated_repository(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/gated", CONFIG | WEIGHTS)
    server.gated.add("org/gated")
    with pytest.raises(PentadError) as caught:
        locate("org/gated")
    assert not isinstance(caught.value, BadInput)
    assert f"{server.url}/org/gated" in one_line(caught.value)
    assert "HF_TOKEN" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert read_folder(locate("org/gated")) == CONFIG | WEIGHTS


def test_offline_cached_models_are_found(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    server.add("org/quants", QUANTS)
    folder, quant = locate("org/tiny"), locate("org/quants:Q8_0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate("org/tiny") == folder
    assert locate("org/tiny@main") == folder
    assert locate(f"org/tiny@{folder.name}") == folder
    assert locate("org/quants:Q8_0") == quant
    assert locate("org/quants") == quant  # the only cached one
    for name in ("org/nobody", "org/tiny@v1", "org/quants:Q4_K"):
        with pytest.raises(PentadError, match="HF_HUB_OFFLINE") as caught:
            locate(name)
        assert name in one_line(caught.value)
        assert not isinstance(caught.value, BadInput)


def test_offline_an_incomplete_model_is_an_error(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    (locate("org/tiny") / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PentadError, match=r"org/tiny .*cache"):
        locate("org/tiny")


def test_no_connection(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    folder = locate("org/tiny")
    with serve() as other:
        closed = other.url  # no server listens there any more
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    assert locate("org/tiny") == folder
    with pytest.raises(PentadError, match="connection") as caught:
        locate("org/other")
    assert closed in one_line(caught.value)


def test_a_broken_connection_leaves_no_files(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    server.cut_off.add("model.safetensors")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between tries
    with pytest.raises(PentadError, match=r"org/tiny") as caught:
        locate("org/tiny")
    one_line(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.incomplete"))
    server.cut_off.clear()
    assert read_folder(locate("org/tiny")) == CONFIG | WEIGHTS


def test_damaged_weights_are_deleted(server: HubServer, tmp_path: Path) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    server.damaged.add("model.safetensors")  # the size is right
    with pytest.raises(PentadError, match="damaged") as caught:
        locate("org/tiny")
    assert "SHA-256" in one_line(caught.value)
    damaged = bytes(byte ^ 1 for byte in WEIGHTS["model.safetensors"])
    assert damaged not in read_folder(tmp_path).values()
    server.damaged.clear()
    assert read_folder(locate("org/tiny")) == CONFIG | WEIGHTS


def test_a_full_disk(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.add("org/tiny", CONFIG | WEIGHTS)
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", refuse)
    with pytest.raises(PentadError, match="no space left") as caught:
        locate("org/tiny")
    assert "HF_HOME" in one_line(caught.value)


def test_free_space_is_checked_before_the_download(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(PentadError, match="10 are free") as caught:
        locate("org/tiny")
    assert f"{sum(map(len, (CONFIG | WEIGHTS).values())):,} bytes" in one_line(caught.value)
    assert "HF_HOME" in one_line(caught.value)


def test_paths_outside_the_folder_are_ignored(server: HubServer, tmp_path: Path) -> None:
    hostile = {"../evil.json": b"out", "/evil.json": b"out", "a/../../evil.gguf": b"out"}
    server.add("org/tiny", CONFIG | WEIGHTS | hostile)
    assert read_folder(locate("org/tiny")) == CONFIG | WEIGHTS
    assert not list(tmp_path.rglob("evil*"))


def test_progress_counts_downloaded_and_checked_bytes(server: HubServer, capfd: pytest.CaptureFixture[str]) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    watcher = Watcher()
    locate("org/tiny", progress=watcher)
    nbytes = sum(map(len, (CONFIG | WEIGHTS).values()))
    weights = len(WEIGHTS["model.safetensors"])
    assert watcher.tasks == [("downloading org/tiny", nbytes), ("checking model.safetensors", weights)]
    assert watcher.counts == [nbytes, weights]
    assert watcher.open == 0
    assert capfd.readouterr() == ("", "")  # huggingface_hub draws no bars


def test_the_cache_is_listed_and_removed_from(server: HubServer, tmp_path: Path) -> None:
    assert hub.cached_repos() == []
    server.add("org/tiny", CONFIG | WEIGHTS)
    server.add("org/tiny", CONFIG | {"model.safetensors": b"older"}, revision="v1")
    server.add("org/quants", QUANTS)
    server.add("org/other", {"README.md": b"nothing to open"})
    locate("org/quants:Q8_0")
    older, newer = locate("org/tiny@v1"), locate("org/tiny")
    huggingface_hub.hf_hub_download("org/other", "README.md")

    rows = {row.name: row for row in registry.known()}
    assert set(rows) == {*registry.KNOWN, "org/quants", "org/tiny"}
    assert rows["org/quants"].nbytes == len(b"8 bits")
    assert rows["org/tiny"].path in (older, newer)

    assert registry.remove("org/tiny@v1") == len(b"older")
    assert newer.exists()
    assert not older.exists()
    assert registry.remove("org/tiny") == sum(map(len, (CONFIG | WEIGHTS).values()))
    assert "org/tiny" not in {row.name for row in registry.known()}
    assert WEIGHTS["model.safetensors"] not in read_folder(tmp_path).values()
    for name in ("org/tiny", "org/quants@v1", "org/quants:Q8_0", "smollm2"):
        with pytest.raises(BadInput) as caught:
            registry.remove(name)
        one_line(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "org/..",
        "org/na..me",
        "org/name@../../x",
        "org/name@/etc",
        "org/name@a//b",
        "org/name:../x",
        "org/name:a/b",
        "org/name:",
        "org/name@",
        "org/na--me",
        "-org/name",
        "org/name\n",
        "org/na\0me",
        "org/na me",
        "órg/name",
        "org/" + "x" * 200,
    ],
)
def test_invalid_names_are_refused_without_a_request(server: HubServer, name: str) -> None:
    with pytest.raises(BadInput) as caught:
        locate(name)
    one_line(caught.value)
    assert server.agents == set()  # no server was asked


def test_environment_variables_are_read_and_no_telemetry_is_sent(server: HubServer, tmp_path: Path) -> None:
    server.add("org/tiny", CONFIG | WEIGHTS)
    code = (
        "import sys; from pentad.weights.registry import locate; print(locate('org/tiny'));"
        "assert 'torch' not in sys.modules"
    )
    unset = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(Path(registry.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert done.stderr == ""
    assert folder.is_relative_to(tmp_path / "home" / "hub")
    assert read_folder(folder) == CONFIG | WEIGHTS
    assert not any("torch" in agent or "agent/" in agent for agent in server.agents)
