"""Control: one intent, run at most once for its key, and what is known of its effect."""
