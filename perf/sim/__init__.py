"""Small worlds in which everything goes wrong at once: the scheduler, proven by simulation."""
