"""Answers for many at once: the engine, and a server with OpenAI's interface before it."""
