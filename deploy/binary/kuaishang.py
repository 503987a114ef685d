"""The commands of the one file; the program in front of it, stub.c, starts this."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT.parent
FILE = Path(os.environ["KUAISHANG_FILE"])
"""The file, by the path by which it was called."""

HELP = """\
usage: kuaishang [COMMAND]

  demo [--var FOLDER]   try it, with stand-ins for WeChat, Redis and MySQL; keeps its data in ./kuaishang-demo
  migrate               bring the schema of the database up to date
  check                 whether it runs here, the settings are complete, and Redis and the database are as they must be
  serve                 serve, as without a command; SIGHUP switches to a new file at this path, and loses no request
  keys, users, switch   `keys status`, `users list`, ...: what `flask` does in a source tree; `users --help`
  trace ID [FILE ...]   print all lines of a trace from log files, the failing ones first
  licences              the licences of all that is inside
  --version             what this is

Settings come from the environment, and from the file .env beside this one; `check` lists what is missing.
"""


def flask(words: Sequence[str]) -> None:
    from flask.cli import FlaskGroup

    from deploy.keys import create_app

    # Not by FLASK_APP, which would put the folder where it is called before ours. settings.py reads the file .env.
    FlaskGroup(create_app=create_app, load_dotenv=False).main(words, "kuaishang")


def serve(words: Sequence[str]) -> None:
    from deploy.binary.upgrades import proved, serve

    # What is missing is said once. In a child, as the main process needs none of what this loads.
    child = os.fork()
    if not child:
        import settings

        settings.load()
        sys.exit()
    complete = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if not complete and proved(FILE, TREE.parent) in ("", TREE.name):  # another one may do with what there is
        raise SystemExit("`kuaishang demo` needs no settings; `kuaishang --help` lists all commands.")
    serve(FILE, TREE.parent)


def gunicorn(words: Sequence[str]) -> None:
    from gunicorn.app.wsgiapp import run  # type: ignore[import-untyped]
    from gunicorn.util import getcwd  # type: ignore[import-untyped]

    sys.path.append(getcwd())  # gunicorn would put it first, and a settings.py that happens to be there before ours
    sys.argv = ["gunicorn", "--config", str(ROOT / "deploy" / "patch" / "generation.py"), *words]
    run()


def migrate(words: Sequence[str]) -> None:
    from alembic.config import main

    main(["--config", str(ROOT / "pyproject.toml"), *(words or ["upgrade", "head"])], prog="kuaishang migrate")


def smoke(words: Sequence[str]) -> int:
    """Check what is in the file, apart from all that serves; see deploy/patch/check.py."""
    find_redis_server()
    return subprocess.run([sys.executable, ROOT / "deploy" / "patch" / "check.py", *words], cwd=ROOT).returncode


def check(words: Sequence[str]) -> int:
    if smoke([]):
        return 1
    from gevent import monkey

    monkey.patch_all()
    import settings
    from service import create_app

    response = create_app({**settings.variables(), "LOG_LEVEL": "ERROR"}).test_client().get("/readyz")
    print(f"readyz     {response.status_code} {response.get_data(as_text=True).strip()}")
    return int(response.status_code != 200)


def find_redis_server() -> None:
    os.environ["PATH"] = f"{TREE / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def demo(words: Sequence[str]) -> None:
    from dev import run

    find_redis_server()
    run.NAME, run.TRACE = "kuaishang demo", "kuaishang trace ID kuaishang-demo/log"
    run.SERVICE = ["deploy.binary.demo", "{fd}"]
    sys.argv = ["kuaishang demo", "--var", "kuaishang-demo", *words]
    run.main()


def trace(words: Sequence[str]) -> None:
    from dev.trace import main

    sys.argv = ["kuaishang trace", *words]
    main()


def licences(words: Sequence[str]) -> None:
    sys.stdout.write((TREE / "LICENCES").read_text())


def version(words: Sequence[str]) -> None:
    print(json.dumps({**json.loads((ROOT / "release.json").read_text()), "id": TREE.name}))


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "demo": demo,
    "check": check,
    "smoke": smoke,
    "migrate": migrate,
    "serve": serve,
    "gunicorn": gunicorn,
    "trace": trace,
    "licences": licences,
    "--version": version,
}


def main() -> None:
    command, *words = sys.argv[1:] or ["serve"]
    sys.path.insert(0, str(ROOT))
    if FILE.with_name(".env").exists() and command != "demo":
        os.environ.setdefault("ENV_FILE", str(FILE.with_name(".env")))
    if command in ("--help", "-h", "help"):
        print(HELP, end="")
    elif command in ("keys", "users", "switch"):
        flask([command, *words])
    elif command in COMMANDS:
        sys.exit(COMMANDS[command](words))
    else:
        raise SystemExit(f"kuaishang: no command {command}\n\n{HELP}")


if __name__ == "__main__":
    main()
