"""The outcome of a checkup: as sentences for people, as one JSON object for programs, and as an exit status.

The JSON object has these keys, which stay; others may come:

``version``: 1; ``ok``: whether the exit status is 0; ``seconds``: how long was listened; ``with_topic``: whether a topic was joined;
``neighbors``: how many were met under it; ``ways``: by name of a way of finding peers (``mdns``, ``dht``, ``mainline``,
``bootstrap``), ``"works"`` or ``"possible"``: those that do not work are not there; ``findings``: objects with ``part`` (string),
``works`` (true, false, or null: cannot be told), ``says``, ``advice`` (strings, the latter maybe empty) and ``figures`` (object).
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from solyd_swarm.doctor.findings import Finding, counted, listed

FORMAT = 1
WIDTH = 100
_MARKS = {True: "ok", False: "no", None: "?"}
_NAMES = {"mdns": "mDNS", "dht": "the peers' DHT", "mainline": "the Mainline DHT", "bootstrap": "bootstrap addresses"}


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    Attributes:
        seconds: how long was listened.
        neighbors: how many were met under the topic; None without a topic.
    """

    findings: Sequence[Finding]
    seconds: float
    neighbors: int | None

    @property
    def ways(self) -> dict[str, str]:
        """The ways of finding peers that work, or that may as far as can be told alone: ``"works"``, ``"possible"``."""
        broken = {finding.part for finding in self.findings if finding.works is False}
        found: dict[str, str] = {}
        for finding in self.findings:
            if finding.way and finding.works is not False and finding.way not in broken and found.get(finding.way) != "works":
                found[finding.way] = "works" if finding.works else "possible"
        return found

    @property
    def ok(self) -> bool:
        """With a topic: somebody was met; else: there is a way of finding peers."""
        return bool(self.ways) if self.neighbors is None else self.neighbors > 0

    @property
    def status(self) -> int:
        """The exit status."""
        return 0 if self.ok else 1

    def to_json(self) -> str:
        """One object on one line, in ASCII."""
        return json.dumps(
            {
                "version": FORMAT,
                "ok": self.ok,
                "seconds": self.seconds,
                "with_topic": self.neighbors is not None,
                "neighbors": self.neighbors or 0,
                "ways": self.ways,
                "findings": [
                    {
                        "part": finding.part,
                        "works": finding.works,
                        "says": finding.says,
                        "advice": finding.advice,
                        "figures": dict(finding.figures),
                    }
                    for finding in self.findings
                ],
            }
        )

    def to_text(self) -> str:
        """A paragraph for each finding, marked; the verdict; what to do."""
        lines = [line for finding in self.findings for line in _paragraph(_MARKS[finding.works].ljust(4), finding.says)]
        lines += ["", *_paragraph("", self.verdict)]
        # Most urgent first; what several findings ask for, once.
        urgent = sorted(self.findings, key=lambda finding: finding.works is not False)
        advice = list(dict.fromkeys(finding.advice for finding in urgent if finding.advice))
        if advice:
            lines += ["", "What to do:"]
            lines += [line for number, text in enumerate(advice, 1) for line in _paragraph(f"{number:2}. ", text)]
        # Names of hosts and interfaces come from elsewhere: nothing of them may command the terminal.
        return "".join(f"{''.join(each if each.isprintable() else '?' for each in line)}\n" for line in lines)

    @property
    def verdict(self) -> str:
        """In a sentence or two."""
        working = [_NAMES.get(name, name) for name, degree in self.ways.items() if degree == "works"]
        possible = [_NAMES.get(name, name) for name, degree in self.ways.items() if degree != "works"]
        parts = []
        if self.neighbors is not None:
            met = counted(self.neighbors, "neighbour").capitalize()
            parts.append(f"{met} {'were' if self.neighbors > 1 else 'was'} met under this topic within {self.seconds:g} s.")
        if working:
            parts.append(f"Peers can be found from here by {listed(working)}.")
        if possible:
            parts.append(
                f"{'Also' if working else 'Nothing is seen to be wrong with'} {listed(possible)}"
                f"{', perhaps' if working else ', but nobody was there to prove it'}."
            )
        if not (working or possible or self.neighbors):
            parts.append("No way of finding peers works from here.")
        return " ".join(parts)


def _paragraph(mark: str, text: str) -> list[str]:
    indent = " " * len(mark)
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
