"""One file for each experiment: what it shows, what to expect, how long it takes, and how to run it."""
