"""pentad runs small open models, from the files they were published in.

>>> import pentad
>>> model = pentad.load("smollm2")
>>> print(model.chat("What is the capital of France?", temperature=0).text)

The names below are imported when first used, so that ``import pentad`` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pentad.errors import BadInput, PentadError

if TYPE_CHECKING:
    from pentad.generate import LanguageModel
    from pentad.loading import load
    from pentad.text.grammar import Constraint

__version__ = "0.1.0"

__all__ = ["BadInput", "Constraint", "LanguageModel", "PentadError", "__version__", "load"]

_MODULES = {"Constraint": "pentad.text.grammar", "LanguageModel": "pentad.generate", "load": "pentad.loading"}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
