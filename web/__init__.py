"""A web page that runs a bundle in the browser, or that is a client of the server that it comes from."""
