"""The v1 contract: its shapes, its validators, its mirror, and the rules both sides share."""
