"""The protocol as a state machine: no socket, no clock, no ambient randomness."""
