"""The pocket editor: a real Qwen-Image-Edit pipeline of a few million parameters, trained here on scenes, shipped.

``build``     the configs of its autoencoder, transformer and scheduler
``vae``       ``python -m edit.pocket vae`` – the autoencoder, from scratch
"""
