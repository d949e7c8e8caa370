"""``python -m solyd_swarm``: the same as the command ``solyd-swarm``."""

import sys

from solyd_swarm.cli import main

sys.exit(main())
