"""A real SLURM of two nodes on this machine, from Debian's packages slurm-wlm and munge, as long as a test needs it."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "scontrol")
HOST = socket.gethostname().split(".")[0]
NODES = (
    HOST,
    f"{HOST}-2",
)  # the first by their order has a name that leads somewhere; short, since sockets lie below them
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
MinJobAge=3600
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=all Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Return the programs that are not installed."""
    return [name for name in PROGRAMS if which(name) is None]


def which(name):
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count):
    """Return ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextlib.contextmanager
def running(folder):
    """Start a SLURM whose files are in a folder, and end it; SLURM_CONF leads its commands to it."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    facts = {"host": HOST, "user": getpass.getuser(), "nodes": NODES}
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=free_ports(3), **facts))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={folder}/munge.{end}" for name, end in files.items()]
        subprocess.run([which("munged"), "--force", f"--key-file={folder}/munge.key", *options], check=True)
        subprocess.run([which("slurmctld")], check=True)
        for node in NODES:
            subprocess.run([which("slurmd"), "-N", node], check=True)
        wait(lambda: idle() == 2, 60)
        yield folder
    finally:
        for pid in sorted(folder.glob("*.pid"), reverse=True):  # munged last but one, slurmctld before it
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGTERM)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def idle():
    """Return how many nodes wait for work."""
    return sum(
        int(line) for line in told("sinfo", "--noheader", "--states", "idle", "--format", "%D").split()
    )


def told(*command):
    """Return what a command of SLURM says."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def states():
    """Return the state of each job that SLURM remembers, by its number."""
    lines = told("squeue", "--noheader", "--array", "--states", "all", "--format", "%i %T").splitlines()
    return dict(line.split() for line in lines)


def finished(*numbers):
    """Wait until jobs have succeeded; one that failed is none to wait for."""
    wait(lambda: all(states()[number] not in ("PENDING", "RUNNING", "COMPLETING") for number in numbers), 900)
    assert {states()[number] for number in numbers} == {"COMPLETED"}


def wait(condition, seconds=300):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{states()} after {seconds} s"
        time.sleep(0.2)
