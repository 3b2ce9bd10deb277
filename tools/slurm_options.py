"""Options that `launch` and `preflight` share: nodes of a Slurm cluster, as a site profile describes it."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from engine.errors import ConfigError
from launcher.slurm.site import Site, choose

SLURM = "slurm"
SiteName = Annotated[
    str | None, typer.Option("--site", help="slurm: site profile, by name or path (default: by this host's name).")
]
Nodes = Annotated[str | None, typer.Option(metavar="N|MIN-MAX", help="slurm: nodes, for example 2-4.")]
GpusPerNode = Annotated[
    int | None, typer.Option(min=0, help="slurm: GPUs of each node (default: those of the site); 0 for the CPU.")
]
RanksPerNode = Annotated[int | None, typer.Option(min=1, help="slurm: ranks on each node (default: one per GPU).")]
Time = Annotated[str | None, typer.Option(metavar="H:MM:SS", help="slurm: time limit of each start.")]
SiteKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm", metavar="KEY=VALUE", help="slurm: key of the site profile, for example allocation.account=ME."
    ),
]


def chosen_site(name: str | None, changes: list[str] | None) -> tuple[str, Site]:
    """Return (name, profile) of the site that was named, or that this host belongs to."""
    return choose(name, (socket.gethostname(), socket.getfqdn()), changes or [])


def refuse_slurm_options(launcher: str, given: dict[str, object]) -> None:
    """Raise `ConfigError` where an option of Slurm's was given beside another launcher; None means not given."""
    used = [option for option, value in given.items() if value is not None]
    if used:
        raise ConfigError(
            f"{used[0]} beside {launcher}",
            f"{', '.join(given)} with --launcher {SLURM}",
            f"add --launcher {SLURM}, or leave it out",
        )
