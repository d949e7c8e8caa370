"""What a node remembers: its keys, its epochs, what it has delivered."""
