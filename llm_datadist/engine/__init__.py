"""One engine a process: caches and keys, links, and what a transfer means. Gets plain, checked values."""
