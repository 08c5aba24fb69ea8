"""The report of runs: one page that shows what they did, without a network."""
