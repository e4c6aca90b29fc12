"""Models behind OpenAI-compatible and Gemini endpoints: judges of edited pictures and writers of prompts ask them.

``config``    how they are reached, and what they cost
``endpoint``  attempts, waits, a budget
``wire``      what goes there and comes back
"""
