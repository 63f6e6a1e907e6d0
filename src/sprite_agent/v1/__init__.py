"""The wire: generated from protos/sprite_agent/v1 by `make protos`; never edited."""
