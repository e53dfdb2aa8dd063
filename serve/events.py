"""Carries events from the engine's thread to the event loop: all events of one step in one call.

A call wakes the event loop, which then runs while the next step is computed and holds Python's lock: fewer calls cost less.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from slm.runtime.generation import Piece, Result

Event = Piece | Result


class Inbox:
    """Events of one request's texts, by index, until they are taken. Only the event loop may use it."""

    def __init__(self) -> None:
        self._events: list[tuple[int, Event]] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, index: int, event: Event) -> None:
        """Adds an event."""
        self._events.append((index, event))
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self, most: int) -> list[tuple[int, Event]]:
        """Waits for an event, and returns up to `most` events in the order of their arrival.

        Cancelling the wait loses no event.
        """
        while not self._events:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        taken, self._events = self._events[:most], self._events[most:]
        return taken


class Post:
    """Carries events to their inboxes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._underway: deque[tuple[Inbox, int, Event]] = deque()

    def to(self, inbox: Inbox, index: int) -> Callable[[Event], None]:
        """Returns a thread-safe function that receives the events of one text; they arrive after the next `deliver`."""

        def take(event: Event) -> None:
            self._underway.append((inbox, index, event))

        return take

    def deliver(self) -> None:
        """Makes the event loop put all events into the inboxes; thread-safe."""
        if not self._underway:
            return
        try:
            self.loop.call_soon_threadsafe(self._arrive)
        except RuntimeError:  # the event loop has ended, with every client that waited in it
            self._underway.clear()

    def _arrive(self) -> None:
        while self._underway:
            inbox, index, event = self._underway.popleft()
            inbox.put(index, event)
