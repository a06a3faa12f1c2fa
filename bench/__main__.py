"""``python -m bench``; see ``bench/command.py``."""

import sys

if __name__ == "__main__":
    from bench.command import main  # here, for the processes that are started look into this file, too

    sys.exit(main())
