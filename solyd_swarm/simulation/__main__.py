"""``python -m solyd_swarm.simulation``."""

import sys

if __name__ == "__main__":
    try:
        from solyd_swarm.simulation.commands import main
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(main())
