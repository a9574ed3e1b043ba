"""What is in a recorded batch: `tokenrl inspect`."""
