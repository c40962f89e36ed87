"""``python -m flexlora``."""

from flexlora.cli.main import main

if __name__ == "__main__":
    main()
