"""The event log of a loop: read as it grows, by any number of readers, from any place, whatever is written into it."""
