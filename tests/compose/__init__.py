"""A cluster of containers, for real: built, brought up, put to work, hurt and taken down (``make compose-test``)."""
