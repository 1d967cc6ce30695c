"""One HTML page about a run, or about several beside each other, from the files of run folders, without torch."""
