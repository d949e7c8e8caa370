"""Encrypted channels over TCP, and the driver that runs the core on an event loop."""
