"""The cost of imports, the public names, and the repository's files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pentad

ROOT = Path(__file__).parents[1]


def modules_after(code: str) -> set[str]:
    """The modules that a new interpreter has imported after running ``code``."""
    report = f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stderr.split())


def tracked_files() -> list[Path]:
    """The files that git tracks or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


HEAVY = {
    "PIL",
    "av",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "prompt_toolkit",
    "sentencepiece",
    "tokenizers",
    "torch",
}


def test_importing_pentad_imports_no_heavy_package() -> None:
    modules = modules_after("import pentad")
    assert "pentad.errors" in modules
    assert not modules & (HEAVY | {"rich", "typer"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["chat", "--help"]])
def test_help_imports_no_heavy_package(arguments: list[str]) -> None:
    modules = modules_after(
        "import sys\n"
        "from pentad.cli import main\n"
        f"sys.argv = ['pentad', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    assert "pentad.cli" in modules
    assert not modules & HEAVY


def test_an_unknown_model_is_refused_before_torch_is_imported() -> None:
    modules = modules_after(
        "import sys\n"
        "from pentad.cli import main\n"
        "sys.argv = ['pentad', 'complete', 'hi', '--model', 'nonsense']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 2, end.code"
    )
    assert "torch" not in modules


def test_a_first_answer_does_not_import_torchs_compiler(smollm2: Path) -> None:
    """Importing the compiler takes longer than a short answer."""
    chat = f"import pentad\npentad.load({str(smollm2)!r}).chat('hi', max_tokens=2)"
    modules = modules_after(chat)
    assert "torch" in modules
    assert not modules & {
        "torch._dynamo",
        "sympy",
        "gguf",
        "huggingface_hub",
        "prompt_toolkit",
        "rich",
        "sentencepiece",
    }


def test_public_names_resolve() -> None:
    for name in pentad.__all__:
        assert getattr(pentad, name) is not None
    assert set(pentad.__all__) <= set(dir(pentad))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pentad.nonsense  # noqa: B018


def test_bad_input_is_an_error_of_both_kinds() -> None:
    assert issubclass(pentad.BadInput, pentad.PentadError)
    assert issubclass(pentad.BadInput, ValueError)


def test_changelog_has_the_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == pentad.__version__


def test_no_large_files() -> None:
    large = [path for path in tracked_files() if path.stat().st_size > 1_000_000]
    assert not large


def test_scripts_are_executable() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "scripts").iterdir()]
    assert not [path for path in scripts if not os.access(path, os.X_OK)]
