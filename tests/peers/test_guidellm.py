"""guidellm, a load generator, gets all its answers."""

import json
import os
import subprocess
from pathlib import Path

from tests.helpers.tiny import talking_checkpoint
from tests.peers.suites import command
from tests.serve.conftest import serving


def test_guidellm_reports_no_errors(tmp_path: Path) -> None:
    talking_checkpoint(tmp_path / "tiny")
    with serving("--model", tmp_path / "tiny", "--threads", 1) as server:
        options = {
            "backend": f"kind=openai_http,target={server.root},model=tiny,request_format=/v1/chat/completions",
            "profile": "kind=concurrent,streams=4",
            "constraint": "kind=max_requests,count=12",
            "data": "kind=synthetic_text,prompt_tokens=8,output_tokens=8",
            "tokenizer": f"kind=huggingface_auto,model={tmp_path / 'tiny'}",
            "output": f"kind=json,path={tmp_path / 'report.json'}",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        run = [command("guidellm", "0.8.1"), "run", *arguments, "--disable-console-interactive"]
        subprocess.run(run, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (12, 0, 0)
