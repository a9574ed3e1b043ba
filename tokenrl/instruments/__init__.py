"""To measure and to prove, a file per command."""
