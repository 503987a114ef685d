"""What a fault cost, whether that is within the goals, and the table."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = ("read", "login", "order", "unkeyed order")
RESENT = ("read", "order")
"""The kinds that are sent again when they fail; an order has a key, which keeps it from being made twice."""
REFUSED = 503
STRENGTH_SECONDS = 120
"""In which all must be back after the repair of a fault began."""


class Sent(NamedTuple):
    """A request, by the monotonic clock.

    :param began: when it was sent.
    :param ended: when its response was complete, or it was given up.
    :param status: of the first response, or what happened instead.
    :param right: whether the first response was the right one.
    :param settled: whether it, or one of those to the same request sent again, was.
    """

    kind: str
    began: float
    ended: float
    status: int | str
    right: bool
    settled: bool


class Goal(NamedTuple):
    """What a fault may cost. Nothing acknowledged is ever lost or doubled, and all must be back in STRENGTH_SECONDS.

    :param never: kinds of requests of which none may fail.
    :param in_flight: kinds of which at most those may fail that were on their way when the fault began.
    :param after_retry: kinds of which none may fail in the end, when they are sent again.
    :param moved: seconds after which no request may be sent that fails.
    :param returning: for how many seconds from when the repair begins that is not so, as what returns may cost
        something, too.
    :param refuses: seconds after which every request is answered with 503, until the repair begins.
    :param forced: how many access tokens WeChat may be asked for by force, which invalidates the one before.
    :param two_tokens: for how many seconds two access tokens may be in use.
    """

    never: tuple[str, ...] = ()
    in_flight: tuple[str, ...] = ()
    after_retry: tuple[str, ...] = ()
    moved: float | None = None
    returning: float = 0
    refuses: float | None = None
    forced: int | None = None
    two_tokens: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.never:
            parts.append(f"no {_either(self.never)} fails")
        if self.in_flight:
            parts.append(f"of {_plural(self.in_flight)} at most those fail that were on their way")
        if self.after_retry:
            parts.append(f"no {_either(self.after_retry)} fails when it is sent again")
        if self.moved is not None:
            but = f", but in the first {self.returning:.0f} s of the repair" if self.returning else ""
            parts.append(f"what is sent after {self.moved:.0f} s is served{but}")
        if self.refuses is not None:
            parts.append(f"what is sent after {self.refuses:.0f} s gets 503 until the repair begins")
        if self.forced is not None:
            parts.append(f"WeChat is asked by force for at most {self.forced} access tokens")
        if self.two_tokens is not None:
            parts.append(f"two are in use for at most {self.two_tokens:.0f} s")
        return "; ".join(parts) or "nothing acknowledged is lost or doubled"


def _either(kinds: Sequence[str]) -> str:
    *others, last = kinds
    return f"{', '.join(others)} or {last}" if others else last


def _plural(kinds: Sequence[str]) -> str:
    return " and ".join(f"{kind}s" for kind in kinds)


def seconds_with_two(uses: Iterable[Sequence[float]]) -> float:
    """Return for how long at most an access token was in use after the first use of a newer one.

    :param uses: the time of the first and of the last use of each that was used, in the order of issue.
    """
    last, longest = 0.0, 0.0
    for times in filter(None, uses):
        longest, last = max(longest, last - times[0]), max(last, times[-1])
    return longest


@dataclass
class Row:
    """What a fault led to.

    :param load: where it came from, and how much.
    :param failed: how many requests failed at first, by kind.
    :param in_the_end: and how many of them when they were sent again, too.
    :param first: seconds from its beginning until the first request that failed was sent.
    :param last: and the last one.
    :param two_tokens: for how many seconds two access tokens were in use; None if nothing asked for one.
    :param strength: seconds from when its repair began until all was back; None if it did not come back.
    :param problems: all that must not be.
    """

    fault: str
    load: str = ""
    requests: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    in_the_end: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    first: float | None = None
    last: float | None = None
    two_tokens: float | None = None
    strength: float | None = 0
    problems: list[str] = field(default_factory=list)


class Facts(NamedTuple):
    """What was seen of a fault.

    :param happened: whether it is proved that it happened.
    :param began: when, by the monotonic clock.
    :param ended: when its repair began.
    :param lacking: what was not back in time.
    :param complaints: about responses that are wrong whatever happens.
    :param forced: how many access tokens WeChat was asked for by force.
    :param two_tokens: for how many seconds an access token was in use after the first use of the next one.
    """

    happened: object
    began: float
    ended: float
    sent: Sequence[Sent]
    lost: int
    doubled: int
    strength: float | None
    lacking: Sequence[str] = ()
    complaints: Iterable[str] = ()
    forced: int = 0
    two_tokens: float = 0


def judge(fault: str, load: str, goal: Goal, facts: Facts) -> Row:
    """Return the row of a fault, with all the goals that were missed."""
    concerned = [one for one in facts.sent if one.ended >= facts.began]
    failed = [one for one in concerned if not one.right]
    row = Row(
        fault,
        load,
        len(concerned),
        Counter(one.kind for one in failed),
        Counter(one.kind for one in failed if not one.settled and one.kind in RESENT),
        sum(one.settled and one.kind != "read" for one in concerned),
        facts.lost,
        facts.doubled,
        strength=facts.strength,
    )
    if failed:
        row.first = max(0, min(one.began for one in failed) - facts.began)
        row.last = max(0, max(one.began for one in failed) - facts.began)
    if not facts.happened:
        row.problems.append("vacuous: it did not happen")
    if set(KINDS) - {one.kind for one in concerned}:
        row.problems.append("vacuous: not all kinds of requests were sent")
    row.problems += [f"{count} {what}" for count, what in ((facts.lost, "lost"), (facts.doubled, "doubled")) if count]
    for kind in goal.never:
        row.problems += _too_many(kind, "failed", [one for one in failed if one.kind == kind])
    for kind in goal.in_flight:
        later = [one for one in failed if one.kind == kind and one.began > facts.began]
        row.problems += _too_many(kind, "sent during it failed", later)
    for kind in goal.after_retry:
        row.problems += _too_many(kind, "failed in the end", [o for o in failed if o.kind == kind and not o.settled])
    if goal.moved is not None:
        late = [one for one in failed if one.began > facts.began + goal.moved]
        late = [one for one in late if not facts.ended <= one.began < facts.ended + goal.returning]
        row.problems += _too_many("request", f"sent after {goal.moved:.0f} s failed", late)
    if goal.refuses is not None:
        refused = [one for one in concerned if facts.began + goal.refuses < one.began and one.ended < facts.ended]
        if not refused:
            row.problems.append("vacuous: nothing was refused")
        others = [one for one in refused if one.status != REFUSED]
        row.problems += _too_many("request", f"sent after {goal.refuses:.0f} s did not get 503", others)
    if goal.forced is not None:
        if not facts.forced:
            row.problems.append("vacuous: no access token was asked for by force")
        if facts.forced > goal.forced:
            row.problems.append(f"{facts.forced} access tokens were asked for by force")
    if goal.two_tokens is not None:
        row.two_tokens = facts.two_tokens
        if facts.two_tokens > goal.two_tokens:
            row.problems.append(f"two access tokens were in use for {facts.two_tokens:.1f} s")
    if facts.strength is None:
        row.problems.append(f"not back at full strength: {', '.join(facts.lacking)}")
    row.problems += [f"{text} ({count} ×)" for text, count in sorted(Counter(facts.complaints).items())]
    return row


def _too_many(kind: str, what: str, failed: Sequence[Sent]) -> list[str]:
    how = ", ".join(f"{status}: {count}" for status, count in Counter(one.status for one in failed).most_common())
    return [f"{len(failed)} {kind}s {what} ({how})"] if failed else []


TITLES = (
    "fault",
    "load",
    "requests",
    "failed",
    "acknowledged, lost",
    "doubled",
    "first failure, s",
    "last failure, s",
    "two access tokens, s",
    "full strength, s",
)


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a table in Markdown."""
    return _lines(TITLES, map(_cells, rows))


def goals(faults: Iterable[tuple[str, Goal]]) -> str:
    """Return the goals as a table in Markdown."""
    return _lines(("fault", "goal"), ((name, str(goal)) for name, goal in faults))


def _lines(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head, *lines = [f"| {' | '.join(cells)} |\n" for cells in (titles, *rows)]
    return "".join([head, f"|{'---|' * len(titles)}\n", *lines])


def _cells(row: Row) -> list[str]:
    failed = ", ".join(f"{kind} {row.failed[kind]}" for kind in KINDS if row.failed[kind]) or "0"
    if any(row.failed[kind] for kind in RESENT):
        failed += f"; sent again {row.in_the_end.total()}"
    failed += "".join(f"; **{problem}**" for problem in row.problems)
    seconds = ["–" if value is None else f"{value:.1f}" for value in (row.first, row.last, row.two_tokens)]
    strength = "never" if row.strength is None else f"{row.strength:.1f}"
    counted = [str(row.requests), failed, f"{row.acknowledged}, {row.lost}", str(row.doubled)]
    return [row.fault, row.load, *counted, *seconds, strength]
