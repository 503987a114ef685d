"""Makes a virtual environment of pinned requirements, with their hashes checked, or brings it up to date:

    python3 dev/install.py .venv requirements.txt requirements-dev.txt

By uv, which takes a fraction of pip's time. pip installs its wheel first, as it is pinned there, and setuptools, which
builds what has no wheel: nothing comes in without a hash. If there is no uv for this machine, or it fails, pip installs
everything, with the same setuptools. uv asks where pip is configured to ask. Needs the standard library alone.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

UV_OF_PIP = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", ""),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", ""),
    "proxy": ("ALL_PROXY", ""),
    "default-timeout": ("UV_HTTP_TIMEOUT", ""),
}
"""By option of pip: the variable of uv, and what separates its values if it takes several."""


def main() -> int | str:
    folder, *files = sys.argv[1:]
    python = f"{folder}/bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    required = ["install", "--quiet", "--require-hashes", *(word for name in files for word in ("-r", name))]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    has_uv = install_tools(pip, files, "uv", "setuptools")
    if not has_uv:  # perhaps for lack of a pip, which the environment itself gets then
        if subprocess.call([python, "-m", "ensurepip"], stdout=subprocess.DEVNULL):
            return "this Python has neither pip nor ensurepip: install python3-pip or python3-venv"
        pip[0], pip[-2:] = python, []
        has_uv = install_tools(pip, files, "uv", "setuptools")
    if has_uv:
        listed = subprocess.run([*pip, "config", "list"], stdout=subprocess.PIPE, text=True).stdout
        command = [python, "-m", "uv", "pip", *required, "--python", python, "--no-build-isolation"]
        if subprocess.call(command, env={**environment_of_uv(listed), **os.environ}) == 0:
            return 0
    print("uv cannot install here; pip does, which takes longer", file=sys.stderr, flush=True)
    if install_tools(pip, files, "setuptools"):
        required.append("--no-build-isolation")
    return subprocess.call([*pip, *required])


def install_tools(pip: list[str], files: list[str], *names: str) -> bool:
    """Install the wheels of these packages that the files pin; return whether that worked."""
    pinned = pins_of(files, *names)
    if len(pinned) < len(names):
        return False
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pinned))
        file.flush()
        options = ["--quiet", "--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", file.name]
        return subprocess.call([*pip, "install", *options], stderr=subprocess.DEVNULL) == 0


def pins_of(files: Iterable[str | Path], *names: str) -> list[str]:
    """Return the lines, with their hashes, that pin these packages."""
    lines = "\n".join(Path(name).read_text() for name in files)
    return re.findall(rf"^(?:{'|'.join(names)})==(?:.*\\\n)*.*$", lines, re.MULTILINE)


def environment_of_uv(listed: str) -> dict[str, str]:
    """Translate pip's configuration for uv.

    :param listed: what `pip config list` prints.
    """
    # pip trusts whom the machine trusts. All indexes count alike, as with pip: hashes say which file is the right one.
    env = {"UV_SYSTEM_CERTS": "true", "UV_INDEX_STRATEGY": "unsafe-best-match"}
    for section in ("global", "install", ":env:"):  # a later one wins
        for option, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", listed, re.MULTILINE):
            if option in UV_OF_PIP:
                name, separator = UV_OF_PIP[option]
                text = str(ast.literal_eval(value))
                env[name] = separator.join(text.split()) if separator else text
    return env


if __name__ == "__main__":
    sys.exit(main())
