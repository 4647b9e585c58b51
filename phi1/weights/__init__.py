"""Models on disk: published layouts, safetensors, Hugging Face folders."""
