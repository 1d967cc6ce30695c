"""Measures a machine, a file for each stage; one that fails takes no other along, and what is known is written."""
