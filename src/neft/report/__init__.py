"""What was found out, for people to look at."""
