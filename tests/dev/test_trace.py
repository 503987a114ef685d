"""`make trace`, as the developer on call types it."""

import gzip
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from dev import trace
from tests.harness import ROOT, WAIT_SECONDS, Service, Simulator, wait_until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADING = "\n\nAll lines\n"
ALONE = f"{sys.executable} -S -E -s"
"""Python with nothing but its standard library."""


def execute(*command: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, timeout=WAIT_SECONDS)


def make(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `make trace` as on a machine where nothing is installed, and where nothing may be."""
    return execute("make", "VENV=/nowhere", f"PYTHON={ALONE}", "trace", *words, stdin=stdin)


def run(given: str, *logs: Path | str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The same without make, which has an exit status of its own."""
    command = [*ALONE.split(), "-m", "dev.trace"]
    return execute(*command, stdin=stdin, TZ="UTC", ID=given, LOGS=shlex.join(map(str, logs)))


def line(second: float, message: str, level: str = "INFO", span: str = "a", **fields: Any) -> str:
    own = {"timestamp": f"2026-11-23T10:00:{second:06.3f}Z", "level": level, "traceId": TRACE_ID, "message": message}
    return json.dumps({**own, "spanId": span * 16, "instance": "one:8000", **fields}) + "\n"


def parsed(*lines: str) -> list[trace.Line]:
    return trace.read([[line.encode() for line in lines]], TRACE_ID)[TRACE_ID]


def story(*lines: str) -> str:
    return trace.story(TRACE_ID, parsed(*lines), colour=False)


def below(shown: str) -> str:
    """Return the output below the heading."""
    _, heading, lines = shown.partition(HEADING)
    assert heading
    return lines


def messages(shown: str) -> list[str]:
    """Return the messages of the lines that are not indented."""
    return [row.split()[4] for row in shown.splitlines() if row[:2].isdigit()]


def test_lines_of_two_instances_with_one_traceparent_are_merged(
    start_service: Callable[..., Service], simulator: Simulator
) -> None:
    # If spans are sent, a call of WeChat has one of its own.
    spans = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    one, other = (start_service(WEB_CONCURRENCY="1", **env) for env in ({}, spans))
    for first, second, fault in (
        (one, other, {"kind": "not_json"}),
        (one, other, {"kind": "errcode", "errcode": 45009}),
        (other, one, {"kind": "errcode", "errcode": 45009}),
    ):
        trace_id = secrets.token_hex(16)
        headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}

        def log_in(service: Service) -> tuple[int, list[dict[str, Any]]]:
            """Return the status and the lines of this trace."""
            url, body = f"{service.url}/api/v1/auth/wechat", {"code": simulator.code()}
            answer = requests.post(url, json=body, headers=headers, timeout=WAIT_SECONDS)  # noqa: B023

            def written() -> list[dict[str, Any]]:
                lines = [line for line in service.log_lines() if line["traceId"] == trace_id]  # noqa: B023
                return lines if any(line["message"] == "request" for line in lines) else []

            return answer.status_code, wait_until(written)

        status, ours = log_in(first)
        assert status == 200
        simulator.fault(**fault)
        status, theirs = log_in(second)
        assert status >= 500
        done = make(f"ID={trace_id}", f"LOGS={second.output} {first.output}")
        assert done.returncode == 0, done.stderr
        above, _, rest = done.stdout.partition(HEADING)
        title, *failing = above.splitlines()
        assert title.startswith(f"Trace {trace_id}, ")
        (cause,) = [line for line in theirs if line["message"] == "WeChat call failed"]
        assert f"Failing span {cause['spanId']}" in failing
        assert "interface=/sns/jscode2session" in above
        assert ours[-1]["instance"] not in "\n".join(failing)
        rest, last = rest.split("\n\n")
        assert last == f"Version {ours[0]['version']}\n"
        rows = [row for row in rest.splitlines() if not row.startswith(" ")]
        assert [row.split()[2] for row in rows] == [line["instance"] for line in ours + theirs]
        assert [line["message"] in row for line, row in zip(ours + theirs, rows, strict=True)] == [True] * len(rows)


def test_the_id_and_the_logs_may_be_arguments(tmp_path: Path) -> None:
    for name in ("one two.jsonl", "three.jsonl"):
        (tmp_path / name).write_text(line(1, "request", instance=name))
    done = execute(*ALONE.split(), "-m", "dev.trace", TRACE_ID[:8], str(tmp_path / "one two.jsonl"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert messages(below(done.stdout)) != []
    assert "2 lines of" in done.stdout


def test_the_version_is_shown_once_or_with_each_line_if_there_are_several() -> None:
    same = [line(second, "request", version="0.1.0+aaa") for second in (1, 2)]
    assert story(*same).endswith("\n\nVersion 0.1.0+aaa")
    assert story(*same).count("0.1.0+aaa") == 1
    assert "ersion" not in story(line(1, "request"))
    several = story(*same, line(3, "request", "ERROR", "b", version="0.1.0+bbb"), line(4, "foreign"))
    above, _, below = several.partition(HEADING)
    assert "version=0.1.0+bbb" in above
    assert [row.rpartition(" ")[2] for row in below.splitlines()] == [
        *["version=0.1.0+aaa"] * 2,
        "version=0.1.0+bbb",
        "version=-",
    ]


def test_the_failing_span_comes_first_then_all_lines_in_order() -> None:
    lines = (
        line(3, "crashed", "ERROR", "b", exceptionType="ValueError", stack="Traceback:\nValueError: bad"),
        line(4, "request", "ERROR", "b", instance="two:8000"),
        line(1, "begun", "INFO", "a"),
        line(5, "request", "INFO", "a"),
        line(2, "survived", "WARNING", "c", exceptionType="KeyError", stack="Traceback:\nKeyError: 'k'"),
    )
    above, _, rest = run(TRACE_ID, "-", stdin="".join(lines)).stdout.partition(HEADING)
    assert above.splitlines()[0] == f"Trace {TRACE_ID}, 2026-11-23 (UTC+0000), 5 lines of one:8000, two:8000"
    assert messages(above) == ["crashed", "request"]
    assert "\n    ValueError: bad\n" in above
    assert messages(rest) == ["begun", "survived", "crashed", "request", "request"]
    assert "\n    KeyError: 'k'\n" in rest
    assert "ValueError: bad" not in rest  # once is enough
    assert "stack=above" in rest
    assert [row.split()[2:4] for row in rest.splitlines() if "request" in row] == [
        ["two:8000", "b" * 8],
        ["one:8000", "a" * 8],
    ]


def failed(second: float, span: str, parent: str = "", level: str = "ERROR", **fields: Any) -> str:
    """A line of a failed span, with a reason if the fields have one."""
    parents = {"parentSpanId": parent * 16} if parent else {}
    return line(second, "failed", level, span, **parents, **fields)


CRASH, CALL = {"exceptionType": "E"}, {"interface": "/sns/jscode2session"}


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([failed(2, "b", "a", instance="two:1", **CRASH), failed(3, "a", **CRASH)], "b"),
        (
            [
                failed(2, "a", **CRASH),
                failed(3, "c", instance="two:1", **CRASH),
                failed(3, "c", "b", instance="two:1"),
                failed(4, "b", "a", instance="three:1"),
            ],
            "c",
        ),
        ([failed(2, "a", **CRASH), failed(3, "b", "a", **CRASH)], "a"),
        ([failed(1, "a"), failed(2, "b", level="WARNING", **CALL), failed(3, "b")], "b"),
        ([failed(1, "a", level="WARNING", **CALL), line(2, "request"), failed(3, "b")], "b"),
        ([line(1, "request")], None),
    ],
    ids=["callee", "callee with a late clock", "not later background work", "has a reason", "not handled", "none"],
)
def test_the_failing_span_is_the_cause(lines: list[str], cause: str | None) -> None:
    assert trace.failing_span(parsed(*lines)) == (cause and cause * 16)
    shown = story(*lines)
    assert shown.partition(HEADING)[0].endswith("No span failed.") == (cause is None)
    assert len(messages(below(shown))) == len(lines)


def test_a_trace_id_is_accepted_in_any_form() -> None:
    for given in (
        TRACE_ID.upper(),
        f" {TRACE_ID}\n",
        "4bf92f35-77b3-4da6-a3ce-929d0e0e4736",
        f"00-{TRACE_ID}-00f067aa0ba902b7-01",
        f"00-{TRACE_ID}-00f0",
        f'"traceId": "{TRACE_ID}",',
        f"traceId={TRACE_ID}",
    ):
        assert trace.trace_id_of(given) == TRACE_ID, given
    for given in ("00-4bf92f35", "4bf92f35", "4BF92F3577b34", "4bf92f35-77b", "4bf92f3577…", "4bf92f3577..."):
        assert TRACE_ID.startswith(trace.trace_id_of(given)), given
    assert run("4bf92f35", "-", stdin=line(1, "request")).stdout.startswith(f"Trace {TRACE_ID}")


def test_a_missing_or_invalid_id_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    done = run("", "-")
    assert (done.returncode, done.stdout, "set ID=" in done.stderr) == (2, "", True)
    for given in ("4bf92f3", "00-4bf92f3", "no trace id", f"{TRACE_ID}0", "4bf92f3g", "*"):
        with pytest.raises(SystemExit) as caught:
            trace.trace_id_of(given)
        printed = capsys.readouterr()
        assert (caught.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
        assert f"ID={given} is not a trace id" in printed.err


def test_an_ambiguous_id_lists_the_traces() -> None:
    other = TRACE_ID[:16] + "f" * 16
    lines = line(2, "request", "ERROR", traceId=other, method="GET", route="/livez") + line(1, "request")
    done = run(TRACE_ID[:12], "-", stdin=lines)
    assert done.returncode == 1
    assert [row.split()[0] for row in done.stdout.splitlines()] == [TRACE_ID, other]
    assert all(word in done.stdout.splitlines()[1] for word in ("2026-11-23 10:00:02.000", "ERROR", "GET /livez"))
    assert "2 traces" in done.stderr
    assert run(other, "-", stdin=lines).stdout.startswith(f"Trace {other}")


def test_an_unknown_trace_and_unreadable_logs_are_reported_in_one_line(tmp_path: Path) -> None:
    truncated, nowhere, unknown = tmp_path / "8000.jsonl.1.gz", tmp_path / "nowhere", "0" * 32
    truncated.write_bytes(gzip.compress(line(1, "request").encode())[:-10])
    (tmp_path / "8000.jsonl").write_text(line(1, "request"))
    for given, place, status, reason in (
        (unknown, tmp_path / "8000.jsonl", 1, f"no lines of trace {unknown} in {tmp_path / '8000.jsonl'}\n"),
        (TRACE_ID, nowhere, 2, f"LOGS={nowhere} cannot be read: "),
        (TRACE_ID, truncated, 2, f"LOGS={truncated} cannot be read: "),
    ):
        done = run(given, place)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
        assert done.stderr.startswith(f"make trace: {reason}")
    assert "in var/log\n" in run(secrets.token_hex(16)).stderr


def test_folders_are_read_with_rotated_files_and_each_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    for number, name in enumerate(["8000.jsonl.10.gz", "8000.jsonl.2", "8000.jsonl.1", "8000.jsonl"]):
        written = (line(1, f"{number}") + line(1, f"{number}b")).encode()
        (folder / name).write_bytes(gzip.compress(written) if name.endswith(".gz") else written)
    (folder / "9000.jsonl").write_text("no JSON\n" + line(0.5, "before", instance="two:9000") + '{"traceId": "4bf92f')
    done = run(TRACE_ID, folder, folder / "8000.jsonl")
    assert messages(below(done.stdout)) == ["before", "0", "0b", "1", "1b", "2", "2b", "3", "3b"]


def test_prefixes_and_dockers_format_are_read() -> None:
    shown = story(
        f"[pod/kuaishang-0/web] {line(2, 'second')}",
        f"2026-11-23T10:00:01Z stdout F {line(1, 'first')}",
        json.dumps({"log": line(3, "third"), "stream": "stdout"}) + "\n",
    )
    assert messages(below(shown)) == ["first", "second", "third"]


def test_malformed_lines_are_printed_unchanged() -> None:
    for odd in (None, 5, [1], {"a": []}, ""):
        fields = dict.fromkeys(["timestamp", "level", "message", "instance", "spanId", "parentSpanId", "stack"], odd)
        strange = json.dumps({**fields, "traceId": TRACE_ID})
        assert "fine" in below(story(strange + "\n", line(1, "fine", "ERROR"), f'{{"traceId": ["{TRACE_ID}"]}}\n'))


def test_make_and_the_shell_do_not_interpret_pasted_text(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for pasted in (f"$(shell touch {made})`touch {made}`$$x#", f"$(touch {made})", f"'; touch {made}; '"):
        done = make(f"ID={pasted}", f"LOGS={pasted}")
        assert f"ID={pasted} is not a trace id" in done.stderr
        assert "LOGS=" in make(f"ID={TRACE_ID}", f"LOGS={pasted}").stderr
    assert not made.exists()
    piped = make(f"ID={TRACE_ID}", "LOGS=-", stdin=line(1, "request"))
    assert messages(below(piped.stdout)) == ["request"]
