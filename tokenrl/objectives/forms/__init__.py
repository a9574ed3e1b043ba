"""What an objective does around its row, where tokens meet in other ways than through a statistic."""
