"""`make trace ID=…`: all that the logs know of one trace, the failing span first.

Reads ID and LOGS from the environment. ID is a trace id, also in upper case or with dashes, a `traceparent`, or the
first 8 digits or more of either. LOGS names files and folders, by default `var/log`; `-` is stdin. The exit status is 1
if that is no trace or several, 2 if ID or LOGS make no sense.
"""

import gzip
import os
import re
import shlex
import signal
import sys
import zlib
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, cast

from dev.log_reader import BOLD, SERIOUS, clock, lay_out, local_time, paint, parse, short, text, wants_colour

DEFAULT_LOGS = "var/log"
ERRORS = {"ERROR", "CRITICAL"}
COMPARED = ("timestamp", "level", "instance", "spanId", "parentSpanId")
"""Of these every line has one, which is a text: others than our services may have written it."""

Line = dict[str, Any]


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may stop in the middle
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    places = os.environ.get("LOGS", "").strip() or DEFAULT_LOGS
    given = os.environ.get("ID", "").strip()
    if not given:
        fail(2, "which one? Give ID=… as X-Trace-Id says it, or its first 8 digits")
    digits = trace_id_of(given)
    try:
        traces = read(sources(places), digits)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        fail(2, f"LOGS={places} cannot be read: {error}")
    colour = wants_colour(sys.stdout)
    if not traces:
        fail(1, f"no line of trace {digits} in {'stdin' if places == '-' else places}")
    if len(traces) > 1:
        print(listing(traces))
        fail(1, f"{digits} is the beginning of {len(traces)} traces, listed above; give more digits")
    for trace_id, lines in traces.items():
        print(story(trace_id, lines, colour))


def fail(status: int, words: str) -> NoReturn:
    print(f"make trace: {words}", file=sys.stderr)
    raise SystemExit(status)


def trace_id_of(given: str) -> str:
    """The digits to look for, in lower case.

    :raises SystemExit: if it is no trace id and not the beginning of one.
    """
    # As it stands on a screen: after a name, in quotes, cut off.
    words = re.sub("^[^:=]*[:=]", "", "".join(given.lower().split())).strip("\"'.,;…")
    # https://www.w3.org/TR/trace-context/#traceparent-header: version-traceid-parentid-flags
    version, _, rest = words.partition("-")
    digits = rest.partition("-")[0] if len(version) == 2 else words.replace("-", "")
    if not re.fullmatch("[0-9a-f]{8,32}", digits):
        fail(2, f"ID={text(given)} is no trace id, no traceparent, and not the first 8 digits or more of one")
    return digits


def sources(places: str) -> Iterator[Iterable[bytes]]:
    """The lines of each log, rotated ones before those that came after them.

    :param places: files and folders, separated by spaces, in quotes where they hold some; or `-`.
    :raises OSError: if one is not there.
    :raises ValueError: if quotes do not match.
    """
    if places == "-":
        yield sys.stdin.buffer
        return
    files: list[Path] = []
    for place in map(Path, shlex.split(places)):
        if place.is_dir():
            files += [path for path in place.rglob("*") if path.is_file()]
        elif place.exists() or places != DEFAULT_LOGS:
            files.append(place)
    for path in sorted({path.resolve() for path in files}, key=_age):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            yield lines


def _age(path: Path) -> tuple[str, int]:
    """8000.jsonl.2 is older than 8000.jsonl.1, which is older than 8000.jsonl."""
    name, _, number = str(path).removesuffix(".gz").rpartition(".")
    return (name, -int(number)) if number.isdecimal() else (str(path), 0)


def read(logs: Iterable[Iterable[bytes]], digits: str) -> dict[str, list[Line]]:
    """The lines of each trace that begins with these digits, in order of time.

    What stands before a line's object, such as the name of a container, is passed over.
    """
    traces: dict[str, list[Line]] = {}
    for log in logs:
        for raw in log:
            if digits.encode() in raw:
                line = raw.decode(errors="replace")
                fields = parse(line[max(line.find("{"), 0) :])
                if fields and isinstance(fields.get("log"), str):  # in a file of Docker's
                    fields = parse(fields["log"])
                trace_id = fields.get("traceId") if fields else None
                if fields and isinstance(trace_id, str) and trace_id.startswith(digits):
                    what_is_compared = {name: str(fields.get(name) or "-") for name in COMPARED}
                    traces.setdefault(trace_id, []).append(fields | what_is_compared)
    for lines in traces.values():
        lines.sort(key=_time)
    return traces


def _time(line: Line) -> str:
    """RFC 3339 in UTC with milliseconds sorts as text."""
    return str(line["timestamp"])


def failing_span(lines: list[Line]) -> str | None:
    """The span in which a trace went wrong: the first to fail and to say why, or else the first to fail.

    It says why with an exception, or a failed call of WeChat; the line of a request alone says only that it failed. A
    span of another instance that was called by it failed before it, whatever the clocks say.

    :param lines: of one trace, in order of time.
    :returns: its id; None if none failed.
    """
    parents = {line["spanId"]: line["parentSpanId"] for line in lines if line["parentSpanId"] != "-"}
    failed = {line["spanId"]: line["instance"] for line in lines if line["level"] in ERRORS}
    reasons = [line for line in lines if line["spanId"] in failed and _says_why(line)]
    spans = dict.fromkeys(line["spanId"] for line in reasons or lines if line["spanId"] in failed)
    cause = next(iter(spans), None)
    for span in spans:
        if cause in _ancestors(span, parents) and failed[span] != failed[cause]:
            cause = span
    return cause


def _says_why(line: Line) -> bool:
    return line["level"] in SERIOUS and not {"exceptionType", "interface"}.isdisjoint(line)


def _ancestors(span: str, parents: dict[str, str]) -> set[str]:
    known: set[str] = set()
    while span in parents and parents[span] not in known:
        span = parents[span]
        known.add(span)
    return known


def story(trace_id: str, lines: list[Line], colour: bool) -> str:
    """The failing span with its stack, then all lines, each with its instance and span."""
    instances = list(dict.fromkeys(text(line["instance"]) for line in lines))
    width = max(map(len, instances))

    def mark(line: Line) -> str:
        return f"{text(line['instance']):{width}} {short(line['spanId'])}"

    began = local_time(lines[0]["timestamp"])
    when = f", {began:%Y-%m-%d} (UTC{began:%z})" if began else ""
    told = [paint(f"Trace {trace_id}{when}, {_count(lines)} of {', '.join(instances)}", BOLD, colour), ""]
    failed = failing_span(lines)
    if failed:
        told += [paint(f"The failing span {text(failed)}", BOLD, colour)]
        told += [lay_out(line, mark(line), colour) for line in lines if line["spanId"] == failed]
    else:
        told += ["No span of it failed."]
    told += ["", paint("The whole story", BOLD, colour)]
    for line in lines:
        if line["spanId"] == failed and line.get("stack"):
            told.append(lay_out({**line, "stack": None}, mark(line), colour, {"stack": "above"}))
        else:
            told.append(lay_out(line, mark(line), colour))
    return "\n".join(told)


def _count(lines: list[Line]) -> str:
    return f"{len(lines)} line{'s' if len(lines) > 1 else ''}"


def listing(traces: dict[str, list[Line]]) -> str:
    """One line for each trace: its id, when it began, how many lines it has, the worst of them, and its first route."""
    rows = []
    for trace_id, lines in sorted(traces.items(), key=lambda trace: _time(trace[1][0])):
        began = local_time(lines[0]["timestamp"])
        levels = {line["level"] for line in lines}
        worst = next((level for level in ("CRITICAL", "ERROR", "WARNING") if level in levels), "INFO")
        route = next((f"{line.get('method')} {line['route']}" for line in lines if line.get("route")), "")
        day = f"{began:%Y-%m-%d} " if began else ""
        rows.append(f"{trace_id}  {day}{clock(lines[0]['timestamp'])}  {worst:8}  {_count(lines)}  {text(route)}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
