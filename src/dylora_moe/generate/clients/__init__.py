"""Who answers: servers with OpenAI's interface, or a model in this process."""

from dylora_moe.generate.clients.base import Client, Failure, Reply, Request

__all__ = ["Client", "Failure", "Reply", "Request"]
