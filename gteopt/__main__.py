"""`python -m gteopt` and the console script: the command line."""

from gteopt.interruption import leave_on_interrupt


def main() -> None:
    """Run the command line; see `gteopt.cli.app.main`."""
    leave_on_interrupt()
    from gteopt.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
