"""Acting on a loop: what is at hand, the outbox, sending an intent, its records, looking for its effect."""
