"""A Slurm of this machine alone: virtual nodes, no cgroups, no accounting. Debian's slurm-wlm and munge, as root."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=5
SlurmdParameters=config_overrides
NodeName=n[1-{n}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoClusterError(Exception):
    """Slurm cannot be started here; the message says why."""


class Cluster:
    """Starts the daemons in a folder of their own, and stops them at the end of `with`."""

    def __init__(self, n_nodes: int = 2) -> None:
        if missing := [p for p in PROGRAMS if shutil.which(p) is None]:
            raise NoClusterError(f"no {', '.join(missing)}: apt-get install slurm-wlm munge, as `make slurm-test` does")
        if os.geteuid() != 0:
            raise NoClusterError("Slurm's daemons start jobs as root only")
        self.n_nodes = n_nodes
        # Short, as a socket's path has 107 characters at most.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        (munge / "key").chmod(0o400)
        (self.folder / "state").mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        host, first = socket.gethostname().split(".")[0], port + 1 if port < 60_000 else port - 100
        values = {"host": host, "folder": self.folder, "port": port, "n": self.n_nodes}
        config = self.folder / "slurm.conf"
        config.write_text(CONFIG.format(**values, first=first, last=first + self.n_nodes - 1), encoding="utf-8")
        self.environment = {**os.environ, "SLURM_CONF": str(config), "MASTER_ADDR": "127.0.0.1"}
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", "--foreground", "--force", *(f"--{k}={munge / v}" for k, v in files.items()))
        self._wait_for((munge / "socket").exists, "munged")
        self._start("slurmctld", "-D", "-c")
        for node in range(1, self.n_nodes + 1):
            (self.folder / f"spool-n{node}").mkdir()
            self._start("slurmd", "-D", "-c", "-N", f"n{node}")
        self._wait_for(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(self.n_nodes), "the nodes")
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands; return what it printed."""
        end = subprocess.run(command, env=self.environment, text=True, capture_output=True)
        assert not check or end.returncode == 0, f"{command}: {end.stdout}{end.stderr}"
        return end.stdout + (end.stderr if not check else "")

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job: JobState, ExitCode, Restarts ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", number)))

    def wait(self, number: str, states: str, seconds: float) -> dict[str, str]:
        """Wait until a job is in one of the states, separated by blanks; return what Slurm knows of it then."""
        end = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states.split():
            assert time.monotonic() < end, f"still {job['JobState']} ({job.get('Reason')}) after {seconds:.0f} s"
            time.sleep(0.5)
        return job

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        with log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _wait_for(self, is_ready: object, what: str, seconds: float = 30.0) -> None:
        assert callable(is_ready)
        end = time.monotonic() + seconds
        while not is_ready():
            if time.monotonic() > end or any(d.poll() is not None for d in self._daemons):
                logs = "; ".join(p.read_text(errors="replace")[-300:] for p in self.folder.glob("*.out"))
                self.__exit__()
                raise NoClusterError(f"Slurm does not start here, waited for {what}: {logs}")
            time.sleep(0.2)
