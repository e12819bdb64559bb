"""How a run's processes were started: what would make them wait for each other for ever is an error before they do."""

from __future__ import annotations

import os
import socket

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from kosmos_lit.errors import UserError
from kosmos_lit.trainer_internals import cluster_environment


def check_slurm_tasks() -> None:
    """Make sure that Slurm's tasks will be taken for the ranks of one run. Before a trainer is built.

    Raises: UserError for a job name by which Lightning ignores Slurm, and for a job that was started without srun.
    """
    n_tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    n_started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    name = os.environ.get("SLURM_JOB_NAME")
    if name in ("bash", "interactive"):
        if n_started > 1:
            raise UserError(
                f"the Slurm job is called {name!r}, by which Lightning takes it for an interactive shell and each of its "
                f"{n_started} tasks for a run of its own: choose another --job-name"
            )
    elif n_tasks > 1 and n_started == 1 and "SLURM_JOB_ID" in os.environ:
        raise UserError(
            f"the Slurm job has {n_tasks} tasks, but this command was started once and would wait for the others: put srun "
            "before it"
        )


def check_launch(trainer: L.Trainer) -> None:
    """Make sure that a run's ranks are those that its configuration asks for, and that they can meet.

    Raises: UserError if Slurm started another number of tasks, or rank 0's address or port cannot be used.
    """
    environment = cluster_environment(trainer)
    if environment is None or (trainer.world_size == 1 and not isinstance(environment, SLURMEnvironment)):
        return
    n_tasks, n_devices, n_nodes = environment.world_size(), trainer.num_devices, trainer.num_nodes
    if isinstance(environment, SLURMEnvironment) and n_tasks != n_devices * n_nodes:
        raise UserError(
            f"Slurm started {n_tasks} tasks, but trainer.num_nodes x trainer.devices are {n_nodes} x {n_devices}: set "
            "trainer.num_nodes to --nodes, and trainer.devices to --ntasks-per-node"
        )
    # A process group that exists has its ranks.
    if n_tasks > 1 and not dist.is_initialized():
        _check_meeting_point(environment)


def _check_meeting_point(environment: ClusterEnvironment) -> None:
    """Raises: UserError if rank 0's address is unknown, or on rank 0 if its port is taken."""
    address, port = environment.main_address, environment.main_port
    try:
        addresses = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"the address of rank 0, {address}, is unknown here ({error.strerror}): set MASTER_ADDR to a name that all know"
        ) from error
    # torchrun's own process holds the port.
    if environment.global_rank() != 0 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    family = socket.AF_INET6 if all(f == socket.AF_INET6 for f, *_ in addresses) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: a former run's may still be closing
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port}, at which the ranks meet, cannot be used on this machine ({error.strerror}): another run may "
                "have it; set MASTER_PORT to another one for all ranks"
            ) from error
