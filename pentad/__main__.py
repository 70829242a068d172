"""The command ``pentad``, and ``python -m pentad``."""

import sys

from pentad import terminal


def main() -> None:
    """Run the command line and exit."""
    if terminal.starts_conversation(sys.argv[1:]):
        terminal.hush()  # before the imports, which take longer than a user takes to type
    from pentad.cli import main

    main()


if __name__ == "__main__":
    main()
