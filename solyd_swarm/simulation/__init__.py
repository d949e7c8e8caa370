"""Many cores over a simulated network, seeded: the very objects that production drives."""
