"""The JSON-Schema-Test-Suite: what is accepted of it is enforced, byte for byte."""

import itertools
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pentad import Constraint
from pentad.errors import BadInput
from pentad.generate.constraint import Compiler, Matcher

END = 256
SHARES = {"draft2020-12": 0.41, "draft2019-09": 0.43, "draft7": 0.58, "draft6": 0.64, "draft4": 0.74}
# Valid texts that no grammar allows: in JSON Schema formats are annotations, and some forms of these are rare.
NARROWER = {"format", "email", "ipv6", "date-time", "time", "uri", "hostname"}


class Bytes:
    """A vocabulary of the 256 bytes, and a token that ends a text."""

    control: dict[str, int] = {}  # noqa: RUF012
    eos_ids = (END,)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""

    first_bytes = token_bytes


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite's folder of drafts, from the sdist of jsonschema."""
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    version = re.search(r"^jsonschema==(\S+)$", constraints, re.MULTILINE)[1]
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "jsonschema"]
    if subprocess.run([*command, "-d", folder, f"jsonschema=={version}"], capture_output=True).returncode:
        pytest.skip("the sdist of jsonschema can't be downloaded")
    with tarfile.open(folder / f"jsonschema-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"jsonschema-{version}" / "json" / "tests"


def spellings(value: Any) -> Iterator[Any]:
    """A value with the properties of objects in any order, and whole numbers without a point."""
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    elif isinstance(value, list):
        yield from map(list, itertools.product(*map(spellings, value)))
    elif isinstance(value, dict):
        for order in itertools.islice(itertools.permutations(value), 24):
            for values in itertools.product(*(spellings(value[name]) for name in order)):
                yield dict(zip(order, values, strict=True))
    else:
        yield value


def allows(matcher: Matcher, text: str) -> bool:
    """True if a text is complete within a constraint."""
    try:
        for byte in text.encode():
            if matcher.complete or not matcher.mask()[byte]:
                return False
            matcher.accept(byte)
        return matcher.complete or bool(matcher.mask()[END])
    except BadInput:
        return False


@pytest.mark.parametrize("draft", SHARES)
def test_accepted_schemas_are_enforced(suite: Path, draft: str) -> None:
    compiler = Compiler(Bytes(), END + 1)  # type: ignore[arg-type]
    count = accepted = 0
    for file in [
        *sorted((suite / draft).glob("*.json")),
        *sorted((suite / draft / "optional" / "format").glob("*.json")),
    ]:
        for group in json.loads(file.read_text()):
            count += 1
            try:
                constraint = Constraint.json_schema(group["schema"])
                compiler.matcher(constraint, opens=False)
            except BadInput:
                continue
            accepted += 1
            for test in group["tests"]:
                case = f"{file.name}: {group['description']}: {test['description']}"
                data = spellings(test["data"]) if test["valid"] else [test["data"]]
                texts = (json.dumps(one, ensure_ascii=False) for one in data)
                allowed = any(allows(compiler.matcher(constraint, opens=False), text) for text in texts)
                assert not allowed or test["valid"], case
                narrower = file.stem in NARROWER or "sibling keywords" in case  # which old drafts ignore beside $ref
                assert allowed or not test["valid"] or narrower, case
    assert accepted / count == pytest.approx(SHARES[draft], abs=0.01)
