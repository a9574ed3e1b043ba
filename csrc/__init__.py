"""Installed as tokenrl.csrc: sources that tokenrl.fuse compiles with a gate."""
