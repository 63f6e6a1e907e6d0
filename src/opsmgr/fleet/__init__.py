"""The daemon, `opsmgr run`: many loops supervised at once, none of which can delay another."""
