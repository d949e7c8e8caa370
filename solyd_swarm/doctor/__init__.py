"""``solyd-swarm doctor``: what of this library works on this machine and in this network, and what to do about the rest."""
