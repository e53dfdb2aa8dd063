"""A page that runs a bundle in the browser, or talks to the server that it comes from."""
