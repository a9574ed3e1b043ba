"""The commands of `tokenrl`: a file each, its function of the same name. What it runs is imported when it runs, so that
--help and shell completion are quick."""
