"""Where one author speaks alone, its envelopes come by the fastest way there is: when a way has become longer or shorter, ways race anew.

Plumtree's tree is made by a race: an envelope goes over all links, and the link that brings it first stays eager (SRDS 2007, section
3.4). Later nothing runs against the tree any more, and after a failure it is mended by whoever was asked first. With several authors
the tree is a compromise between them, and does not come to rest if it is made anew for whoever speaks next.
"""

from solyd_swarm.core.events import Action, Send
from solyd_swarm.core.lateness import Lateness, Pause
from solyd_swarm.core.link import Link
from solyd_swarm.core.wire import Graft, encode


class Ways:
    """Races over the links of the active view. It appends what is to be done to `out`.

    Args:
        pause, pause_max: seconds between two races of one kind, twice as long each time until a neighbour comes or goes.
    """

    def __init__(self, active: dict[bytes, Link], lateness: Lateness, out: list[Action], pause: float, pause_max: float) -> None:
        self._active = active
        self._lateness = lateness
        self._out = out
        self.refloods = 0
        """Times that all links were made eager, to find the fastest way where the tree had failed."""
        self.spreads = 0
        """Times that an envelope was pushed over all links, since a shorter way to us had opened."""
        self._reflood_pause = Pause(pause, pause_max)
        self._spread_pause = Pause(pause, pause_max)
        self._parent = b""  # the neighbour that brought the last envelope
        self._owes_spread = False  # a shorter way has opened during the pause

    def neighbors_changed(self) -> None:
        """What there is to be found has changed: pauses are short again."""
        self._reflood_pause.reset()
        self._spread_pause.reset()

    def reflood(self, link: Link | None, id: bytes, now: float) -> set[bytes] | None:
        """The tree has failed somewhere before us, and whose graft was the quickest says little about ways: so the next envelope comes
        over all links, as at first, and the fastest stays.

        Args:
            link: the one that has brought the envelope.

        Returns:
            The neighbours whose links were lazy; None if the last race was just now.
        """
        if not self._reflood_pause.is_over(now):
            return None
        self._reflood_pause.begin(now)
        self.refloods += 1
        lazy: set[bytes] = set()
        for peer, other in self._active.items():
            if other is link or other.congested:
                continue
            other.spare(id)
            if not other.eager:
                other.make_eager(now)
                lazy.add(peer)
                self._out.append(Send(peer, encode(Graft([]))))
        return lazy

    def came(self, link: Link, now: float, *, in_time: bool, may_race: bool) -> None:
        """An envelope has come over this link. If it came by a shorter way than the last one, so it may to others through us: it is
        to be pushed over all links, and whoever has had it already makes its link lazy again.

        Args:
            in_time: nobody had to be asked for it, nor did it come suddenly later than the last one.
            may_race: not where frames get lost, so that links are not pruned, nor during a reflood.
        """
        # Whoever was first with the last one is not any more; or it is, but earlier itself.
        is_other, self._parent = link.peer != self._parent, link.peer
        if not self._lateness.is_alone or not link.up:
            return
        self._owes_spread |= in_time and (is_other or self._lateness.has_fallen)
        if not self._owes_spread or not may_race or not self._spread_pause.is_over(now):
            return
        self._owes_spread = False
        self._spread_pause.begin(now)
        self.spreads += 1
        for other in self._active.values():
            if not other.congested:
                other.make_eager(now)
