"""Commands that run in this process."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pentad.cli import application


def show(folder: Path, config: dict[str, Any], *options: str) -> Any:
    """Run ``pentad show --json`` on a folder that contains only a config; returns its JSON."""
    name = "config.json" if "model_type" in config else "params.json"
    (folder / name).write_text(json.dumps(config))
    done = CliRunner().invoke(application(), ["show", str(folder), "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
