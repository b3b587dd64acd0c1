"""A Slurm of two nodes on this machine, for a test: Debian's slurm-wlm and munge, as root, without systemd."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/s,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd.%n.log
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
MinJobAge=300
SlurmctldTimeout=10
SlurmdTimeout=10
UnkillableStepTimeout=10
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000 Gres=gpu:1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
GRES = "NodeName=n1 Name=gpu File=/dev/null\nNodeName=n2 Name=gpu File=/dev/zero\n"
NEEDED = ("slurmctld", "slurmd", "munged", "sinfo", "sbatch")
DEADLINE_S = 60.0  # for the nodes to be idle; it takes two


def missing() -> list[str]:
    """What of it is not installed here, or that only root may start it."""
    return [one for one in NEEDED if shutil.which(one) is None] or ([] if os.geteuid() == 0 else ["root"])


def until(holds: Callable[[], bool], what: str, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.2)


@contextmanager
def cluster(home: Path) -> Iterator[dict[str, str]]:
    """Yields the environment that finds it; stops all of it at the end."""
    with suppress(FileExistsError):
        home.mkdir(parents=True)
    for name in ("munge", "log", "state", "spool.n1", "spool.n2"):
        (home / name).mkdir()
    home.chmod(0o755)
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        free = (one, two, three)
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in free]
    host = socket.gethostname().partition(".")[0]
    (home / "slurm.conf").write_text(CONF.format(host=host, home=home, ports=ports))
    (home / "gres.conf").write_text(GRES)
    key = home / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(home / "slurm.conf")}
    files = {"key-file": "key", "socket": "s", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={home / 'munge' / name}" for option, name in files.items()]
    starts = [
        ["munged", "--force", *munge],
        ["slurmctld", "-c"],
        ["slurmd", "-c", "-N", "n1"],
        ["slurmd", "-c", "-N", "n2"],
    ]
    try:
        for command in starts:
            subprocess.run(command, env=environment, check=True, timeout=DEADLINE_S, capture_output=True)

        def idle() -> bool:
            ran = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
            )
            return ran.stdout.split() == ["idle", "idle"]

        until(idle, "two idle nodes", DEADLINE_S)
        yield environment
    finally:
        subprocess.run(["scancel", "--me"], env=environment, check=False, capture_output=True, timeout=DEADLINE_S)
        for name in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid", "munge/pid"):
            with suppress(OSError, ValueError):
                os.kill(int((home / name).read_text()), signal.SIGTERM)
