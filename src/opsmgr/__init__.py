"""The manager outside the Sprite: sees, follows and controls Superloop runs."""

from sprite_agent import __version__

__all__ = ["__version__"]
