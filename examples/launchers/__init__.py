"""A worker program for every launcher, and what they need to start it."""
