"""The program ``flexlora``, also as ``python -m flexlora``."""

from flexlora.cli.interrupts import end_silently


def main() -> None:
    """Run the command line, which takes a while to import: an interrupt ends it silently."""
    end_silently()
    from flexlora.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
