"""An HTTP server that runs many requests at once on one bundle."""
