"""A SLURM cluster of one's own on this machine: the real daemons, a few nodes that are names for 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.s3 import free_ports
from tests.support.tethered import TetheredServer

ROOT = Path(__file__).parents[2]
NODES = ("n1", "n2", "n3", "n4")
GPUS = 8
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "unshare")
_START_SECONDS = 60
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

# Two partitions of the same nodes: jobs in `urgent` preempt those in `main`, which get SIGTERM and time to stop.
# cred_expire: a requeued job waits until its old credentials have expired. config_overrides: the nodes may claim more
# cores than there are. The GPUs are a number only: empty files stand for them.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:{gpus}
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=60 PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes={names} MaxTime=60 PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster; everything of it lies in ``folder``, and ``servers`` are its daemons."""

    folder: Path
    servers: list[TetheredServer] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What jobs and SLURM's programs get: this test run's python, one thread and one rank a node."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "LOG_DIR": str(self.folder / "logs"),
            "VENV": "",
            "NPROC_PER_NODE": "1",
            "NODE_TIMEOUT": "5",
            "OMP_NUM_THREADS": "1",
        }

    def command(self, *arguments: object) -> str:
        """Run one of SLURM's programs; returns what it printed."""
        finished = subprocess.run(
            [str(argument) for argument in arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert finished.returncode == 0, f"{arguments}: {finished.stderr}"
        return finished.stdout

    def node_state(self, node: str) -> str:
        """As `sinfo` shows it: `idle`, `alloc`, `down*`, ..."""
        return self.command("sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%t").strip()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        folder = self.folder
        as_node = f"hostname {node} && mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
        command = ["unshare", "--uts", "--mount", "sh", "-c", as_node]
        self.servers.append(TetheredServer(command, folder / f"slurmd-{node}.log", self.environment))

    def power_off(self, node: str) -> None:
        """Kill everything that runs on a node at once: its daemon, and what jobs have there."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if _belongs_to(process, self):
                    is_daemon = process.cmdline()[:1] == ["slurmd"] and node in process.cmdline()
                    if is_daemon or process.environ().get("SLURMD_NODENAME") == node:
                        process.kill()

    def submit(self, *arguments: object, options: tuple[str, ...] = ()) -> Job:
        """`sbatch` from the folder of train.py.

        Args:
            arguments: the batch script and its arguments; none if ``options`` have `--wrap`.
        """
        output = f"--output={self.folder}/job-%j.out"
        return Job(self, int(self.command("sbatch", "--parsable", output, *options, *arguments)))


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    number: int

    def show(self, key: str) -> str:
        """One of the values of `scontrol show job`."""
        shown = self.cluster.command("scontrol", "show", "job", "--oneliner", self.number)
        return re.search(rf"(?:^| ){key}=(\S*)", shown).group(1)

    @property
    def output(self) -> str:
        """What the batch script printed, all attempts one after the other."""
        path = self.cluster.folder / f"job-{self.number}.out"
        return path.read_text() if path.exists() else ""

    @property
    def story(self) -> str:
        """For a failed assertion: what the job and its nodes printed."""
        logs = sorted((self.cluster.folder / "logs").glob(f"{self.number}-*.log"))
        return "\n".join([self.output, *(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)])

    @contextlib.contextmanager
    def frozen(self) -> Iterator[list[psutil.Process]]:
        """Stop the job's ranks where they are for as long as the block lasts; gives them."""
        ranks = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                of_job = environment.get("SLURM_JOB_ID") == str(self.number)
                if of_job and _belongs_to(process, self.cluster) and "RANK" in environment:
                    ranks.append(process)
        for process in ranks:
            process.suspend()
        try:
            yield ranks
        finally:
            for process in ranks:
                process.resume()

    def wait_for(self, what: Callable[[], bool], seconds: float = 180) -> None:
        """Wait until ``what()``.

        Raises:
            AssertionError: it did not become true, or the job ended before.
        """
        deadline = time.monotonic() + seconds
        while not what():
            state = self.show("JobState")
            assert state not in _ENDED or what(), f"the job ended as {state}:\n{self.story}"
            assert time.monotonic() < deadline, f"the job is {state} after {seconds} s:\n{self.story}"
            time.sleep(0.3)

    def wait(self, seconds: float = 200) -> str:
        """Wait for the job's end; returns its state."""
        self.wait_for(lambda: self.show("JobState") in _ENDED, seconds)
        return self.show("JobState")


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Four idle nodes; at the end every process of the cluster is gone."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0:
        pytest.skip("needs root: SLURM's daemons start jobs as their owners")
    if missing:
        pytest.skip(f"needs SLURM (`make test-slurm` installs it): there is no {', '.join(missing)}")
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to give each node a host name of its own (unshare --uts --mount)")
    # Not under pytest's folder: sockets must have short names, and munge wants folders that nobody else can write.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)
        shutil.rmtree(folder, ignore_errors=True)


def _start(cluster: Cluster) -> None:
    folder, servers = cluster.folder, cluster.servers
    for name in ("munge", "state", "logs", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    # The nodes' names exist for their own processes only: this machine's /etc/hosts stays as it is.
    (folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
    controller, *ports = free_ports(1 + len(NODES))
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            controller_port=controller,
            gpus=GPUS,
            names=",".join(NODES),
            nodes="\n".join(
                f"NodeName={node} NodeAddr=127.0.0.1 Port={port}" for node, port in zip(NODES, ports, strict=True)
            ),
        )
    )
    commands = {
        "munged": ["munged", "--foreground", f"--key-file={key}"]
        + [f"--{option}-file={folder}/munge/{option}" for option in ("pid", "log", "seed")]
        + [f"--socket={folder}/munge/socket"],
        "slurmctld": ["slurmctld", "-D"],
    }
    for name, command in commands.items():
        servers.append(TetheredServer(command, folder / f"{name}.log", cluster.environment))
        if name == "munged":
            _wait_until(lambda: (folder / "munge" / "socket").exists(), servers)
    for node in NODES:
        cluster.start_node(node)
    _wait_until(lambda: _idle_nodes(cluster) == len(NODES), servers)


def _wait_until(ready: Callable[[], bool], servers: list[TetheredServer]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not ready():
        if time.monotonic() > deadline or any(server.has_ended for server in servers):
            words = "\n".join(server.last_words() for server in servers)
            for server in servers:
                server.stop()
            pytest.fail(f"the SLURM cluster did not start:\n{words}")
        time.sleep(0.1)


def _idle_nodes(cluster: Cluster) -> int:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    return shown.stdout.split().count("idle")


def _stop(cluster: Cluster) -> None:
    # slurmd leaves its jobs running when it ends, and their slurmstepd cannot be told from others.
    with contextlib.suppress(subprocess.SubprocessError, AssertionError):
        cluster.command("scancel", "--user=root")
        deadline = time.monotonic() + 30
        while cluster.command("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.3)
    for server in reversed(cluster.servers):
        server.stop()
    for _ in range(2):
        # A second look for what was just being started.
        left = [process for process in psutil.process_iter() if _belongs_to(process, cluster)]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)


def _belongs_to(process: psutil.Process, cluster: Cluster) -> bool:
    try:
        return process.environ().get("SLURM_CONF") == str(cluster.folder / "slurm.conf")
    except psutil.Error:
        return False
