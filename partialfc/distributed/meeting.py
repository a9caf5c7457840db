"""Where launched processes meet before they are a group, and hear of those that will not come."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from partialfc.distributed.errors import Report, describe, first_line, is_passing, join_reports, name_ranks
from partialfc.distributed.ranks import Launched, launched, meeting_host

__all__ = ["RendezvousError", "getting_ready", "meet", "tell"]

logger = logging.getLogger(__name__)

_TELL_SECONDS = 30.0  # that a process which cannot start waits for the others, to tell them
_QUIET_SECONDS = 3.0  # of that, before it says so
_READ_SECONDS = 10.0  # that all stay until the last has read why
_LOOK_SECONDS = 0.2
_LONGEST_TEXT = 4000
_OF_USERS = (ValueError, OSError, ImportError)


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
def getting_ready(*, on_refusal: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What a launched process does before it joins `process_group`: if that fails, those who wait for it are told.

    Args:
        on_refusal: called when this process knows what all raise, before any of them ends: a launcher that sees one end
            tells the others to stop, of which one has the message to say.

    Raises:
        RendezvousError: on all launched processes, instead of the error of some. A process on its own, or one that
            finds nobody, raises it itself.
    """
    try:
        yield
    except Exception as error:
        place = None
        with suppress(ValueError):  # the error may be that this is not known
            place = launched(os.environ)
        told = None if place is None or place.world_size == 1 else tell(place, error, on_refusal=on_refusal)
        if told is None:
            raise
        raise told from error


def tell(
    place: Launched,
    error: Exception,
    *,
    timeout_seconds: float = _TELL_SECONDS,
    on_refusal: Callable[[], None] = lambda: None,
) -> RendezvousError | None:
    """Tells the others, which are in `meet` or on their way, why this process does not come.

    Args:
        place: of this process.
        error: why.
        timeout_seconds: to wait for rank 0, and for all to come.
        on_refusal: as of `getting_ready`.

    Returns:
        What all raise; None if nobody was found.
    """
    deadline = _Deadline(timeout_seconds)
    deadline.notice = f"cannot start: {describe(error)}; waiting up to {timeout_seconds:g} s to tell the others"
    try:
        roll = _Roll(place, deadline, on_refusal)
    except (RendezvousError, ValueError):
        return None
    return roll.cannot_come(error, deadline)


def meet(place: Launched, timeout: timedelta, *, on_refusal: Callable[[], None] = lambda: None) -> Store:
    """A store that all processes have reached, for this start of theirs alone.

    Args:
        place: of this process.
        timeout: to wait for all.
        on_refusal: as of `getting_ready`.

    Raises:
        RendezvousError: if not all come in time, or some cannot start; it names them.
    """
    deadline = _Deadline(timeout.total_seconds())
    roll = _Roll(place, deadline, on_refusal)
    roll.call(deadline)
    return roll.store


class _Deadline:
    """Until when to wait, for all that there is to wait for together.

    Attributes:
        seconds: from the beginning.
        notice: to be logged once the wait has been long enough for somebody to wonder; empty for nothing.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.notice = ""
        self._began = time.monotonic()

    @property
    def left(self) -> timedelta:
        """Until then; a second at least, in which what is there already can be got."""
        return timedelta(seconds=max(1.0, self._began + self.seconds - time.monotonic()))

    @property
    def is_over(self) -> bool:
        """Whether it has passed. To be asked now and then."""
        waited = time.monotonic() - self._began
        if self.notice and waited > _QUIET_SECONDS:
            logger.error("%s", self.notice)
            self.notice = ""
        return waited > self.seconds

    def wait(self, store: Store, key: str) -> bool:
        """Whether it is set in time."""
        while not self.is_over:
            with suppress(dist.DistStoreError):
                store.wait([key], min(self.left, timedelta(seconds=_QUIET_SECONDS)))
                return True
        return store.check([key])


def _open_store(place: Launched, deadline: _Deadline) -> Store:
    address = meeting_host(place)
    # Where the torchrun agent has a store for its workers, it listens at this address already.
    hosts = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts:
        _wait_for_listener(place, address, deadline)
    try:
        store = TCPStore(
            address, place.port, is_master=hosts, timeout=deadline.left, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        if hosts:
            raise RendezvousError(
                f"{_own(place)} cannot wait for the others at {address}:{place.port}: {first_line(error)}; it must be "
                "an address of this host and a free port: set MASTER_ADDR and MASTER_PORT"
            ) from error
        raise _not_reached(place, address, deadline, error) from error
    store.set_timeout(timedelta(seconds=deadline.seconds))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A store of the torchrun agent outlives a restart of its workers, and would show the dead ones.
        return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _wait_for_listener(place: Launched, address: str, deadline: _Deadline) -> None:
    # Not left to the store, which begins its whole time anew after a pause, and prints stacks.
    while True:
        try:
            socket.create_connection((address, place.port), timeout=deadline.left.total_seconds()).close()
            return
        except OSError as error:
            if deadline.is_over:
                raise _not_reached(place, address, deadline, error) from error
        time.sleep(_LOOK_SECONDS)


def _not_reached(place: Launched, address: str, deadline: _Deadline, error: Exception) -> RendezvousError:
    return RendezvousError(
        f"{_own(place)} did not reach rank 0 at {address}:{place.port} within {deadline.seconds:g} s: "
        f"{first_line(error)}; rank 0 has not started, MASTER_ADDR or MASTER_PORT is wrong, or the network does not "
        "let it through"
    )


class _Roll:
    """Who has come, and who has come to say that he cannot.

    Attributes:
        store: of this meeting. The agent of torchrun may keep what is around it for a later start, which has another.
    """

    def __init__(self, place: Launched, deadline: _Deadline, on_refusal: Callable[[], None]) -> None:
        self._place, self._all_meetings = place, _open_store(place, deadline)
        self._on_refusal = on_refusal
        try:
            number = self._all_meetings.add("meetings", 0)
        except dist.DistNetworkError as error:
            raise self._lost(error) from error
        self.store = PrefixStore(f"meeting {number}", self._all_meetings)

    def call(self, deadline: _Deadline) -> None:
        """Waits for all.

        Raises:
            RendezvousError: if not all come in time, or some cannot start; it names them.
        """
        try:
            self._arrive("")
            if not deadline.wait(self.store, "all here"):
                missing = [rank for rank in range(self._place.world_size) if not self.store.check([f"here/{rank}"])]
                raise RendezvousError(
                    f"{_own(self._place)} waited {deadline.seconds:g} s for {name_ranks(missing)}, which never came: "
                    "not started, died on the way (see its own messages), or cannot reach this network"
                )
            if self.store.add("cannot come", 0):
                raise self._refusal()
            if self.store.add("through", 1) >= self._place.world_size:
                self._all_meetings.add("meetings", 1)
        except dist.DistNetworkError as error:
            raise self._lost(error) from error

    def cannot_come(self, error: Exception, deadline: _Deadline) -> RendezvousError:
        """Tells the others why; what they are going to raise too, after all have come or the deadline is over."""
        if not isinstance(error, _OF_USERS):
            logger.error("this process cannot start", exc_info=error)
        lasting, text = isinstance(error, _OF_USERS) and not is_passing(error), describe(error)
        text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."
        try:
            self.store.add("cannot come", 1)
            self._arrive(json.dumps({"host": socket.gethostname(), "text": text, "lasting": lasting}))
            deadline.wait(self.store, "all here")
            self.store.set("all here", "")
            return self._refusal()
        except dist.DistNetworkError as lost:
            return RendezvousError(f"{text} (the others were not told: {first_line(lost)})", lasting=lasting)

    def _arrive(self, told: str) -> None:
        self.store.set(f"here/{self._place.rank}", told)
        if self.store.add("arrived", 1) >= self._place.world_size:
            self.store.set("all here", "")

    def _refusal(self) -> RendezvousError:
        size = self._place.world_size
        here = list(range(size))
        if self.store.add("arrived", 0) < size:
            here = [rank for rank in here if self.store.check([f"here/{rank}"])]
        texts = zip(here, self.store.multi_get([f"here/{rank}" for rank in here]), strict=True)
        told = {rank: json.loads(text) for rank, text in texts if text}
        self._on_refusal()
        self._wait_for_readers(len(here))
        if not told:
            return RendezvousError(
                f"{_own(self._place)} finds marks of an earlier start in the store of torchrun, which keeps it for all "
                "restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or start with launch/torchrun.sh"
            )
        reports = [Report(rank, what["host"], what["text"]) for rank, what in told.items()]
        return RendezvousError(
            join_reports(reports, size=size),
            lasting=any(what["lasting"] for what in told.values()),
            agreed=len(here) == size,
        )

    def _wait_for_readers(self, number: int) -> None:
        """The store goes with rank 0, and a launcher that sees one process end may end those that have yet to read."""
        with suppress(dist.DistStoreError, dist.DistNetworkError):
            if self.store.add("read", 1) >= number:
                self.store.set("all read", "")
                if number == self._place.world_size:  # else those to come shall still hear of it
                    self._all_meetings.add("meetings", 1)
            self.store.wait(["all read"], timedelta(seconds=_READ_SECONDS))

    def _lost(self, error: Exception) -> RendezvousError:
        return RendezvousError(
            f"{_own(self._place)} lost rank 0 at the start, which died or gave up: {first_line(error)}"
        )


def _own(place: Launched) -> str:
    return f"rank {place.rank} of {place.world_size} (host {socket.gethostname()})"
