"""The pocket model: a real Qwen2.5-VL of four million parameters, trained here, shipped in ``weights/``.

``build``     tokenizer, processor, config
``lesson``    what it is taught: both prompts' answers, and where every object stands
``train``     ``python -m extract.pocket train`` – from scratch on a CPU
``evaluate``  ``python -m extract.pocket evaluate --samples N --seed S`` – boxes on fresh scenes, beside their floors
"""
