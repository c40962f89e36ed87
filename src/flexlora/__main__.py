"""``python -m flexlora``."""

from flexlora.cli import main

if __name__ == "__main__":
    main()
