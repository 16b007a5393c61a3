"""Between HTTP and the engine: routes, limits, and the work on a request before it is one. Knows no Ray."""
