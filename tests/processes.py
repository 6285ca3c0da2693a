"""Scripts that need a process without Lightning in it: forks of one process that has loaded PyTorch, once for all."""

import json
import subprocess
import sys
from pathlib import Path

_PARENT = """
import json, os, sys, traceback
import torch, torchmetrics
assert not {"lightning", "pytorch_lightning"} & sys.modules.keys()
torch.set_num_threads(1)
for number, script in enumerate(json.loads(sys.argv[1])):
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            sys.stdout = open(f"{number}.txt", "w")
            exec(compile(script, f"script {number}", "exec"), {"__name__": "__main__"})
            sys.stdout.close()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, f"script {number} failed"
"""


def outputs(folder: Path, *scripts: str) -> list[list[str]]:
    """Run scripts of Python, each in a fresh process, where they lie in a folder.

    Args:
        folder: Where they run, empty.
        scripts: Each of them has to end well.

    Returns:
        The lines that each has printed.

    """
    command = [sys.executable, "-c", _PARENT, json.dumps(scripts)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(folder / f"{number}.txt").read_text().splitlines() for number in range(len(scripts))]
