"""Everything that could break a run, done on purpose: kills, concurrent runs, bad input, a long run."""
