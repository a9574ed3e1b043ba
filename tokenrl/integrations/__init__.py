"""Hooks into trainers, one module per host. Importing one imports its host; importing tokenrl imports none."""
