"""``python -m solyd_swarm.simulation``."""

import sys

from solyd_swarm.simulation.commands import main

if __name__ == "__main__":
    sys.exit(main())
