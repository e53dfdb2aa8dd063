"""Text and datasets in object stores and on the Hugging Face hub, through fsspec."""
