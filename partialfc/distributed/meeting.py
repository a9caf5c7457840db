"""Where launched processes meet before they are a group, and hear of those that will not come."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from partialfc.distributed.errors import Report, describe, is_passing, join_reports, named
from partialfc.distributed.ranks import Launched, launched, reachable

__all__ = ["RendezvousError", "getting_ready", "meet"]

_TELL_SECONDS = 30.0  # that a process which cannot start waits for the others, to tell them
_READ_SECONDS = 10.0  # that rank 0 stays, with the store, for the others to read it


class RendezvousError(RuntimeError):
    """The launched processes did not all find each other, or some cannot start.

    Attributes:
        lasting: whether another start of the same would end like this one.
        agreed: whether every rank raises it with the same message, so that one of them need say it.
    """

    def __init__(self, message: str, *, lasting: bool = False, agreed: bool = False) -> None:
        super().__init__(message)
        self.lasting, self.agreed = lasting, agreed


@contextmanager
def getting_ready() -> Iterator[None]:
    """What a launched process does before it joins `process_group`: if that fails, those who wait for it are told.

    Raises:
        RendezvousError: on all launched processes, instead of the error of some. A process on its own raises it itself.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        place = None
        with suppress(ValueError):  # the error may be that this is not known
            place = launched(os.environ)
        if place is None or place.address is None or place.world_size == 1:
            raise
        timeout = timedelta(seconds=_TELL_SECONDS)
        try:
            roll = _Roll(_open_store(place, timeout), place)
        except RendezvousError:
            raise error from None
        raise roll.cannot_come(error, timeout) from error


def meet(place: Launched, timeout: timedelta) -> Store:
    """A store that all processes have reached.

    Raises:
        RendezvousError: if not all come in time, or some cannot start; it names them.
    """
    store = _open_store(place, timeout)
    _Roll(store, place).call(timeout)
    return store


def _open_store(place: Launched, timeout: timedelta) -> Store:
    address = place.address
    assert address is not None
    if place.launcher == "srun":
        address = reachable(address)
    # Where the torchrun agent has a store for its workers, it listens at this address already.
    hosts = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            address, place.port, is_master=hosts, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        if hosts:
            raise RendezvousError(
                f"{_own(place)} cannot wait for the others at {address}:{place.port}: {_first_line(error)}; it must be "
                "an address of this host and a free port: set MASTER_ADDR and MASTER_PORT"
            ) from error
        raise RendezvousError(
            f"{_own(place)} did not reach rank 0 at {address}:{place.port} within {timeout.total_seconds():g} s: "
            f"{_first_line(error)}; rank 0 has not started, MASTER_ADDR or MASTER_PORT is wrong, or the network "
            "does not let it through"
        ) from error
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A store of the torchrun agent outlives a restart of its workers, and would show the dead ones.
        return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


class _Roll:
    """Who has come, and who has come to say that he cannot."""

    def __init__(self, store: Store, place: Launched) -> None:
        self._store, self._place = store, place

    def call(self, timeout: timedelta) -> None:
        """Waits for all.

        Raises:
            RendezvousError: if not all come in time, or some cannot start; it names them.
        """
        try:
            self._arrive("")
            try:
                self._store.wait(["all here"], timeout)
            except dist.DistStoreError as error:
                missing = [rank for rank in range(self._place.world_size) if not self._store.check([f"here/{rank}"])]
                if missing:
                    raise RendezvousError(
                        f"{_own(self._place)} waited {timeout.total_seconds():g} s for {named(missing)}, which never "
                        "came: not started, died on the way (see its own messages), or cannot reach this network"
                    ) from error
            if self._store.add("cannot come", 0):
                raise self._refusal()
        except dist.DistNetworkError as error:
            raise self._lost(error) from error

    def cannot_come(self, error: Exception, timeout: timedelta) -> RendezvousError:
        """Tells the others why; what they are going to raise too, after all have come or `timeout` is over."""
        try:
            told = {"host": socket.gethostname(), "text": describe(error), "lasting": not is_passing(error)}
            self._store.add("cannot come", 1)
            self._arrive(json.dumps(told))
            with suppress(dist.DistStoreError):
                self._store.wait(["all here"], timeout)
            self._store.set("all here", "")
            return self._refusal()
        except dist.DistNetworkError as lost:
            return RendezvousError(f"{_own(self._place)}: {describe(error)}; {self._lost(lost)}")

    def _arrive(self, told: str) -> None:
        self._store.set(f"here/{self._place.rank}", told)
        if self._store.add("arrived", 1) >= self._place.world_size:
            self._store.set("all here", "")

    def _refusal(self) -> RendezvousError:
        size = self._place.world_size
        here = [rank for rank in range(size) if self._store.check([f"here/{rank}"])]
        told = {rank: json.loads(text) for rank in here if (text := self._store.get(f"here/{rank}"))}
        reports = [Report(rank, what["host"], what["text"]) for rank, what in told.items()]
        self._stay_for_readers(len(here))
        return RendezvousError(
            join_reports(reports, size=size),
            lasting=any(what["lasting"] for what in told.values()),
            agreed=len(here) == size,
        )

    def _stay_for_readers(self, number: int) -> None:
        """The store may go with rank 0."""
        if self._store.add("read", 1) >= number:
            self._store.set("all read", "")
        if self._place.rank == 0:
            with suppress(dist.DistStoreError):
                self._store.wait(["all read"], timedelta(seconds=_READ_SECONDS))

    def _lost(self, error: Exception) -> RendezvousError:
        return RendezvousError(
            f"{_own(self._place)} lost rank 0 at the start, which died or gave up: {_first_line(error)}"
        )


def _own(place: Launched) -> str:
    return f"rank {place.rank} of {place.world_size} (host {socket.gethostname()})"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
