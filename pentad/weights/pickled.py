"""One PyTorch file (torch.save of a state dict) -> named tensors, mapped; no code in it is run."""

import re
import zipfile
from pathlib import Path

import torch

from pentad.errors import PentadError
from pentad.weights.checkpoint import TensorEntry
from pentad.weights.files import describe, read_start, refuse

WRAPPERS = ("model", "state_dict")
"""Keys under which training scripts save the tensors, beside the optimizer's state and other values."""

_ZIP = b"PK\x03\x04"
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_SAFE = "ask for the model as safetensors"


def is_pickled(start: bytes) -> bool:
    """Return True if `start` begins a zip archive or a pickle: torch.save writes both."""
    return start.startswith((_ZIP, b"\x80"))


def read_pickled(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file.

    Raises:
        BadInput: it holds anything but named tensors, wants to run code, or was not written by torch.save. Files from
            before PyTorch 1.6 (2020) can't be mapped and are read into memory.
        PentadError: the system cannot map it.
    """
    start = read_start(path)
    is_old = start.startswith(_OLD)
    if not is_old and not start.startswith(_ZIP):
        refuse(path, f"not a PyTorch archive but {describe(path)}; {_SAFE}")
    if not is_old:
        _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not is_old)
    except Exception as error:  # a hostile archive can raise nearly anything
        if "unable to mmap" in str(error):  # the file is larger than memory
            raise PentadError(f"{path}: cannot be mapped into memory: {str(error).splitlines()[0]}") from error
        function = re.search(r"GLOBAL (\S+)", str(error))
        problem = f"its pickle wants to run code ({function[1]})" if function else "not an archive of tensors"
        refuse(path, f"{problem}: refused; {_SAFE}")
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        refuse(path, f"holds a {type(state).__name__}, not a dict of tensors; {_SAFE}")
    return {name: _entry(path, name, value) for name, value in state.items()}


def _check_archive(path: Path) -> None:
    """Raise BadInput for compressed members: torch.save stores them uncompressed, and only those can be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        refuse(path, f"a damaged or truncated archive ({error}); download it again")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        refuse(
            path,
            "a TorchScript archive, which holds code: refused; expected a state dict, as"
            f" torch.save(torch.jit.load({path.name!r}, map_location='cpu').state_dict(), 'weights.pt') makes one",
        )
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            refuse(path, f"{member.filename!r} is compressed: not written by torch.save")


def _entry(path: Path, name: object, value: object) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        refuse(path, f"{name!r} is a {type(value).__name__}, not a named tensor; {_SAFE}")
    if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
        refuse(path, f"tensor {name!r} of {tuple(value.shape)} is more than the file holds")
    tensor = value.detach()
    return TensorEntry(name, tuple(value.shape), value.dtype, None, value.nbytes, lambda: tensor)
