"""Nothing opens a connection unless the user asked for a download: the whole story, with every socket refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STORY = """
import sys, traceback
from pathlib import Path

calls = []

def refuse(event, arguments):
    if event == "socket.bind" and arguments[1][0] == "::1":
        return  # urllib3, when imported, asks whether this machine has IPv6; nothing listens and nothing leaves
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto", "urllib.Request"):
        calls.append((event, "".join(traceback.format_stack(limit=6))))
        raise PermissionError(event)

sys.addaudithook(refuse)
import torch
from typer.testing import CliRunner
from medmeta.cli import app

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def medmeta(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (words, result.output, result.exception)

medmeta("phantoms", folder / "organs", "--tasks", 2, "--cases", 4)
task = sorted((folder / "organs").iterdir())[0]
medmeta("check", task)
(folder / "train.yaml").write_text(f'''
data: {folder / "organs"}
tasks: [{{path: {task.name}}}]
voxels: 4096
validation_episodes: 1
network: {{name: se_unet_3d, options: {{channels: [8, 16], se_ratio: 4}}}}
phases: [{{name: meta, learner: fomaml, schedule: {{steps: 1, episodes_per_step: 1}}}}]
''')
medmeta("train", folder / "train.yaml", "--out", folder / "run")
medmeta("info", folder / "run" / "model")
medmeta("adapt", folder / "run" / "model", "--images", task / "imagesTr", "--labels", task / "labelsTr",
        "--target", "organ=1", "--background", "2,3", "--method", "finetune", "--steps", 1, "--out", folder / "adapted")
medmeta("predict", folder / "adapted", task / "imagesTr", "--out", folder / "made")
medmeta("evaluate", "--reference", task / "labelsTr", "--prediction", task / "labelsTr")
assert calls == [], calls[0]
import socket, urllib.request
for attempt in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: urllib.request.urlopen("http://127.0.0.1:9")):
    try:
        attempt()
    except PermissionError:
        pass
assert len(calls) == 2, "the hook is blind"
print("silent")
"""


def test_no_verb_opens_a_connection(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STORY, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "silent", done.stdout[-2000:] + done.stderr[-2000:]
