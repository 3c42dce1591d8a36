"""Makes the virtual environment of a make target: `python tools/make_venv.py FOLDER PART`.

PART is a file of requirements/, without its `.txt`; or `newest`: the newest of all that the tests need, no lock read.

Runs on whatever `python3` a machine has, before anything is installed: the standard library only, and no syntax
that a Python too old for silbo (3.6 to 3.10) could not read, or it could not say that it is too old.
"""

import os
import subprocess
import sys

OLDEST = (3, 11)
# Wheels only. A package that a file in requirements/ excepts (`--no-binary`) is built by the setuptools of the lock.
LOCKED = ("--require-hashes", "--no-deps", "--only-binary=:all:", "--no-build-isolation")


def main(folder: str, part: str) -> "str | None":
    if sys.version_info < OLDEST:
        found = ".".join(map(str, sys.version_info[:3]))
        return f"silbo needs Python 3.11 or later, {sys.executable} is {found}: try `make ... PYTHON=python3.12`"
    try:
        __import__("ensurepip")  # Debian keeps it in a package of its own, and venv does not work without it
        __import__("venv")
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        return (
            f"{sys.executable} has no venv. Debian and Ubuntu: apt-get install python3-venv "
            f"(python{version}-venv where it is not the system's default Python)"
        )

    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(os.path.join(folder, "bin", "pip")):
        say(f"1/3  a virtual environment in {folder}")
        run(sys.executable, "-m", "venv", "--clear", folder)
    pip = (python, "-m", "pip", "install")
    say("2/3  pip and setuptools")
    run(*pip, *LOCKED, "-r", requirements("build"))
    say(f"3/3  silbo, and what `{part}` needs (once; up to a minute)")
    if part == "newest":
        run(*pip, "--upgrade", "--upgrade-strategy=eager", "pip", "setuptools")
        run(*pip, "--upgrade", "--upgrade-strategy=eager", "--editable", with_extras(), "--group=test")
    else:
        run(*pip, *LOCKED, "-r", requirements(part))
        run(*pip, "--no-deps", "--no-build-isolation", "--editable", ".")
    with open(os.path.join(folder, f".{part}"), "w"):
        pass  # the stamp: make compares its age with that of pyproject.toml and requirements/
    return None


def requirements(part: str) -> str:
    return os.path.join("requirements", f"{part}.txt")


def with_extras() -> str:
    """silbo from this folder, with all extras."""
    import tomllib  # no Python before 3.11 has it

    with open("pyproject.toml", "rb") as file:
        return f".[{','.join(tomllib.load(file)['project']['optional-dependencies'])}]"


def run(*command: str) -> None:
    """Run it with one short line for each package instead of pip's pages, which are shown when it fails."""
    pages: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            pages.append(line)
            if line.startswith(("Collecting ", "Processing ", "Obtaining ")):
                say("     " + os.path.basename(line.split()[1]))
            elif line.startswith(("Building ", "Installing ", "WARNING: Retrying")):
                say("     " + line.strip()[:100])
    if process.returncode:
        sys.exit("".join(pages) + "\nThis failed: " + " ".join(command))


def say(line: str) -> None:
    print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
