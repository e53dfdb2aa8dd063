"""Reading text and rows from files, the same for every command: kinds of files, compression, encoding and limits."""
