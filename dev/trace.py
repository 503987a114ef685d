"""`make trace ID=…` or `python3 -m dev.trace ID [LOGS]`: prints all log lines of one trace, the failing span first.

Needs nothing but Python, so it runs on a server as on a laptop. Reads ID and LOGS from the arguments or from the
environment. ID is a trace id, also in upper case or with dashes, a `traceparent`, or at least the first 8 digits of
either. LOGS names files and folders, by default `var/log`; `-` is stdin. The exit status is 1 if no trace or several
match, 2 if ID or LOGS is invalid.
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
COMPARED = ("timestamp", "level", "instance", "spanId", "parentSpanId", "version")
"""Always strings after parsing, as lines of other programs may lack them or have other types."""

Line = dict[str, Any]


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may stop early
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    places = (shlex.join(sys.argv[2:]) or os.environ.get("LOGS", "")).strip() or DEFAULT_LOGS
    given = (sys.argv[1] if sys.argv[1:] else os.environ.get("ID", "")).strip()
    if not given:
        fail(2, "ID is missing: set ID=… to an X-Trace-Id, or at least its first 8 digits")
    digits = trace_id_of(given)
    try:
        traces = read(sources(places), digits)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        fail(2, f"LOGS={places} cannot be read: {error}")
    colour = wants_colour(sys.stdout)
    if not traces:
        fail(1, f"no lines of trace {digits} in {'stdin' if places == '-' else places}")
    if len(traces) > 1:
        print(listing(traces))
        fail(1, f"{digits} matches {len(traces)} traces, listed above; give more digits")
    for trace_id, lines in traces.items():
        print(story(trace_id, lines, colour))


def fail(status: int, words: str) -> NoReturn:
    print(f"make trace: {words}", file=sys.stderr)
    raise SystemExit(status)


def trace_id_of(given: str) -> str:
    """Return the digits to search for, in lower case.

    :raises SystemExit: if this is neither a trace id nor the beginning of one.
    """
    # As copied from a screen: after a name, in quotes, truncated.
    words = re.sub("^[^:=]*[:=]", "", "".join(given.lower().split())).strip("\"'.,;…")
    # https://www.w3.org/TR/trace-context/#traceparent-header: version-traceid-parentid-flags
    version, _, rest = words.partition("-")
    digits = rest.partition("-")[0] if len(version) == 2 else words.replace("-", "")
    if not re.fullmatch("[0-9a-f]{8,32}", digits):
        fail(2, f"ID={text(given)} is not a trace id, a traceparent, or at least the first 8 digits of one")
    return digits


def sources(places: str) -> Iterator[Iterable[bytes]]:
    """Yield the lines of each log, oldest file first.

    :param places: files and folders separated by spaces, with shell quoting; or `-`.
    :raises OSError: if one does not exist.
    :raises ValueError: if a quote is not closed.
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
    """Return the lines of each trace whose id begins with these digits, sorted by time.

    A prefix of the JSON object, such as the name of a container, is ignored.
    """
    traces: dict[str, list[Line]] = {}
    for log in logs:
        for raw in log:
            if digits.encode() in raw:
                line = raw.decode(errors="replace")
                fields = parse(line[max(line.find("{"), 0) :])
                if fields and isinstance(fields.get("log"), str):  # Docker's json-file format
                    fields = parse(fields["log"])
                trace_id = fields.get("traceId") if fields else None
                if fields and isinstance(trace_id, str) and trace_id.startswith(digits):
                    as_text = {name: str(fields.get(name) or "-") for name in COMPARED}
                    traces.setdefault(trace_id, []).append(fields | as_text)
    for lines in traces.values():
        lines.sort(key=_time)
    return traces


def _time(line: Line) -> str:
    """RFC 3339 in UTC with milliseconds sorts as text."""
    return str(line["timestamp"])


def failing_span(lines: list[Line]) -> str | None:
    """Return the span that caused a trace to fail: the first failed one with a reason, or else the first failed one.

    A reason is an exception or a failed call of WeChat; a request's line alone only shows that it failed. A failed span
    of another instance that this one called comes first, whatever the clocks say.

    :param lines: the lines of one trace, sorted by time.
    :returns: the id of the span; None if none failed.
    """
    parents = {line["spanId"]: line["parentSpanId"] for line in lines if line["parentSpanId"] != "-"}
    failed = {line["spanId"]: line["instance"] for line in lines if line["level"] in ERRORS}
    reasons = [line for line in lines if line["spanId"] in failed and _has_reason(line)]
    spans = dict.fromkeys(line["spanId"] for line in reasons or lines if line["spanId"] in failed)
    cause = next(iter(spans), None)
    for span in spans:
        if cause in _ancestors(span, parents) and failed[span] != failed[cause]:
            cause = span
    return cause


def _has_reason(line: Line) -> bool:
    return line["level"] in SERIOUS and not {"exceptionType", "interface"}.isdisjoint(line)


def _ancestors(span: str, parents: dict[str, str]) -> set[str]:
    known: set[str] = set()
    while span in parents and parents[span] not in known:
        span = parents[span]
        known.add(span)
    return known


def story(trace_id: str, lines: list[Line], colour: bool) -> str:
    """Format the failing span with its stack, then all lines, each with its instance and span, and the version.

    That is part of each line if several versions took part, and the last line if one did.
    """
    instances = list(dict.fromkeys(text(line["instance"]) for line in lines))
    width = max(map(len, instances))

    def mark(line: Line) -> str:
        return f"{text(line['instance']):{width}} {short(line['spanId'])}"

    versions = list(dict.fromkeys(line["version"] for line in lines if line["version"] != "-"))

    def show(line: Line, **extra: str) -> str:
        return lay_out(line, mark(line), colour, extra | ({"version": line["version"]} if len(versions) > 1 else {}))

    began = local_time(lines[0]["timestamp"])
    when = f", {began:%Y-%m-%d} (UTC{began:%z})" if began else ""
    rows = [paint(f"Trace {trace_id}{when}, {_count(lines)} of {', '.join(instances)}", BOLD, colour), ""]
    failed = failing_span(lines)
    if failed:
        rows += [paint(f"Failing span {text(failed)}", BOLD, colour)]
        rows += [show(line) for line in lines if line["spanId"] == failed]
    else:
        rows += ["No span failed."]
    rows += ["", paint("All lines", BOLD, colour)]
    for line in lines:
        if line["spanId"] == failed and line.get("stack"):
            rows.append(show({**line, "stack": None}, stack="above"))
        else:
            rows.append(show(line))
    if len(versions) == 1:
        rows += ["", f"Version {text(versions[0])}"]
    return "\n".join(rows)


def _count(lines: list[Line]) -> str:
    return f"{len(lines)} line{'s' if len(lines) > 1 else ''}"


def listing(traces: dict[str, list[Line]]) -> str:
    """Format one line per trace: id, start, worst level, number of lines, first route."""
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
