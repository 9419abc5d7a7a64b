"""Everything that must be clean before a change goes in: `python -m tests`; hours are for `python -m tests.long`."""

from __future__ import annotations

import subprocess
import sys

CHECKS = (
    ["-m", "ruff", "check", "."],
    ["-m", "ruff", "format", "--check", "."],
    ["-m", "mypy", "."],
    ["-m", "pytest", "-n", "auto", "--dist", "worksteal"],  # neighbours share fixtures
)


def main() -> int:
    """Run each check, the tests with the given arguments; returns 1 if any failed."""
    failed = []
    for check in CHECKS:
        arguments = sys.argv[1:] if check[1] == "pytest" else []
        print("+", *check[1:], *arguments, flush=True)
        if subprocess.run([sys.executable, *check, *arguments], check=False).returncode:
            failed.append(check[1])
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
