"""Where tokens lie: padded or packed, which of them count, in which spans and groups."""
