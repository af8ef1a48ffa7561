# ruff: noqa  (old on purpose: it must parse under any Python, to say which one is needed)
"""Make or update the virtual environment; does nothing when it is up to date.

usage: python3 .ci/setup.py EXTRA [TORCH_INDEX]     EXTRA: platform, dev or bench
"""

import hashlib
import os
import shutil
import subprocess
import sys

VENV = ".venv"
NEEDED_PYTHON = (3, 11)
NEEDED_BYTES = 4 * 1024**3
EXTRAS = ("platform", "dev", "bench")  # each holds the one before


def main():
    extra, index = sys.argv[1], (sys.argv[2:] + [""])[0]
    if sys.version_info < NEEDED_PYTHON:
        stop(
            "Python is %d.%d, but must be 3.11 or newer. Install one and name it: make PYTHON=python3.12 ..."
            % sys.version_info[:2]
        )
    if shutil.which("git") is None:
        stop("git is not found, but is needed to check out and test Wattier. Install it.")
    stamp, wanted = os.path.join(VENV, "wattier-setup"), fingerprint(index)
    done = read(stamp).split()
    if len(done) == 2 and done[0] == wanted and EXTRAS.index(done[1]) >= EXTRAS.index(extra):
        say("environment %s is up to date" % VENV)
        return
    free = shutil.disk_usage(".").free
    if free < NEEDED_BYTES:
        stop("the disk has %.1f GB free, but the set-up needs 4. Make room, then run the same command." % (free / 1e9))
    say("setting up %s with the extra [%s]; about two minutes, 2 GB without CUDA" % (VENV, extra))
    python = os.path.join(VENV, "bin", "python")
    if not os.path.exists(python):
        run([sys.executable, "-m", "venv", VENV])
    if index:
        run([python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "--index-url", index, "torch"])
    run([python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[%s]" % extra])
    with open(stamp, "w") as file:
        file.write("%s %s\n" % (wanted, extra))
    say("environment is ready")


def fingerprint(index):
    digest = hashlib.sha256(index.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update(read(name).encode())
    return digest.hexdigest()[:16]


def read(path):
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()


def run(command):
    try:
        subprocess.check_call(command)
    except subprocess.CalledProcessError:
        stop(
            "%s failed; its message is above. Check the network and the disk, then run the same command." % command[:4]
        )


def say(text):
    sys.stdout.write("wattier setup: %s\n" % text)
    sys.stdout.flush()


def stop(text):
    sys.stderr.write("wattier setup: %s\n" % text)
    sys.exit(2)


main()
