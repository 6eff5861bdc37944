"""What is proved, in the order in which it should be run."""
