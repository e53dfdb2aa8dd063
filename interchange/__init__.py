"""Models made elsewhere, in and out: Hugging Face directories, the hub, and llama.cpp's GGUF. Needs no PyTorch."""
