"""deploy/server/README.md, as far as it needs no machine of its own; bare_server.py has the rest. And its likes."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

ENGLISH = ROOT / "deploy/server/README.md"


@pytest.mark.parametrize(
    "chinese", sorted((ROOT / "deploy").glob("*/README.zh-CN.md")), ids=lambda path: path.parent.name
)
def test_both_languages_have_the_same_commands_and_code(chinese: Path) -> None:
    texts = [path.read_text() for path in (chinese.with_name("README.md"), chinese)]
    lines = r"^    .+$"
    # But for what is said beside a command.
    commands, others = (re.sub(" +# .*", "", "\n".join(re.findall(lines, text, re.MULTILINE))) for text in texts)
    assert commands == others
    english, other = (re.sub(lines, "", text, flags=re.MULTILINE) for text in texts)
    assert sorted(re.findall("`[^`]+`", english)) == sorted(re.findall("`[^`]+`", other))


def test_the_settings_are_written_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    [block] = re.findall(r"^    \(set -C.+?^    END$", ENGLISH.read_text(), re.MULTILINE | re.DOTALL)
    script = re.sub("^    ", "", block, flags=re.MULTILINE).replace("/srv/kuaishang", str(tmp_path))
    subprocess.run(["bash", "-ec", script], check=True)
    settings = tmp_path / ".env"
    first = settings.read_text()
    assert re.search(r"^ENCRYPTION_KEYS=\S{44}$", first, re.MULTILINE)
    assert settings.stat().st_mode & 0o777 == 0o600
    again = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (again.returncode, settings.read_text()) == (1, first)
    assert "cannot overwrite existing file" in again.stderr
