"""What a row of a table says: declarations only, nothing here runs a kernel."""
