"""``python -m pentad`` is the command ``pentad``."""

from pentad.cli import main

if __name__ == "__main__":
    main()
