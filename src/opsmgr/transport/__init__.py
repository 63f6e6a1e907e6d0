"""How a loop is reached: one interface, two transports, the same answers."""
