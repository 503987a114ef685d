"""Runs all faults and writes the table bench/faults.md: `make faults`.

Words select faults by a part of their names; then nothing is written. Ends with a status that is not 0 if anything was
lost or doubled, hung, was answered wrongly, or did not recover; if a fault did not happen; or if the checker misses a
bug that is there.
"""

import sys
import time
from contextlib import ExitStack

from tests.databases import executable
from tests.faults import clients
from tests.faults.experiment import Row, experiment
from tests.faults.load import CLIENTS, PAUSE_SECONDS
from tests.faults.stage import REQUEST_SECONDS, Stage
from tests.faults.table import FAULTS, SEEDED
from tests.harness import ROOT

LOAD = ", ".join(f"{kind}: {number}" for kind, number in CLIENTS.items())
INTRODUCTION = f"""# Faults under load

`make faults` writes this table. Each fault happens to two workers under load, from clients that read, log in, or order
with an `Idempotency-Key` and send again what was not acknowledged ({LOAD}), each with a pause of
{PAUSE_SECONDS * 1000:.0f} ms; `REQUEST_SECONDS` is {REQUEST_SECONDS}. The answers are those to requests that were sent
during the fault, by business code; for clients that misbehave, those that they got themselves, by status. Lost are
acknowledged orders that are not in the database afterwards, and logins whose session is gone; doubled are orders that
are there twice. The last column counts from the end of the fault until the last request that was not served.

| fault | database | answers | lost | doubled | seconds to recovery |
|---|---|---|---|---|---|
"""


def databases() -> list[str]:
    try:
        executable("mariadbd")
    except FileNotFoundError:
        print("Not run: the faults of MariaDB, as mariadbd is not installed.")
        return ["sqlite"]
    return ["mariadb", "sqlite"]


def main() -> None:
    words, rows, skipped, began = sys.argv[1:], [], [], time.monotonic()
    available = databases()
    for database in available:
        with ExitStack() as stack:
            stage = Stage(stack, database == "mariadb")

            def show(row: Row, database: str = database) -> None:
                rows.append((database, row))
                recovery = "not" if row.recovery is None else f"{row.recovery:.1f} s"
                print(f"{row.fault:45}{row.answers} recovered: {recovery} {'; '.join(row.problems)}", flush=True)

            for fault in FAULTS:
                if (fault.only_on or available[0]) != database or not _selected(fault.name, words):
                    continue
                if fault.possible():
                    show(experiment(stage, fault))
                else:
                    skipped.append(fault.name)
            if database == available[0]:
                misbehaving = [one for one in clients.CLIENTS if _selected(f"client: {one.name}", words)]
                for row in clients.run(stage, misbehaving):
                    show(row)
                if _selected(SEEDED.name, words):
                    seeded = experiment(stage, SEEDED)
                    caught = seeded.lost and seeded.doubled
                    seeded.problems = [] if caught else ["the checker does not see it"]
                    seeded.fault += " (the checker must see it)"
                    show(seeded)
    failed = [f"{row.fault}: {'; '.join(row.problems)}" for _, row in rows if row.problems]
    if not words:
        table = "".join(_line(database, row) for database, row in rows)
        table += "".join(f"| {name} | | not possible on this machine | | | |\n" for name in skipped)
        (ROOT / "bench" / "faults.md").write_text(INTRODUCTION + table)
    print(f"{len(rows)} faults in {time.monotonic() - began:.0f} s; not possible here: {', '.join(skipped) or 'none'}")
    if failed:
        sys.exit("\n".join(["", *failed]))


def _selected(name: str, words: list[str]) -> bool:
    return not words or any(word in name for word in words)


def _line(database: str, row: Row) -> str:
    answers = ", ".join(f"{code}: {count}" for code, count in row.answers.items())
    recovery = "never" if row.recovery is None else f"{row.recovery:.1f}"
    answers += "".join(f"; **{problem}**" for problem in row.problems)
    return f"| {row.fault} | {database} | {answers} | {row.lost} | {row.doubled} | {recovery} |\n"


if __name__ == "__main__":
    main()
