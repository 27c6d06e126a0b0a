"""Listening sockets: which of ours other machines can reach, and the addresses of this machine's interfaces.

psutil comes with distributed: it is loaded when a cluster is.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterable
from typing import Any

from tsclust_ooc.errors import TsclustError, UsageError
from tsclust_ooc.extras import load
from tsclust_ooc.units import plural

LOOPBACK = "127.0.0.1"


def open_doors(wanted: Iterable[str] = (), *, parent: bool = False) -> frozenset[str]:
    """TCP sockets of this process and its descendants that listen on anything but loopback and the `wanted` addresses.

    Each as address, port, process. With `parent` those of the parent process as well (a worker's nanny).
    """
    psutil = load("psutil")
    me, found = psutil.Process(), set()
    family = [me, *me.children(recursive=True)] + ([me.parent()] if parent else [])
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end while we look
            sockets = getattr(process, "net_connections", None) or process.connections  # psutil 6 renamed it
            found |= {(process.pid, *s.laddr) for s in sockets(kind="tcp") if s.status == psutil.CONN_LISTEN}
    fine = set(wanted)
    beyond = (door for door in found if not (ipaddress.ip_address(door[1]).is_loopback or door[1] in fine))
    return frozenset(f"{address} port {port} (process {pid})" for pid, address, port in beyond)


def refuse_open_doors(known: frozenset[str] = frozenset(), wanted: Iterable[str] = (), *, parent: bool = False) -> None:
    """TsclustError when `open_doors` finds any that are not `known`."""
    opened = sorted(open_doors(wanted, parent=parent) - known)
    if opened:
        places = ", ".join(["loopback", *wanted])
        raise TsclustError(
            f"the cluster listens beyond what was asked for, on {', '.join(opened)}, where only {places} is wanted. "
            "It was stopped. Look for preloads and addresses in your dask configuration (dask config list), "
            "or use --scheduler threads."
        )


def address_of(interface: str | None) -> str:
    """The IPv4 address of a network interface; UsageError, naming those there are, when it has none."""
    found = _interfaces()
    if interface in found:
        return found[interface]
    shown = ", ".join(f"{name} ({address})" for name, address in found.items())
    given = "none was given" if interface is None else f"{interface!r} has no IPv4 address here"
    raise UsageError(
        f"--scheduler slurm needs the network interface over which workers reach this node, and {given}. "
        f"Use --interface with one of {plural(len(found), 'interface')}: {shown}."
    )


def _interfaces() -> dict[str, str]:
    addresses: dict[str, list[Any]] = load("psutil").net_if_addrs()
    inet = load("socket").AF_INET
    return {name: a.address for name, all_of_it in addresses.items() for a in all_of_it if a.family == inet}
