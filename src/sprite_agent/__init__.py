"""The agent inside a Sprite: reads Superloop's artifacts, runs control, serves both over gRPC."""

__version__ = "0.1.0"
