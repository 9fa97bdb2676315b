"""A checkout whose launch scripts run stand-ins of every program, which record how they were called."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Writes one line of JSON per call: the program's name, its arguments, and the variables that matter.
RECORDER = f"""#!{sys.executable}
import json, os, sys
name = os.path.basename(sys.argv[0])
environment = {{key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "NNODES")}}
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, sys.argv[1:], environment]) + "\\n")
"""
STUBS = {
    "torchrun": RECORDER + 'sys.exit(int(os.environ.get("TORCHRUN_STATUS", "0")))\n',
    # The run is unfinished before torchrun, and then what FINISHED says.
    "python": f"""#!{sys.executable}
import os, sys
if sys.argv[1] == "launch/stoppable.py":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
has_run = os.path.exists(os.environ["CALLS"]) and '"torchrun"' in open(os.environ["CALLS"]).read()
"""
    + RECORDER
    + """
finished = os.environ.get("FINISHED", "0") if has_run else "3"
if "--finished" in sys.argv:
    print(os.environ.get("SAID", "") + "ok:", os.environ.get("NEWEST", "no checkpoint"))
sys.exit(int(os.environ.get("CHECK_STATUS") or (finished if "--finished" in sys.argv else "0")))
""",
    # The two nodes of the job are this machine, one after the other. `srun ... true` asks whether they live.
    "srun": RECORDER + "import subprocess\n"
    "if sys.argv[-1] == 'true':\n    sys.exit(int(os.environ.get('PROBE_STATUS', '0')))\n"
    "command = sys.argv[sys.argv.index('launch/torchrun_node.sh'):]\n"
    "sys.exit(max(subprocess.run(command).returncode for node in range(2)))\n",
    "scontrol": RECORDER
    + """
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n1", "n2", sep="\\n")
if sys.argv[1:3] == ["show", "job"]:
    print(f"JobId=4321 JobName=x JobState={os.environ.get('STATE', 'RUNNING Reason=None')} Dependency=(null)")
""",
}


class Checkout:
    """A folder with the launch scripts, and an environment in `venv/` whose programs only record their calls."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "launch", folder / "launch")
        (folder / "train.py").touch()
        (folder / "venv" / "bin").mkdir(parents=True)
        for name, text in STUBS.items():
            self.write_program(name, text)
        self.environment = {
            "PATH": f"{folder}/venv/bin:{os.environ['PATH']}",
            "VENV": "venv",
            "CALLS": str(folder / "calls"),
            "NPROC_PER_NODE": "2",
        }

    def write_program(self, name: str, text: str) -> None:
        path = self.folder / "venv" / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["bash", f"launch/{script}", *arguments]
        variables = {**self.environment, **environment}
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=60)

    def sbatch(self, *arguments: str, script: str = "train.sbatch", **environment: str) -> subprocess.CompletedProcess:
        """Run the job as SLURM would on two nodes."""
        slurm = {
            "SLURM_JOB_ID": "4321",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_SUBMIT_DIR": str(self.folder),
        }
        return self.run(script, *arguments, **slurm, **environment)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of a program, in order."""
        return [arguments for called, arguments, _ in self.records() if called == name]

    def records(self) -> list:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
