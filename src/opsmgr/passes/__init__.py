"""One pass over a loop: taking in, projecting, judging, writing; and the pure rules of all that."""
