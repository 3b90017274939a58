"""The ``infold`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from infold.tiers import cli as tiers


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 if it did what it was asked, 2 for a wrong argument or file, which it names."""
    parser = argparse.ArgumentParser(prog="infold", description="Weights in compact form, and over several memories.")
    families = parser.add_subparsers(required=True, metavar="COMMAND")
    tiers.add_commands(families.add_parser("tiers", help="weights over GPU memory, RAM and SSD, by byte budget"))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"infold: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
