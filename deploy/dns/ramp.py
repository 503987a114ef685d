"""Bring a site that was out back in steps: keep its weight low while it is out, and raise it once it is healthy.

Runs beside each gdnsd, as the same user. Health is gdnsd's alone: without this program sites leave the answers and
return as before, with the weights that they have then. Ends with an error if gdnsd does not respond; ramp.service
starts it again.
"""

import argparse
import json
import os
import re
import subprocess
import time
from pathlib import Path

SITE = re.compile(r"(\w+) => \[ (\S+), (\d+) \]")
PERCENT = (10, 25, 50, 100)
POLL_SECONDS = 5.0
"""As often as gdnsd looks at the sites."""


def read(path: Path) -> dict[str, tuple[str, int]]:
    """Return the address and the weight of each site, by its name.

    :raises SystemExit: if a line is neither a site nor a comment.
    """
    sites = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            site = SITE.fullmatch(line)
            if not site:
                raise SystemExit(f"{path}: not a site: {line}")
            sites[site[1]] = site[2], int(site[3])
    return sites


def write(path: Path, text: str) -> None:
    """Replace a file at once."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def next_weight(weight: int, target: int, up: bool, due: bool) -> int:
    """Return the weight of a site from now on.

    :param target: its weight in full.
    :param due: whether it has had the present weight for long enough.
    """
    steps = [max(1, target * percent // 100) for percent in PERCENT]
    if not up:
        return steps[0]
    higher = [step for step in steps if step > weight]
    return higher[0] if higher and (due or weight < steps[0]) else min(weight, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sites", type=Path, help="the weights in full, as an operator wants them")
    parser.add_argument("weights", type=Path, help="those that gdnsd includes; written here")
    parser.add_argument("--seconds", type=float, default=30, help="how long each step takes (default: 30)")
    parser.add_argument("--config", default="/etc/gdnsd", help="gdnsd's folder (default: /etc/gdnsd)")
    arguments = parser.parse_args()

    def gdnsdctl(action: str) -> str:
        command = ["gdnsdctl", "-c", arguments.config, action]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    applied = ""
    since: dict[str, float] = {}
    while True:
        states = json.loads(gdnsdctl("states"))
        weights, now, lines = read(arguments.weights), time.monotonic(), []
        for name, (address, target) in read(arguments.sites).items():
            up = states.get(f"{address}/site", {}).get("state") == "UP"
            before = weights.get(name, (address, 0))[1]
            due = now - since.setdefault(name, now) >= arguments.seconds
            weight = next_weight(before, target, up, due)
            if weight != before or not up:
                since[name] = now
            if weight != before:
                print(f"{name}: weight {before} -> {weight} of {target}", flush=True)
            lines.append(f"{name} => [ {address}, {weight} ]\n")
        wanted = "".join(lines)
        if wanted != applied:
            accepted = arguments.weights.read_text()
            write(arguments.weights, wanted)
            try:
                gdnsdctl("replace")  # a new process takes over the sockets; no query is lost
            except subprocess.CalledProcessError:
                write(arguments.weights, accepted)  # or gdnsd could not start again, either
                raise
            applied = wanted
        time.sleep(min(POLL_SECONDS, arguments.seconds))


if __name__ == "__main__":
    main()
