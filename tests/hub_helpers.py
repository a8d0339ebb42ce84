"""What the tests of publishing share: a small adapter's folder, and a push of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import samples
from hub_server import WRITE

from peftrec import artifact, contents, hub
from peftrec.baselines import Prior

ABOUT = dataclasses.replace(samples.ABOUT, base_model=dataclasses.replace(samples.ABOUT.base_model, name="ns/tiny"))
CARD = "---\nlicense: apache-2.0\nlibrary_name: peft\ntags:\n- recommendation\n---\n# Films\n"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
REPO = "me/films"


def safetensors(value: int = 0, floats: int = 4096) -> bytes:
    data = bytes([value]) * (4 * floats)
    header = json.dumps({"a": {"dtype": "F32", "shape": [floats], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def write_adapter(folder: Path, value: int = 0) -> Path:
    """What a run saves, in small; `value` makes it another one."""
    (folder / "figures").mkdir(parents=True)
    artifact.write(folder, dataclasses.replace(ABOUT, seed=value), Prior(0.5, {"1": 0.25}, 3.0))
    config = {"peft_type": "LORA", "base_model_name_or_path": "ns/tiny", "auto_mapping": None, "r": 8 + value}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors(value))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"/home/": 1, "a@b.co": 2}}}))
    (folder / "README.md").write_text(CARD + f"{value}\n")
    (folder / "figures" / "calibration.png").write_bytes(PNG)
    return folder


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path: file.read_bytes() for path, file in contents.list_files(folder)[0].items()}


def send(folder: Path, repo_id: str = REPO, **how: Any) -> hub.Published:
    """`push` by somebody who may, without the reload: these adapters have no base model."""
    return hub.push(folder, repo_id, **{"token": WRITE, "reload_check": lambda _: None, **how})
