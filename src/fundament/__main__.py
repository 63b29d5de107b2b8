"""The `fundament` command, also as `python -m fundament`: how it ends where its own words cannot be read or written."""

import errno
import sys


def main() -> None:
    """Run the command. Ctrl-C ends it in silence, also while what it needs is still imported."""
    try:
        from fundament.cli import app

        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        from fundament.cli.output import end_output

        end_output()
        sys.exit("fundament: what it says cannot be written: no space left on device")


if __name__ == "__main__":
    main()
