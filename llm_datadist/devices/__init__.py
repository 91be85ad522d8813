"""Where cache memory lives: one interface, one module for each kind of device."""
