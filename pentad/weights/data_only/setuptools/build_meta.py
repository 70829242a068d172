"""The hooks of PEP 517 that pip and uv call in a source archive's folder: its files are packed as they are."""

import re
import sys
import zipfile
from pathlib import Path


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    """Nothing is needed."""
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: object = None) -> str:
    """Write a METADATA file with name and version."""
    stem, metadata = _identity()
    folder = Path(metadata_directory) / f"{stem}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(metadata)
    return folder.name


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None) -> str:
    """Pack all files of the current folder."""
    stem, metadata = _identity()
    name = f"{stem}-py3-none-any.whl"
    texts = {"METADATA": metadata, "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(Path(wheel_directory) / name, "w", strict_timestamps=False) as archive:
        files = [path for path in sorted(Path().rglob("*")) if path.is_file() and not path.is_symlink()]
        for path in files:
            archive.write(path)
        for file, text in texts.items():
            archive.writestr(f"{stem}.dist-info/{file}", text)
        record = [*map(str, files), *(f"{stem}.dist-info/{file}" for file in (*texts, "RECORD"))]
        archive.writestr(f"{stem}.dist-info/RECORD", "".join(f"{file},,\n" for file in record))
    return name


def _identity() -> tuple[str, str]:
    """The package's name-version, and a METADATA file that says no more."""
    fields = dict(re.findall(r"^(Name|Version): *(\S+)", Path("PKG-INFO").read_text("utf-8", "replace"), re.MULTILINE))
    stem = f"{re.sub(r'[-_.]+', '_', fields['Name'])}-{fields['Version']}"
    return stem, f"Metadata-Version: 2.1\nName: {fields['Name']}\nVersion: {fields['Version']}\n"


__legacy__ = sys.modules[__name__]  # the object that pip asks for if there is no pyproject.toml
